"""The engine: DeepSpeed's configuration, transformers' arguments, and what must fit together first.

FSDP2 is no second engine here: transformers checkpoints it through torch.distributed.checkpoint, whose
files, world sizes and marker are others, and none of the guards below has been shown to hold for it.
"""

import argparse
import functools
import importlib.util
import json
import os
import sys
from pathlib import Path

from longyarn.config import derived
from longyarn.core import manifest
from longyarn.core.code_hash import code_hash
from longyarn.core.errors import UserError
from longyarn.core.files import write_json

# Settings that watch or keep, and change no weight: a run goes on from its checkpoint when they change.
OBSERVING = (
    "logging_steps", "save_steps", "save_minutes", "save_total_limit", "held_out_steps", "report_to",
)  # fmt: skip
# The facts of each input that training depends on, beside its files; None for all.
OF_INPUTS = {"base": ("trust_remote_code",), "rope": None, "pack": ("document_masks",)}
# Settings that say where a run takes place: its checkpoints fit no other.
PLACEMENT = ("nodes", "gpus", "zero_stage", "sp_size", "offload", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which run it is."""
    parser.add_argument("--base", type=Path, required=True, help="manifest of the base model")
    parser.add_argument("--rope", type=Path, required=True, help="manifest of the RoPE settings")
    parser.add_argument("--pack", type=Path, required=True, help="manifest of the packed sequences")
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="config section `training`, as JSON"
    )
    parser.add_argument("--work", type=Path, required=True, help="root of work directories")


def inputs(arguments: argparse.Namespace) -> dict[str, Path]:
    """Return the manifests of what a run is made from."""
    return {name: getattr(arguments, name) for name in OF_INPUTS}


def defining(settings: dict) -> dict:
    """Return what of config section `training` defines a run, its ``placement`` apart.

    Under a constant learning rate the number of steps does not: more steps go on from a finished run.
    """
    apart = {*OBSERVING, *PLACEMENT}
    if settings["scheduler"] == "constant_with_warmup":
        apart |= {"steps", "epochs"}
    return {
        "settings": {key: value for key, value in settings.items() if key not in apart},
        "placement": {key: settings[key] for key in PLACEMENT},
    }


def identity(settings: dict, inputs: dict[str, Path], trained: Path) -> dict:
    """Return what defines a run: its settings, code and inputs, and its name.

    ``settings`` are config section `training`, ``inputs`` the manifests of base, RoPE and pack,
    ``trained`` the one to be written. Of the inputs their content counts, so a phase that was made
    anew with the same weights is the same start.
    """
    return defining(settings) | {
        "code": code_hash(Path(__file__).parents[2] / "train.py"),
        # Two runs that differ in their evaluation alone must not take each other for an attempt.
        "run": str(trained),
        **{name: manifest.content_hash(path, OF_INPUTS[name]) for name, path in inputs.items()},
    }


def require_packages(settings: dict) -> None:
    """Stop where a package that the settings name is not installed."""
    wanted = {
        ("attention", "flash_attention_2"): ("flash_attn", "install flash-attn or set sdpa"),
        ("loss", "liger"): ("liger_kernel", "install liger-kernel or set chunked"),
        ("report_to", "tensorboard"): ("tensorboard", "install tensorboard or set none"),
        ("report_to", "wandb"): ("wandb", "install wandb or set none"),
    }
    for (key, value), (package, mend) in wanted.items():
        if settings[key] == value and importlib.util.find_spec(package) is None:
            raise UserError(f"training.{key} is {value}, but {package} is not installed; {mend}")


def check_heads(settings: dict, config) -> None:
    """Stop unless the attention heads of a model's configuration can be shared by sp_size processes."""
    count, heads = settings["sp_size"], config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", heads)  # GPT-NeoX has one for each head, unnamed
    if heads % count or (keys % count and count % keys):
        raise UserError(
            f"training.sp_size {count} cannot share {heads} attention heads with {keys} of keys and "
            "values; choose a divisor of both"
        )


def attention(settings: dict, document_masks: bool) -> str:
    """Return transformers' attn_implementation for training."""
    if settings["attention"] == "sdpa" and document_masks:
        from longyarn.training.document_attention import NAME

        return NAME
    return settings["attention"]


def deepspeed_config(settings: dict) -> dict:
    """Return DeepSpeed's configuration for these settings."""
    zero = {
        "stage": settings["zero_stage"],
        "overlap_comm": settings["overlap_communication"] and settings["gpus"] > 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    on_host = {"device": "cpu", "pin_memory": settings["gpus"] > 0}
    if settings["offload"] != "none":
        zero["offload_optimizer"] = on_host
    if settings["offload"] == "all":
        zero["offload_param"] = on_host
    return {
        "train_micro_batch_size_per_gpu": settings["micro_batch_size"],
        "gradient_accumulation_steps": derived.accumulation(settings),
        "gradient_clipping": settings["max_grad_norm"],
        "bf16": {"enabled": settings["precision"] == "bf16"},
        "fp16": {"enabled": settings["precision"] == "fp16"},
        "zero_optimization": zero,
        # torch's AdamW steps on the host too; DeepSpeed's own would have to be compiled there.
        "zero_force_ds_cpu_optimizer": False,
    }


def training_arguments(settings: dict, attempt: Path):
    """Return transformers' TrainingArguments; DeepSpeed's configuration is written beside the run."""
    import torch
    from transformers import TrainingArguments

    engine = deepspeed_config(settings)
    if torch.distributed.get_rank() == 0:  # two writers of one file would take it from each other
        write_json(attempt / "deepspeed.json", engine)
    liger = settings["loss"] == "liger"
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
        parallelism_config=sequence_parallelism(settings),
        use_liger_kernel=liger,
        liger_kernel_config={"fused_linear_cross_entropy": True} if liger else None,
        # The order of sequences is the pack's, which has its own seed.
        train_sampling_strategy="sequential",
        seed=settings["seed"],
        logging_steps=settings["logging_steps"],
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=settings["save_steps"],
        save_total_limit=settings["save_total_limit"],
        dataloader_num_workers=0,
        dataloader_drop_last=True,
        disable_tqdm=not sys.stderr.isatty(),
        report_to=settings["report_to"],
    )


def sequence_parallelism(settings: dict):
    """Return accelerate's ParallelismConfig of DeepSpeed Ulysses, None where sequences are not shared."""
    if settings["sp_size"] == 1:
        return None
    from accelerate import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    return ParallelismConfig(
        sp_size=settings["sp_size"],
        sp_backend="deepspeed",
        sp_handler=DeepSpeedSequenceParallelConfig(
            sp_seq_length_is_variable=True, sp_attn_implementation=settings["attention"]
        ),
    )


def offload_activations(model) -> None:
    """Keep in host memory what ``model``'s forward pass saves for the backward pass.

    With gradient checkpointing that is one input a layer.
    """
    import torch

    forward = model.forward

    @functools.wraps(forward)
    def offloaded(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return forward(*args, **kwargs)

    model.forward = offloaded


def start(settings: dict) -> None:
    """Choose the device and start the process group of this process."""
    import deepspeed
    import torch

    if settings["gpus"] > torch.cuda.device_count():
        raise UserError(
            f"training.gpus is {settings['gpus']}, but this machine shows {torch.cuda.device_count()}; "
            "lower it, or set 0 for the CPU"
        )
    if not settings["gpus"]:
        # torch's own collectives will do; DeepSpeed would compile shared-memory ones at this point.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if settings["gpus"] else "gloo", verbose=False)


def choose_device(settings: dict) -> None:
    """Say by the environment, before torch and DeepSpeed are imported, that there is only the CPU."""
    if not settings["gpus"]:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def chosen_by_one(choose):
    """Return what ``choose`` gives in the first process, in every process.

    What lies on disk may change between two looks, so that each for itself could see another thing.
    """
    import torch

    chosen = [choose() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(chosen)
    return chosen[0]
