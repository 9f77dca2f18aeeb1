"""Export a run to LLaMA-Factory: the patched model, the packed sequences and the same settings.

    python scripts/export_llamafactory.py --settings '{"mode": "lora", …}' \\
        --base results/micro/base.json --rope results/micro/rope/yarn.json \\
        --pack results/micro/pack.json --manifest results/micro/llamafactory.json \\
        --output results/micro/llamafactory

The exported run trains as LLaMA-Factory's stage `sft`, because its stage `pt` makes the labels itself and
masks no documents. With `neat_packing` it takes each document's number as the attention mask, 0 for
padding, and positions that restart.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from longyarn.config import derived
from longyarn.core.errors import UserError, program
from longyarn.data.packed_dataset import IGNORED
from longyarn.training import frameworks, identity
from longyarn.training.inputs import Inputs

NAME = "LLaMA-Factory"
VERSION = "0.9.5"  # the version whose source this follows
MULTIPLE = 8  # its collator pads to a multiple of this, except for the positions
# Settings that it does not have, each with the value that means "not used".
LACKING = {
    "activation_offload": False, "sp_size": 1, "save_minutes": None, "held_out_steps": None,
    "early_stopping": None,
}  # fmt: skip
ATTENTION = {"sdpa": "sdpa", "flash_attention_2": "fa2", "eager": "disabled"}
HEAD = [
    f"Written by Longyarn for {NAME} {VERSION}. README.md says how to start the training.",
    "No rope_scaling here: model/config.json already has the new RoPE.",
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
        columns=columns(inputs),
        rows=sequences(inputs),
        total=len(inputs.data),
        deepspeed=without_sharing(inputs.settings),
        command=command(inputs.settings),
    )
    frameworks.write(arguments, Path(__file__), inputs, export)


def columns(inputs: Inputs) -> list[str]:
    """Return the columns of the data set."""
    return ["input_ids", "attention_mask", "labels"] + ["position_ids"] * inputs.document_masks


def sequences(inputs: Inputs) -> Iterator[dict]:
    """Yield each packed sequence as int32 arrays, in the form that the collator of stage `sft` takes."""
    import numpy as np

    padding_after = -inputs.length % MULTIPLE
    for row in range(len(inputs.data)):
        item = {key: value.numpy() for key, value in inputs.data[row].items()}
        mask = np.zeros(inputs.length, dtype=np.int32)
        for number, (place, padding) in enumerate(frameworks.pieces(inputs.data, row), start=1):
            mask[place] = 0 if padding else number if inputs.document_masks else 1
        item |= {"attention_mask": mask}
        fill = {"labels": IGNORED}
        yield {
            key: np.pad(item[key], (0, padding_after), constant_values=fill.get(key, 0)).astype(
                np.int32
            )
            for key in columns(inputs)
        }


def command(training: dict) -> str:
    """Return the command that trains. DeepSpeed needs torchrun even for one process."""
    train = "llamafactory-cli train train.yaml"
    if not training["gpus"]:
        return f"OMP_NUM_THREADS={training['threads']} {train}"
    nodes = ""
    if training["nodes"] > 1:
        nodes = f"NNODES={training['nodes']} NODE_RANK=… MASTER_ADDR=… MASTER_PORT=29500 "
    return f"FORCE_TORCHRUN=1 {nodes}NPROC_PER_NODE={training['gpus']} {train}"


def without_sharing(training: dict) -> dict:
    """Return section `training` for processes that share no sequences, with the same batch size.

    Raises ``UserError`` if the batch cannot be divided among them.
    """
    sharing, count = training["sp_size"], derived.processes(training)
    at_once = training["micro_batch_size"] * count
    if sharing > 1 and training["batch_size"] % at_once:
        raise UserError(
            f"training.sp_size {sharing} cannot be expressed, because {NAME} shares no sequences: {count} "
            f"processes read at least {at_once} sequences at once, which does not divide "
            f"training.batch_size {training['batch_size']}; set a multiple of {at_once}"
        )
    return training | {"sp_size": 1, "gradient_accumulation_steps": None}


def settings(inputs: Inputs, results: str) -> tuple[dict, list[str]]:
    """Return LLaMA-Factory's arguments for the same training, and notes on what they cannot express.

    ``results``: the directory that it writes to.
    """
    training = inputs.settings
    values = {
        "model_name_or_path": "model",
        "trust_remote_code": inputs.base["trust_remote_code"],
        "stage": "sft",
        "do_train": True,
        "template": "empty",
        "dataset": "longyarn",  # required, but only tokenized_path is read
        "tokenized_path": "dataset",
        "cutoff_len": inputs.length,
        "packing": True,
        "neat_packing": inputs.document_masks,
        "disable_shuffling": True,
        "output_dir": f"{results}/trained",
        "finetuning_type": training["mode"],
    }
    notes = differences(training) + frameworks.needs_transformers5(inputs)
    if training["mode"] == "lora":
        adapter_values, adapter_notes = adapter(inputs)
        values |= adapter_values
        notes += adapter_notes
    values |= {
        "per_device_train_batch_size": training["micro_batch_size"],
        "gradient_accumulation_steps": derived.accumulation(without_sharing(training)),
        "num_train_epochs": frameworks.epochs(inputs),
    }
    if training["steps"] is not None:
        values["max_steps"] = training["steps"]
    return values | of_the_trainer(training), notes


def of_the_trainer(training: dict) -> dict:
    """Return the arguments for the optimizer, precision, memory, logs and checkpoints."""
    return {
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
    } | ({"deepspeed": "deepspeed.json"} if training["gpus"] else {"use_cpu": True})


def differences(training: dict) -> list[str]:
    """Return a note for each setting that it cannot express."""
    notes = frameworks.not_expressed(training, LACKING)
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
            "training.loss chunked cannot be expressed, so all logits of a sequence are in memory at "
            "once; enable_liger_kernel avoids that"
        )
    return notes


def adapter(inputs: Inputs) -> tuple[dict, list[str]]:
    """Return the arguments for the same adapter, and notes on what they cannot express."""
    lora = inputs.settings["lora"]
    targets, whole, tied = frameworks.trained_modules(inputs)
    values = {
        "lora_rank": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "use_rslora": lora["rslora"],
        "lora_target": ",".join(targets),
    }
    if whole:
        values["additional_target"] = ",".join(whole)
    if not tied:
        return values, []
    return values, [
        "the base's embedding is also its output head, and it trains them apart, so with "
        "training.lora.train_embeddings its result cannot be used as training.source"
    ]


if __name__ == "__main__":
    program(main)()
