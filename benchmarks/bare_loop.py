"""A bare PyTorch training loop on the inputs of the default run, for comparison with the training stage.

It follows the stage's settings: model, RoPE, adapter, batch, precision, attention, document masks, loss,
optimizer, clipping, threads and data. It lacks what the stage adds: DeepSpeed, checkpoints, guards and
metrics. Takes the run's directory and config section `training` as JSON; prints a line per step.
"""

import json
import sys
from pathlib import Path

import paths  # noqa: F401

from longyarn.core import manifest
from longyarn.core.torch_setup import set_up_torch
from longyarn.data.packed_dataset import IGNORED, Packed
from longyarn.models import loading, lora
from longyarn.training import chunked_loss, model_setup


def main(run: Path, settings: dict) -> None:
    """Train on the results of the stages below ``run``; ``settings``: config section `training`."""
    set_up_torch(settings["threads"])
    import torch
    import transformers

    transformers.set_seed(settings["seed"])
    pack = manifest.read(run / "pack.json")
    masks = pack["facts"]["document_masks"]
    model = loading.load_model(
        run / "base",
        run / "rope/yarn.json",
        dtype="fp32",
        attention=model_setup.attention(settings, masks),
    )
    model.config.use_cache = False
    model = lora.attach(model, settings["lora"])
    chunked_loss.attach(model)  # the same loss on both sides, so that only the loop differs
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=settings["learning_rate"],
        betas=(0.9, settings["adam_beta2"]),
        weight_decay=settings["weight_decay"],
    )
    schedule = transformers.get_constant_schedule_with_warmup(optimizer, settings["warmup_steps"])
    data = Packed(run / next(iter(pack["files"])), masks)
    model.train()
    for step in range(1, settings["steps"] + 1):
        rows = range((step - 1) * settings["batch_size"], step * settings["batch_size"])
        batch = [{key: part[None] for key, part in data[row].items()} for row in rows]
        labels = sum(int((item["labels"][:, 1:] != IGNORED).sum()) for item in batch)
        total = 0.0
        for item in batch:
            loss = model(**item, num_items_in_batch=labels).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, settings["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"train: step {step}/{settings['steps']} loss {total:.4f}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
