"""Whether a plan fits its GPUs, and which changes of the config would make it fit."""

import copy
import functools
import json

from longyarn.cluster import estimate, hardware, job_resources
from longyarn.cluster.plan_table import shape_of
from longyarn.config.checks import check, instruments
from longyarn.config.phases import phases
from longyarn.core.errors import UserError


def check_fit(config: dict) -> None:
    """Refuse a plan whose training or evaluation does not fit its GPUs, and name what would fit."""
    if not config["training"]["gpus"]:
        return
    name, size = config["hardware"]["gpu"], hardware.gpu(config)["gib"]
    if lacking(config) > 0 and not config["training"]["source"]:
        parts = estimate.memory(shape_of(config), estimate.Setup.of(config))
        most = max(parts, key=parts.get)
        raise UserError(
            f"training needs {lacking(config) + size:.1f} GiB of each GPU, most of it for {most} "
            f"({parts[most] / estimate.GIB:.1f}), but hardware.gpu {name} has {size:g}; {advice(config)}"
        )
    for phase, settings in phases(config).items():
        if phase and lacking(settings) > 0:
            raise UserError(
                f"{phase.strip('/')} needs {lacking(settings) + size:.1f} GiB of each GPU, but "
                f"hardware.gpu {name} has {size:g}; give it settings that need less, as the run itself has"
            )
    count = job_resources.evaluation_gpus(config, shape_of(config))
    need = job_resources.evaluation_memory(config, shape_of(config), count) / estimate.GIB
    if need > size:
        raise UserError(
            f"evaluation needs {need:.1f} GiB of each of {count} GPUs, but hardware.gpu {name} has "
            f"{size:g}; shorten evaluation.*.lengths, or choose evaluation.precision bf16, "
            "evaluation.attention flash_attention_2 or a larger GPU"
        )


def lacking(config: dict) -> float:
    """Return the GiB that training lacks on each GPU; negative if it fits."""
    parts = estimate.memory(shape_of(config), estimate.Setup.of(config))
    return estimate.peak(parts) / estimate.GIB - hardware.gpu(config)["gib"]


def advice(config: dict) -> str:
    """Return changes of the config with which training fits by the same estimate, the mildest first."""
    changed, changes = config, []
    for remedy in remedies(config):
        tried = apply(changed, [remedy])
        if tried and lacking(tried) < lacking(changed) - 0.05:
            changed, changes = tried, [*changes, remedy]
        if lacking(changed) <= 0:
            break
    else:
        return "nothing in the config makes it fit"
    for remedy in changes[:-1]:  # leave out one that a later one made unnecessary
        fewer = [other for other in changes if other is not remedy]
        without = apply(config, fewer)
        if without and lacking(without) <= 0:
            changed, changes = without, fewer
    stated = {key: value for remedy in changes for key, value in remedy.items()}
    words = ", ".join(
        f"{key} {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in stated.items()
        if at(config, key) != value
    )
    fits = lacking(changed) + hardware.gpu(changed)["gib"]
    return f"it would fit, in {fits:.1f} GiB, with {words}"


def remedies(config: dict) -> list[dict]:
    """Return changes to try, those that do not change the result first, then more machines, then the rest."""
    training, target = config["training"], config["rope"]["target_length"]
    found = [
        {"training.gradient_checkpointing": True},
        {"training.loss": "chunked"},
        {"training.micro_batch_size": 1},
    ]
    if "bf16" in hardware.gpu(config)["tflops"]:
        # FlashAttention needs the same GPUs as bf16 does, and does not compute in fp32.
        kernels = [{"training.attention": "flash_attention_2"}, {"training.precision": "bf16"}]
        found += reversed(kernels) if training["precision"] == "fp32" else kernels
    found += [
        {"training.zero_stage": 3},
        {"training.gradient_checkpointing": True, "training.activation_offload": True},
        {"training.zero_stage": max(1, training["zero_stage"]), "training.offload": "optimizer"},
    ]
    found += [
        {"training.gpus": n, "training.zero_stage": 3} for n in (2, 4, 8) if n > training["gpus"]
    ]
    found += [
        {"training.nodes": n, "training.zero_stage": 3} for n in (2, 4, 8) if n > training["nodes"]
    ]
    heads = shape_of(config).num_attention_heads
    found += [
        {"training.sp_size": n, "training.zero_stage": 3} for n in (2, 4, 8) if heads % n == 0
    ]
    found.append({"training.offload": "all", "training.zero_stage": 3})
    larger = {
        entry["gib"]: name
        for name, entry in hardware.known_gpus().items()
        if entry["gib"] > hardware.gpu(config)["gib"] and training["precision"] in entry["tflops"]
    }
    found += [{"hardware.gpu": larger[size]} for size in sorted(larger)]
    found.append({"training.mode": "lora"})
    lengths = [target // 2**power for power in range(1, 8) if target // 2**power >= 512]
    return found + [shortened(config, length) for length in lengths]


def shortened(config: dict, target: int) -> dict:
    """Return the change to a shorter context, with the settings that were stated for a longer one."""
    changes = {"rope.target_length": target}
    if config["rope"]["factor"]:
        changes["rope.factor"] = None
    others = [f"perplexity.{protocol}" for protocol in ("truncate", "sliding")]
    for section in (*instruments(config["evaluation"]), *others):
        lengths = (at(config, f"evaluation.{section}") or {}).get("lengths") or []
        if lengths and max(lengths) > target:
            kept = [length for length in lengths if length < target]
            changes[f"evaluation.{section}.lengths"] = [*kept, target]
    return changes


def at(config: dict, key: str):
    """Return the value of a config at a dotted key."""
    return functools.reduce(dict.__getitem__, key.split("."), config)


def apply(config: dict, changes: list[dict]) -> dict | None:
    """Return the config with dotted keys set, or None if a run would refuse it."""
    changed = copy.deepcopy(config)
    for key, value in (item for change in changes for item in change.items()):
        section, _, name = key.rpartition(".")
        at(changed, section)[name] = value
    try:
        check(changed)
        hardware.check(changed)
    except UserError:
        return None
    return changed
