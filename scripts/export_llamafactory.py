"""Hand a run over to LLaMA-Factory: the patched model, the packed sequences and the same settings.

It trains as its stage `sft`, because its pre-training makes the labels by itself and lets documents see
one another. Its packing without cross-attention (`neat_packing`) takes each document's number as the
attention mask, 0 for padding, and positions that restart.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from longyarn.config import derived
from longyarn.core.errors import UserError, program
from longyarn.training import frameworks

NAME = "LLaMA-Factory"
VERSION = "0.9.5"  # whose source this follows
MULTIPLE = 8  # its collator pads to this, but not the positions
# Where it says what our section `training` says; none: it cannot.
THEIRS = {
    "mode": "finetuning_type", "steps": "max_steps", "epochs": "num_train_epochs",
    "learning_rate": "learning_rate", "scheduler": "lr_scheduler_type",
    "warmup_steps": "warmup_steps", "weight_decay": "weight_decay", "adam_beta2": "adam_beta2",
    "max_grad_norm": "max_grad_norm", "batch_size": "gradient_accumulation_steps",
    "micro_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "disable_gradient_checkpointing", "activation_offload": None,
    "loss": "enable_liger_kernel", "precision": "bf16, fp16", "attention": "flash_attn",
    "nodes": "NNODES", "gpus": "NPROC_PER_NODE", "zero_stage": "deepspeed", "offload": "deepspeed",
    "overlap_communication": "deepspeed", "sp_size": None, "threads": "OMP_NUM_THREADS",
    "seed": "seed", "logging_steps": "logging_steps", "save_steps": "save_steps",
    "save_minutes": None, "save_total_limit": "save_total_limit", "held_out_steps": None,
    "early_stopping": None, "report_to": "report_to", "lora.rank": "lora_rank",
    "lora.alpha": "lora_alpha", "lora.dropout": "lora_dropout", "lora.rslora": "use_rslora",
    "lora.targets": "lora_target", "lora.train_embeddings": "additional_target",
    "lora.train_norms": "additional_target", "lora.train_output_head": "additional_target",
}  # fmt: skip
# What it has not, with the value at which that says nothing.
LACKING = {
    "activation_offload": False, "sp_size": 1, "save_minutes": None, "held_out_steps": None,
    "early_stopping": None,
}  # fmt: skip
ATTENTION = {"sdpa": "sdpa", "flash_attention_2": "fa2", "eager": "disabled"}
HEAD = [
    f"Written by Longyarn for {NAME} {VERSION}; README.md beside it says how to start it.",
    "No rope_scaling: model/config.json has the new RoPE already.",
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
        dataset=(columns(run), sequences(run), len(run.data)),
        training=alone(run.training),
        command=start(run.training),
    )


def columns(run: frameworks.Run) -> list[str]:
    """Return the columns of the dataset."""
    return ["input_ids", "attention_mask", "labels"] + ["position_ids"] * run.masks


def sequences(run: frameworks.Run) -> Iterator[dict]:
    """Yield each packed sequence as the collator of its stage `sft` takes it."""
    import numpy as np

    more = -run.length % MULTIPLE
    for row in range(len(run.data)):
        item = {key: value.numpy() for key, value in run.data[row].items()}
        mask = np.zeros(run.length, dtype=np.int32)
        for number, (place, padding) in enumerate(run.pieces(row), start=1):
            mask[place] = 0 if padding else number if run.masks else 1
        item |= {"attention_mask": mask}
        empty = {"labels": frameworks.IGNORED}
        yield {
            key: np.pad(item[key], (0, more), constant_values=empty.get(key, 0)).astype(np.int32)
            for key in columns(run)
        }


def start(training: dict) -> str:
    """Return the command that trains: DeepSpeed wants torchrun for one process too."""
    command = "llamafactory-cli train train.yaml"
    if not training["gpus"]:
        return f"OMP_NUM_THREADS={training['threads']} {command}"
    nodes = ""
    if training["nodes"] > 1:
        nodes = f"NNODES={training['nodes']} NODE_RANK=… MASTER_ADDR=… MASTER_PORT=29500 "
    return f"FORCE_TORCHRUN=1 {nodes}NPROC_PER_NODE={training['gpus']} {command}"


def alone(training: dict) -> dict:
    """Return section `training` for processes that share no sequence, so that the batch stays the same."""
    sharing, count = training["sp_size"], derived.processes(training)
    once = training["micro_batch_size"] * count
    if sharing > 1 and training["batch_size"] % once:
        raise UserError(
            f"training.sp_size {sharing} cannot be expressed, because {NAME} shares no sequences: {count} "
            f"processes read at least {once} at a time, by which training.batch_size "
            f"{training['batch_size']} cannot be divided; set it to a multiple"
        )
    return training | {"sp_size": 1, "gradient_accumulation_steps": None}


def settings(run: frameworks.Run, place: str) -> tuple[dict, list[str]]:
    """Return its arguments for the same training, and a note for each thing that they do not say.

    ``place``: the directory of what it makes.
    """
    training, notes = run.training, frameworks.unsaid(run.training, LACKING)
    notes += frameworks.today_alone(run)
    values = {
        "model_name_or_path": "model",
        "trust_remote_code": run.base["trust_remote_code"],
        "stage": "sft",
        "do_train": True,
        "template": "empty",
        "dataset": "longyarn",  # asked for; what is read is the next
        "tokenized_path": "dataset",
        "cutoff_len": run.length,
        "packing": True,
        "neat_packing": run.masks,
        "disable_shuffling": True,
        "output_dir": f"{place}/trained",
        "finetuning_type": training["mode"],
    }
    if training["mode"] == "lora":
        values |= adapter(run, notes)
    values |= {
        "per_device_train_batch_size": training["micro_batch_size"],
        "gradient_accumulation_steps": derived.accumulation(alone(training)),
        "num_train_epochs": run.epochs,
    }
    if training["steps"] is not None:
        values["max_steps"] = training["steps"]
    values |= {
        "learning_rate": training["learning_rate"],
        "lr_scheduler_type": training["scheduler"],
        "warmup_steps": training["warmup_steps"],
        "weight_decay": training["weight_decay"],
        "adam_beta2": training["adam_beta2"],
        "max_grad_norm": training["max_grad_norm"],
        "bf16": training["precision"] == "bf16",
        "fp16": training["precision"] == "fp16",
        "flash_attn": ATTENTION.get(training["attention"], "sdpa"),
        "disable_gradient_checkpointing": not training["gradient_checkpointing"],
        "use_reentrant_gc": False,
        "enable_liger_kernel": training["loss"] == "liger",
        "dataloader_drop_last": True,
        "seed": training["seed"],
        "logging_steps": training["logging_steps"],
        "logging_first_step": True,
        "save_steps": training["save_steps"],
        "save_total_limit": training["save_total_limit"],
        "report_to": training["report_to"],
    }
    if training["gpus"]:
        values["deepspeed"] = "deepspeed.json"
    else:
        values["use_cpu"] = True
    if training["attention"] not in ATTENTION:
        notes.append(
            f"training.attention {training['attention']} cannot be expressed; sdpa is written"
        )
    if training["gpus"] and training["precision"] == "fp32":
        notes.append(
            "training.precision fp32 cannot be expressed on GPUs, where it loads weights in 16 bits"
        )
    if training["loss"] == "chunked":
        notes.append(
            "training.loss chunked cannot be expressed, so all logits of a sequence are held; "
            "enable_liger_kernel saves that memory"
        )
    return values, notes


def adapter(run: frameworks.Run, notes: list[str]) -> dict:
    """Return its arguments for the same adapter; add to ``notes`` what they do not say."""
    lora = run.training["lora"]
    targets, whole, tied = frameworks.modules(run)
    if tied:
        notes.append(
            "the embedding is this base's output head too, and it trains them apart, so what it gives cannot "
            "be brought back with training.lora.train_embeddings"
        )
    found = {
        "lora_rank": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "use_rslora": lora["rslora"],
        "lora_target": ",".join(targets),
    }
    return found | ({"additional_target": ",".join(whole)} if whole else {})


if __name__ == "__main__":
    program(main)()
