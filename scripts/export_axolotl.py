"""Hand a run over to Axolotl: the patched model, the packed sequences and the same settings.

Where documents are masked, a row is a document's piece, and Axolotl's own packing, in order, makes the
packed sequences again: each fills one to the token, so the next piece begins the next. It drops rows
without a label, so what is not scored goes to the end of a scored piece, where no label sees it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from longyarn.config import derived
from longyarn.core.errors import program
from longyarn.training import frameworks

NAME = "Axolotl"
VERSION = "0.19.0"  # whose source this follows
COLUMNS = ("input_ids", "attention_mask", "labels")
# Where it says what our section `training` says; none: it cannot.
THEIRS = {
    "mode": "adapter", "steps": "max_steps", "epochs": "num_epochs",
    "learning_rate": "learning_rate", "scheduler": "lr_scheduler",
    "warmup_steps": "warmup_steps", "weight_decay": "weight_decay", "adam_beta2": "adam_beta2",
    "max_grad_norm": "max_grad_norm", "batch_size": "gradient_accumulation_steps",
    "micro_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_offload": "activation_offloading",
    "loss": "liger_fused_linear_cross_entropy", "precision": "bf16, fp16",
    "attention": "attn_implementation", "nodes": "--nnodes", "gpus": "--nproc-per-node",
    "zero_stage": "deepspeed", "offload": "deepspeed", "overlap_communication": "deepspeed",
    "sp_size": "context_parallel_size", "threads": None, "seed": "seed",
    "logging_steps": "logging_steps", "save_steps": "save_steps", "save_minutes": None,
    "save_total_limit": "save_total_limit", "held_out_steps": None, "early_stopping": None,
    "report_to": "use_tensorboard, wandb_project", "lora.rank": "lora_r", "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout", "lora.rslora": "peft_use_rslora",
    "lora.targets": "lora_target_modules", "lora.train_embeddings": "lora_modules_to_save",
    "lora.train_norms": "lora_modules_to_save", "lora.train_output_head": "lora_modules_to_save",
}  # fmt: skip
# What it has not, with the value at which that says nothing.
LACKING = {"save_minutes": None, "held_out_steps": None, "early_stopping": None}
HEAD = [
    f"Written by Longyarn for {NAME} {VERSION}; README.md beside it says how to start it.",
    "No rope_parameters: model/config.json has the new RoPE already.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    frameworks.add_arguments(parser)
    arguments = parser.parse_args()
    run = frameworks.Run.of(arguments)
    frameworks.write(
        arguments,
        Path(__file__),
        run,
        name=NAME,
        head=HEAD,
        settings=settings(run, frameworks.results(arguments)),
        dataset=(COLUMNS, examples(run), None),
        training=run.training,
        command=start(run.training),
    )


def examples(run: frameworks.Run) -> Iterator[dict]:
    """Yield rows: the pieces that are scored where documents are masked, else whole sequences."""
    import numpy as np

    for row in range(len(run.data)):
        item = run.data[row]
        ids, labels = item["input_ids"].numpy(), item["labels"].numpy()
        places = [place for place, _ in run.pieces(row)] if run.masks else [slice(None)]
        scored = [place for place in places if (labels[place] != frameworks.IGNORED).any()]
        others = [place for place in places if place not in scored]
        groups = [[place] for place in scored or others[:1]]
        groups[-1] += others if scored else others[1:]
        for group in groups:
            yield {
                "input_ids": np.concatenate([ids[place] for place in group]),
                "attention_mask": np.ones(sum(len(ids[place]) for place in group), dtype=np.int32),
                "labels": np.concatenate([labels[place] for place in group]),
            }


def start(training: dict) -> str:
    """Return the command that trains."""
    if not training["gpus"]:
        return "axolotl train train.yaml"
    processes = f"--nproc-per-node={training['gpus']}"
    if training["nodes"] > 1:
        processes = (
            f"--nnodes={training['nodes']} --rdzv-backend=c10d --rdzv-endpoint=…:29500 {processes}"
        )
    return f"axolotl train train.yaml --launcher torchrun -- {processes}"


def settings(run: frameworks.Run, place: str) -> tuple[dict, list[str]]:
    """Return its settings for the same training, and a note for each thing that they do not say.

    ``place``: the directory of what it makes.
    """
    training, notes = run.training, frameworks.unsaid(run.training, LACKING)
    notes += frameworks.today_alone(run)
    values = {
        "base_model": "./model",
        "trust_remote_code": run.base["trust_remote_code"],
        # Tokenised already, so without a type.
        "datasets": [{"path": "./dataset", "split": "train", "type": None}],
        "dataset_prepared_path": f"{place}/prepared",
        "val_set_size": 0.0,
        "sequence_len": run.length,
        "sample_packing": run.masks,
        "sample_packing_sequentially": run.masks,
        "pad_to_sequence_len": True,
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,  # one after the other
        "output_dir": f"{place}/trained",
    }
    if training["mode"] == "lora":
        values |= adapter(run)
    values |= {
        "micro_batch_size": training["micro_batch_size"],
        "gradient_accumulation_steps": derived.accumulation(training),
        "num_epochs": run.epochs,
    }
    if training["steps"] is not None:
        values["max_steps"] = training["steps"]
    values |= {
        "learning_rate": training["learning_rate"],
        "lr_scheduler": training["scheduler"],
        "warmup_steps": training["warmup_steps"],
        "optimizer": "adamw_torch",
        "weight_decay": training["weight_decay"],
        "adam_beta2": training["adam_beta2"],
        "max_grad_norm": training["max_grad_norm"],
        "bf16": training["precision"] == "bf16",
        "fp16": training["precision"] == "fp16",
        "tf32": False,
        "attn_implementation": training["attention"],
        "gradient_checkpointing": training["gradient_checkpointing"],
        "seed": training["seed"],
        "logging_steps": training["logging_steps"],
        "save_steps": training["save_steps"],
        "save_total_limit": training["save_total_limit"],
    }
    if training["gradient_checkpointing"]:
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
        values["activation_offloading"] = training["activation_offload"]
    if training["loss"] == "liger":
        values["plugins"] = ["axolotl.integrations.liger.LigerPlugin"]
        values["liger_fused_linear_cross_entropy"] = True
    if training["report_to"] == "tensorboard":
        values["use_tensorboard"] = True
    if training["report_to"] == "wandb":
        values["wandb_project"] = "longyarn"
    if training["gpus"]:
        values["deepspeed"] = "deepspeed.json"
    notes += differences(training)
    if training["sp_size"] > 1:
        values["context_parallel_size"] = training["sp_size"]
    return values, notes


def differences(training: dict) -> list[str]:
    """Return a note for each thing that it does in another way."""
    found = []
    if not training["gpus"]:
        found.append(f"training.gpus 0 cannot be expressed: {NAME} trains on GPUs")
    if training["sp_size"] > 1:
        found.append(
            "training.sp_size shares sequences by ring attention there, not by DeepSpeed Ulysses"
        )
    if training["loss"] == "chunked":
        found.append(
            "training.loss chunked cannot be expressed, so all logits of a sequence are held; "
            "training.loss liger saves that memory"
        )
    return found


def adapter(run: frameworks.Run) -> dict:
    """Return its settings for the same adapter."""
    lora = run.training["lora"]
    targets, whole, tied = frameworks.modules(run)
    found = {
        "adapter": "lora",
        "lora_r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": float(lora["dropout"]),
        "peft_use_rslora": lora["rslora"],
        "lora_target_modules": targets,
    }
    if whole:
        found["lora_modules_to_save"] = whole
    if tied:
        found["peft_ensure_weight_tying"] = True
    return found


if __name__ == "__main__":
    program(main)()
