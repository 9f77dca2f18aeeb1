"""The model to train: base weights with the new RoPE, its attention and loss, and a fresh adapter."""

import functools
import importlib.util

from longyarn.core.errors import UserError
from longyarn.models import loading, lora
from longyarn.training import chunked_loss
from longyarn.training.document_attention import NAME
from longyarn.training.inputs import Inputs

# The package that a value of a setting needs, and what to do without it.
PACKAGES = {
    ("attention", "flash_attention_2"): ("flash_attn", "install flash-attn or set sdpa"),
    ("loss", "liger"): ("liger_kernel", "install liger-kernel or set chunked"),
    ("report_to", "tensorboard"): ("tensorboard", "install tensorboard or set none"),
    ("report_to", "wandb"): ("wandb", "install wandb or set none"),
}


def require_packages(settings: dict) -> None:
    """Raise ``UserError`` if config section `training` needs a package that is not installed."""
    for (key, value), (package, fix) in PACKAGES.items():
        if settings[key] == value and importlib.util.find_spec(package) is None:
            raise UserError(f"training.{key} is {value}, but {package} is not installed; {fix}")


def load(inputs: Inputs):
    """Return the model to train: with its RoPE, its loss and, in mode lora, a fresh adapter."""
    settings, base = inputs.settings, inputs.base
    try:
        model = loading.load_model(
            inputs.model,
            inputs.rope_manifest,
            dtype="fp32" if settings["mode"] == "full" else settings["precision"],
            attention=attention(settings, inputs.document_masks),
            trust_remote_code=base["trust_remote_code"],
        )
    except ImportError as error:
        raise UserError(
            f"training.attention {settings['attention']} cannot be used here ({error}); install it or "
            "set sdpa"
        ) from None
    check_heads(settings, model.config.get_text_config())
    model.config.use_cache = False
    if settings["activation_offload"]:
        offload_activations(model)
    if settings["mode"] == "lora":
        model = lora.attach(model, settings["lora"])
    if settings["loss"] == "chunked":
        chunked_loss.attach(model)
    return model


def attention(settings: dict, document_masks: bool) -> str:
    """Return transformers' ``attn_implementation`` for training."""
    return NAME if settings["attention"] == "sdpa" and document_masks else settings["attention"]


def check_heads(settings: dict, config) -> None:
    """Raise ``UserError`` unless sp_size processes can share a model's attention heads.

    ``config`` is transformers' configuration of the text model.
    """
    count, heads = settings["sp_size"], config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", heads)  # GPT-NeoX has one for each head, unnamed
    if heads % count or (keys % count and count % keys):
        raise UserError(
            f"training.sp_size {count} cannot share {heads} attention heads with {keys} of keys and "
            "values; choose a divisor of both"
        )


def offload_activations(model) -> None:
    """Keep in host memory what the forward pass of ``model`` saves for the backward pass.

    With gradient checkpointing that is one input per layer.
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
