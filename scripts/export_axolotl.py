"""Export a run to Axolotl: the patched model, the packed sequences and the same settings.

    python scripts/export_axolotl.py --settings '{"mode": "lora", …}' \\
        --base results/micro/base.json --rope results/micro/rope/yarn.json \\
        --pack results/micro/pack.json --manifest results/micro/axolotl.json \\
        --output results/micro/axolotl

With document masks, a row of the data set is one piece of a document. Axolotl packs the rows in order, and
because the pieces of a sequence fill it to the token, it makes the run's packed sequences again. It drops
rows without a label, so tokens that are not scored move to the end of a scored piece, where no label sees
them.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from longyarn.config import derived
from longyarn.core.errors import program
from longyarn.data.packed_dataset import IGNORED
from longyarn.training import frameworks, identity
from longyarn.training.inputs import Inputs

NAME = "Axolotl"
VERSION = "0.19.0"  # the version whose source this follows
COLUMNS = ("input_ids", "attention_mask", "labels")
# Settings that it does not have, each with the value that means "not used".
LACKING = {"save_minutes": None, "held_out_steps": None, "early_stopping": None}
HEAD = [
    f"Written by Longyarn for {NAME} {VERSION}. README.md says how to start the training.",
    "No rope_parameters here: model/config.json already has the new RoPE.",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    identity.add_arguments(parser)
    arguments = parser.parse_args()
    inputs = Inputs.read(arguments)
    values, notes = settings(inputs, frameworks.results_directory(arguments.output))
    export = frameworks.Export(
        framework=NAME,
        head=HEAD,
        settings=values,
        notes=notes,
        columns=COLUMNS,
        rows=examples(inputs),
        total=None,
        deepspeed=inputs.settings,
        command=command(inputs.settings),
    )
    frameworks.write(arguments, Path(__file__), inputs, export)


def examples(inputs: Inputs) -> Iterator[dict]:
    """Yield the rows: with document masks the scored pieces, without them whole sequences."""
    import numpy as np

    for row in range(len(inputs.data)):
        item = inputs.data[row]
        ids, labels = item["input_ids"].numpy(), item["labels"].numpy()
        places = [slice(None)]
        if inputs.document_masks:
            places = [place for place, _ in frameworks.pieces(inputs.data, row)]
        scored = [place for place in places if (labels[place] != IGNORED).any()]
        others = [place for place in places if place not in scored]
        groups = [[place] for place in scored or others[:1]]
        groups[-1] += others if scored else others[1:]
        for group in groups:
            yield {
                "input_ids": np.concatenate([ids[place] for place in group]),
                "attention_mask": np.ones(sum(len(ids[place]) for place in group), dtype=np.int32),
                "labels": np.concatenate([labels[place] for place in group]),
            }


def command(training: dict) -> str:
    """Return the command that trains."""
    if not training["gpus"]:
        return "axolotl train train.yaml"
    processes = f"--nproc-per-node={training['gpus']}"
    if training["nodes"] > 1:
        processes = (
            f"--nnodes={training['nodes']} --rdzv-backend=c10d --rdzv-endpoint=…:29500 {processes}"
        )
    return f"axolotl train train.yaml --launcher torchrun -- {processes}"


def settings(inputs: Inputs, results: str) -> tuple[dict, list[str]]:
    """Return Axolotl's settings for the same training, and notes on what they cannot express.

    ``results``: the directory that it writes to.
    """
    training = inputs.settings
    values = {
        "base_model": "./model",
        "trust_remote_code": inputs.base["trust_remote_code"],
        # No type, because the data set is tokenized already.
        "datasets": [{"path": "./dataset", "split": "train", "type": None}],
        "dataset_prepared_path": f"{results}/prepared",
        "val_set_size": 0.0,
        "sequence_len": inputs.length,
        "sample_packing": inputs.document_masks,
        "sample_packing_sequentially": inputs.document_masks,
        "pad_to_sequence_len": True,
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,  # in order
        "output_dir": f"{results}/trained",
    }
    if training["mode"] == "lora":
        values |= adapter(inputs)
    values |= {
        "micro_batch_size": training["micro_batch_size"],
        "gradient_accumulation_steps": derived.accumulation(training),
        "num_epochs": frameworks.epochs(inputs),
    }
    if training["steps"] is not None:
        values["max_steps"] = training["steps"]
    values |= of_the_trainer(training) | where_used(training)
    return values, frameworks.needs_transformers5(inputs) + differences(training)


def of_the_trainer(training: dict) -> dict:
    """Return the settings for the optimizer, precision, logs and checkpoints."""
    return {
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


def where_used(training: dict) -> dict:
    """Return the settings that Axolotl's file has only where they are used."""
    values = {}
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
    if training["sp_size"] > 1:
        values["context_parallel_size"] = training["sp_size"]
    return values


def differences(training: dict) -> list[str]:
    """Return a note for each setting that it cannot express or applies in another way."""
    notes = frameworks.not_expressed(training, LACKING)
    if not training["gpus"]:
        notes.append(f"training.gpus 0 cannot be expressed: {NAME} trains on GPUs")
    if training["sp_size"] > 1:
        notes.append(
            "training.sp_size shares sequences by ring attention there, not by DeepSpeed Ulysses"
        )
    if training["loss"] == "chunked":
        notes.append(
            "training.loss chunked cannot be expressed, so all logits of a sequence are in memory at "
            "once; training.loss liger avoids that"
        )
    return notes


def adapter(inputs: Inputs) -> dict:
    """Return the settings for the same adapter."""
    lora = inputs.settings["lora"]
    targets, whole, tied = frameworks.trained_modules(inputs)
    values = {
        "adapter": "lora",
        "lora_r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": float(lora["dropout"]),
        "peft_use_rslora": lora["rslora"],
        "lora_target_modules": targets,
    }
    if whole:
        values["lora_modules_to_save"] = whole
    if tied:
        values["peft_ensure_weight_tying"] = True
    return values


if __name__ == "__main__":
    program(main)()
