"""DeepSpeed: its configuration, the device, and the group of training processes.

FSDP2 is not offered as a second engine. transformers saves its checkpoints in another format, for other
world sizes, and none of the guards and none of the resuming has been shown to work with it.
"""

import os
import sys
from collections.abc import Callable

from longyarn.config import derived
from longyarn.core.errors import UserError


def configuration(settings: dict) -> dict:
    """Return DeepSpeed's configuration for config section `training`."""
    zero = {
        "stage": settings["zero_stage"],
        "overlap_comm": settings["overlap_communication"] and settings["gpus"] > 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    in_host_memory = {"device": "cpu", "pin_memory": settings["gpus"] > 0}
    if settings["offload"] != "none":
        zero["offload_optimizer"] = in_host_memory
    if settings["offload"] == "all":
        zero["offload_param"] = in_host_memory
    return {
        "train_micro_batch_size_per_gpu": settings["micro_batch_size"],
        "gradient_accumulation_steps": derived.accumulation(settings),
        "gradient_clipping": settings["max_grad_norm"],
        "bf16": {"enabled": settings["precision"] == "bf16"},
        "fp16": {"enabled": settings["precision"] == "fp16"},
        "zero_optimization": zero,
        # torch's AdamW also runs on the host; DeepSpeed's own would have to be compiled there.
        "zero_force_ds_cpu_optimizer": False,
    }


def choose_device(settings: dict) -> None:
    """Hide the GPUs from a run on the CPU. Call it before torch or DeepSpeed is imported."""
    if not settings["gpus"]:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def start_process_group(settings: dict) -> None:
    """Start this process's part of the process group; raise ``UserError`` if GPUs are missing."""
    import deepspeed
    import torch

    if settings["gpus"] > torch.cuda.device_count():
        raise UserError(
            f"training.gpus is {settings['gpus']}, but this machine shows {torch.cuda.device_count()}; "
            "lower it, or set 0 for the CPU"
        )
    if not settings["gpus"]:
        # torch's own collectives are enough; DeepSpeed would compile its shared-memory ones here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if settings["gpus"] else "gloo", verbose=False)


def end_process_group() -> None:
    """Wait for all processes, then leave the process group."""
    import torch

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def from_first_process(choose: Callable[[], object]):
    """Call ``choose`` in the first process only, and return its result in every process.

    The files on disk may change between two looks, so processes that each looked could disagree.
    """
    import torch

    chosen = [choose() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(chosen)
    return chosen[0]


def say(line: str) -> None:
    """Print a line of progress to stderr, from the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(line, file=sys.stderr, flush=True)
