"""The GPUs of resources/gpus.yaml, and whether the configured one can do what is asked of it."""

import functools

import yaml

from longyarn.cluster import model_shapes
from longyarn.config.phases import configurations, within
from longyarn.core.errors import UserError
from longyarn.core.files import ROOT


def check(config: dict) -> None:
    """Refuse a model.shape or a hardware.gpu that is not listed, or a GPU that cannot run the config."""
    if config["model"]["shape"]:
        model_shapes.named(config["model"]["shape"])
    for name, settings in configurations(config).items():
        try:
            check_hardware(settings)
        except UserError as error:
            raise UserError(f"{within(name)}{error}") from None


def check_hardware(config: dict) -> None:
    """Refuse a GPU that is not listed, or that lacks the configured precision or attention."""
    for section in ("training", "evaluation"):
        if config["training"]["gpus"]:
            gpu_rate(config, config[section]["precision"])
        if config[section]["attention"] == "flash_attention_2":
            check_flash_attention(config, section)


def check_flash_attention(config: dict, section: str) -> None:
    """Refuse FlashAttention-2 where it cannot run. Its README names GPUs of the Ampere generation or newer.

    Those are the GPUs that compute in bf16.
    """
    name, precision = config["hardware"]["gpu"], config[section]["precision"]
    if not config["training"]["gpus"]:
        reason = "training.gpus is 0"
    elif "bf16" not in gpu(config)["tflops"]:
        reason = f"hardware.gpu is {name}"
    elif precision == "fp32":
        reason = f"{section}.precision is fp32"
    else:
        return
    raise UserError(
        f"{section}.attention flash_attention_2 needs a GPU of the Ampere generation or newer, and "
        f"bf16 or fp16, but {reason}; fix that or choose sdpa"
    )


@functools.cache
def known_gpus() -> dict:
    """Return resources/gpus.yaml."""
    return yaml.safe_load((ROOT / "resources/gpus.yaml").read_text(encoding="utf-8"))


def gpu(config: dict) -> dict:
    """Return the entry of ``hardware.gpu`` in resources/gpus.yaml."""
    name = config["hardware"]["gpu"]
    if name not in known_gpus():
        raise UserError(
            f"hardware.gpu {name} is not in resources/gpus.yaml, which has {', '.join(known_gpus())}; "
            "choose one, or add yours with its memory and peak"
        )
    return known_gpus()[name]


def gpu_rate(config: dict, precision: str) -> float:
    """Return the operations a second that one GPU is taken to reach at a precision."""
    return gpu_peak(config, precision) * config["hardware"]["utilisation"]


def gpu_peak(config: dict, precision: str) -> float:
    """Return the operations a second that one GPU could do at a precision."""
    peaks = gpu(config)["tflops"]
    if precision not in peaks:
        raise UserError(
            f"hardware.gpu {config['hardware']['gpu']} has no {precision}; choose one of "
            f"{', '.join(peaks)} for training.precision and evaluation.precision, or another GPU"
        )
    return peaks[precision] * 1e12
