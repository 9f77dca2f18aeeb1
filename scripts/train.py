"""Continued pre-training at full length: transformers' Trainer on DeepSpeed, LoRA or full.

Started by scripts/launch.py, one process a GPU, or one a machine on the CPU. Checkpoints go to a work
directory named by the hash of all that defines the run, so a rerun goes on where the last one stopped
and a changed setting never resumes from a stale state; each attempt writes in its own part of it.
Before the first step two guards run: the model rotates as the RoPE manifest says, and document masks
really hide one piece from the next.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from longyarn import adapters, attempts, batches, manifest, models, packing
from longyarn.cli import UserError, program, set_up_torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="manifest of the base model")
    parser.add_argument("--rope", type=Path, required=True, help="manifest of the RoPE settings")
    parser.add_argument("--pack", type=Path, required=True, help="manifest of the packed sequences")
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="config section `training`, as JSON"
    )
    parser.add_argument("--work", type=Path, required=True, help="root of work directories")
    parser.add_argument("--minutes", type=float, default=60, help="minutes that the job asked for")
    parser.add_argument(
        "--minutes-are-a-limit", action="store_true", help="the job is ended after its minutes"
    )
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()
    settings = arguments.settings

    if not settings["gpus"]:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    set_up_torch(settings["threads"])
    import deepspeed
    import torch
    import transformers

    from longyarn import guards, stopping

    time_limit = stopping.deadline(arguments.minutes) if arguments.minutes_are_a_limit else None
    if settings["gpus"] > torch.cuda.device_count():
        raise UserError(
            f"training.gpus is {settings['gpus']}, but this machine shows {torch.cuda.device_count()}; "
            "lower it, or set 0 for the CPU"
        )
    if not settings["gpus"]:
        # torch's own collectives will do; DeepSpeed would compile shared-memory ones at this point.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if settings["gpus"] else "gloo", verbose=False)

    base = manifest.read(arguments.base)
    rope = manifest.read_facts(arguments.rope)
    pack = manifest.read(arguments.pack)
    work = arguments.work / run_hash(arguments)
    attempt = chosen_by_one(lambda: attempts.claim(work))
    data = Packed(
        arguments.pack.parent / next(iter(pack["files"])), pack["facts"]["document_masks"]
    )
    training = training_arguments(settings, attempt)
    transformers.set_seed(settings["seed"])
    try:
        model = models.load_model(
            arguments.base.parent / base["facts"]["directory"],
            arguments.rope,
            dtype="fp32" if settings["mode"] == "full" else settings["precision"],
            attention=settings["attention"],
            trust_remote_code=base["facts"]["trust_remote_code"],
        )
    except ImportError as error:
        raise UserError(
            f"training.attention {settings['attention']} cannot be used here ({error}); install it or "
            "set sdpa"
        ) from None
    model.config.use_cache = False
    if settings["mode"] == "lora":
        model = adapters.attach(model, settings["lora"])
        model.base_model.model.config.use_cache = False
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    checks = guards.Guards(rope, pack["facts"]["document_masks"])
    stop = stopping.Stopping(attempt, time_limit)
    trainer = transformers.Trainer(
        model=model, args=training, train_dataset=data, callbacks=[checks, guards.Lines(), stop]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    last = chosen_by_one(lambda: attempts.last_checkpoint(work))
    if last:
        guards.say(f"train: resuming from {attempts.describe(last)}")
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    stop.end(training.device)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]

    # Every process takes part in gathering the weights; the first one writes the payload.
    staged = attempt / "final"
    trainer.save_model(str(staged))
    stop.agree(training.device)  # saving may have taken minutes
    if trainer.is_world_process_zero():
        steps = trainer.state.global_step
        publish(arguments, staged, model, base, settings)
        facts = {
            "directory": arguments.output.name,
            "mode": settings["mode"],
            "steps": steps,
            "sequences_seen": steps * settings["batch_size"],
            "tokens_seen": steps * settings["batch_size"] * pack["facts"]["sequence_length"],
            "epochs": steps * settings["batch_size"] / pack["facts"]["sequences"],
            "trainable_parameters": trainable,
            "world_size": training.world_size,
            "gradient_accumulation_steps": training.gradient_accumulation_steps,
            "loss": [[entry["step"], entry["loss"]] for entry in history],
            "guards": checks.passed,
        }
        files = sorted(p for p in arguments.output.iterdir())
        manifest.write(
            arguments.manifest,
            script=Path(__file__),
            settings=settings,
            inputs={"base": arguments.base, "rope": arguments.rope, "pack": arguments.pack},
            files=files,
            facts=facts,
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_hash(arguments: argparse.Namespace) -> str:
    """Return the name of the work directory: a hash of settings, inputs, code and the run's name."""
    parts = {
        "settings": arguments.settings,
        "base": manifest.sha256(arguments.base),
        "rope": manifest.sha256(arguments.rope),
        "pack": manifest.sha256(arguments.pack),
        "code": manifest.code_hash(Path(__file__)),
        # Two runs that differ in their evaluation alone must not take each other for an attempt.
        "run": str(arguments.manifest),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def chosen_by_one(choose):
    """Return what ``choose`` gives in the first process, in every process.

    What lies on disk may change between two looks, so that each for itself could see another thing.
    """
    import torch

    chosen = [choose() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(chosen)
    return chosen[0]


class Packed:
    """The packed sequences as a dataset; each item is one sequence of token, position and label ids.

    No attention_mask is given: with positions that restart at each piece, transformers derives the
    document mask, but only where no mask is passed. The first token of a piece is no label, because
    what precedes it belongs to another document.
    """

    def __init__(self, path: Path, document_masks: bool) -> None:
        from safetensors import safe_open

        self.file = safe_open(path, framework="numpy")
        self.input_ids = self.file.get_slice("input_ids")
        self.piece_lengths = self.file.get_tensor("piece_lengths")
        self.piece_offsets = self.file.get_tensor("piece_offsets")
        self.document_masks = document_masks

    def __len__(self) -> int:
        return len(self.piece_offsets) - 1

    def __getitem__(self, index: int) -> dict:
        import torch

        lengths = self.piece_lengths[self.piece_offsets[index] : self.piece_offsets[index + 1]]
        input_ids = torch.from_numpy(self.input_ids[index : index + 1][0].astype("int64"))
        position_ids = torch.from_numpy(packing.positions(lengths, self.document_masks))
        labels = input_ids.masked_fill(position_ids == 0, -100)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def deepspeed_config(settings: dict) -> dict:
    """Return DeepSpeed's configuration for these settings."""
    return {
        "train_micro_batch_size_per_gpu": settings["micro_batch_size"],
        "gradient_accumulation_steps": batches.accumulation(settings),
        "gradient_clipping": settings["max_grad_norm"],
        "bf16": {"enabled": settings["precision"] == "bf16"},
        "fp16": {"enabled": settings["precision"] == "fp16"},
        "zero_optimization": {
            "stage": settings["zero_stage"],
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


def training_arguments(settings: dict, attempt: Path):
    """Return transformers' TrainingArguments; DeepSpeed's configuration is written beside the run."""
    from transformers import TrainingArguments

    engine = deepspeed_config(settings)
    manifest.write_json(attempt / "deepspeed.json", engine)
    return TrainingArguments(
        output_dir=str(attempt),
        max_steps=settings["steps"] or -1,
        num_train_epochs=settings["epochs"] or 1,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["scheduler"],
        warmup_steps=settings["warmup_steps"],
        weight_decay=settings["weight_decay"],
        adam_beta2=settings["adam_beta2"],
        max_grad_norm=settings["max_grad_norm"],
        per_device_train_batch_size=settings["micro_batch_size"],
        gradient_accumulation_steps=engine["gradient_accumulation_steps"],
        activation_checkpointing=settings["gradient_checkpointing"],
        activation_checkpointing_kwargs={"use_reentrant": False},
        bf16=settings["precision"] == "bf16",
        fp16=settings["precision"] == "fp16",
        use_cpu=not settings["gpus"],
        deepspeed=engine,
        # The order of sequences is the pack's, which has its own seed.
        train_sampling_strategy="sequential",
        seed=settings["seed"],
        logging_steps=settings["logging_steps"],
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=settings["save_steps"],
        save_total_limit=attempts.CHECKPOINTS_KEPT,
        dataloader_num_workers=0,
        dataloader_drop_last=True,
        disable_tqdm=not sys.stderr.isatty(),
        report_to="none",
    )


def publish(arguments, staged: Path, model, base: dict, settings: dict) -> None:
    """Copy what was trained from the work directory to the run's payload, checked.

    Only safetensors and JSON: the Trainer's pickled arguments stay behind.
    """
    with manifest.new_directory(arguments.output) as directory:
        for file in [*staged.glob("*.safetensors"), *staged.glob("*.index.json")]:
            shutil.copyfile(file, directory / file.name)
        if settings["mode"] == "lora":
            record = manifest.read_json(staged / "adapter_config.json")
            # PEFT notes the path it loaded from; the source is what means something elsewhere.
            record["base_model_name_or_path"] = base["facts"]["source"]
            record["revision"] = base["facts"]["revision"]
            for key in ("target_modules", "modules_to_save"):
                record[key] = sorted(record[key]) if record[key] else record[key]
            manifest.write_json(directory / "adapter_config.json", record)
            adapters.check_saved(directory, adapters.trained_shapes(model))
        elif not models.tensor_files(directory):
            raise UserError("training saved no weights; see the log above")


if __name__ == "__main__":
    program(main)()
