"""Check what an image needs to train on GPUs.

Run it inside the image, on a machine like the one that will train:

    apptainer exec --nv IMAGE python containers/check.py

A check that cannot run on this machine is `unproved`. The exit code is 1 if a check fails.
"""

import argparse
import importlib.util
import sys

import torch


class Unproved(Exception):
    """A check that cannot run on this machine; the message says why."""


def main() -> None:
    """Print one line for each check: ok, unproved or error."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    failed = False
    for check in (torch_sees_the_gpus, flash_attention, deepspeed_compiles, gpus_talk):
        name = check.__name__.replace("_", " ")
        try:
            print(f"ok        {name}: {check()}")
        except Unproved as reason:
            print(f"unproved  {name}: {reason}")
        except Exception as error:
            failed = True
            print(f"error     {name}: {type(error).__name__}: {error}")
    sys.exit(1 if failed else 0)


def need_gpus(count: int) -> None:
    """Raise Unproved where torch has no CUDA or sees fewer GPUs."""
    if torch.version.cuda is None:
        raise Unproved(f"torch {torch.__version__} is a build for the CPU")
    if torch.cuda.device_count() < count:
        raise Unproved(f"needs {count} GPU, and {torch.cuda.device_count()} can be seen here")


def torch_sees_the_gpus() -> str:
    """Multiply on every GPU."""
    need_gpus(1)
    for index in range(torch.cuda.device_count()):
        ones = torch.ones(256, 256, device=f"cuda:{index}", dtype=torch.bfloat16)
        assert (ones @ ones).float().mean().item() == 256
    return (
        f"torch {torch.__version__}, {torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    )


def flash_attention() -> str:
    """Compare FlashAttention with torch's own attention, causal, in bf16."""
    if importlib.util.find_spec("flash_attn") is None:
        raise Unproved("flash-attn is in the CUDA image only")
    need_gpus(1)
    from flash_attn import __version__, flash_attn_func

    query, key, value = torch.randn(3, 1, 512, 8, 64, device="cuda", dtype=torch.bfloat16)
    ours = flash_attn_func(query, key, value, causal=True)
    parts = (part.transpose(1, 2) for part in (query, key, value))
    torchs = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
    difference = (ours - torchs.transpose(1, 2)).abs().max().item()
    assert difference < 0.05, f"differs from torch's attention by {difference}"
    return f"flash-attn {__version__}, largest difference {difference:.3g}"


def deepspeed_compiles() -> str:
    """Compile and load DeepSpeed's optimizer for the GPU, which takes nvcc and some minutes."""
    need_gpus(1)
    from deepspeed.ops.op_builder import FusedAdamBuilder

    FusedAdamBuilder().load()
    return "fused Adam"


def gpus_talk() -> str:
    """Add over all GPUs with NCCL, one thread each."""
    need_gpus(2)
    from torch.cuda import nccl

    count = torch.cuda.device_count()
    parts = [torch.ones(4, device=f"cuda:{index}") for index in range(count)]
    nccl.all_reduce(parts)
    assert all(part.tolist() == [count] * 4 for part in parts)
    return f"NCCL over {count} GPUs"


if __name__ == "__main__":
    main()
