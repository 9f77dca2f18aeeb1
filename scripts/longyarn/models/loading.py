"""Loads models from safetensors, with the RoPE that the manifest states.

RoPE reaches a model in one of two ways, which give identical frequencies. Written: the stage patch_rope
wrote a ``config.json``, which is loaded. At load: no file was written, and the settings are applied to the
configuration before the model is built. After that they would have no effect.
"""

from pathlib import Path

from longyarn.core import manifest
from longyarn.core.errors import UserError, first_line
from longyarn.core.files import read_json
from longyarn.rope.record import RopeRecord


def read_base_config(model_directory: Path, trust_remote_code: bool):
    """Return the base model's configuration; transformers converts legacy ``rope_scaling``."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_directory, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise UserError(
            f"{model_directory}/config.json cannot be read by transformers ({first_line(error)}); fix it "
            "or choose another model"
        ) from None
    if not getattr(config, "rope_parameters", None):
        raise UserError(
            f"the model in {model_directory} (model_type {config.model_type!r}) has no RoPE; "
            "only models with rotary position embeddings can be extended"
        )
    return config


def load_config(model_directory: Path, rope_path: Path, trust_remote_code: bool = False):
    """Return the transformers configuration of a model with the RoPE of the manifest ``rope_path``.

    A merged model has its RoPE in its own ``config.json``, which must then agree.
    """
    from transformers import AutoConfig

    found = manifest.read(rope_path)
    rope = RopeRecord.from_facts(found["facts"], rope_path)
    written = [name for name in found["files"] if name.endswith("config.json")]
    source = Path(rope_path).parent / written[0] if written else Path(model_directory)
    config = AutoConfig.from_pretrained(model_directory, trust_remote_code=trust_remote_code)
    if written:
        # The model's own class; its code may be beside its weights.
        config = type(config).from_dict(read_json(source))
    else:
        rope.apply(config)
    rope.check_config(config, source)
    return config


def load_model(
    model_directory: Path,
    rope_path: Path,
    *,
    dtype: str,
    attention: str,
    own_config: bool = False,
    trust_remote_code: bool = False,
):
    """Return the causal language model of a directory with the RoPE of a manifest, checked.

    ``own_config``: the directory is a finished model, whose own config.json must have that RoPE.
    ``dtype`` is ``fp32``, ``bf16`` or ``fp16``; ``attention`` is transformers' attn_implementation.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    rope = RopeRecord.read(rope_path)
    if own_config:
        config = AutoConfig.from_pretrained(model_directory, trust_remote_code=trust_remote_code)
        rope.check_config(config, model_directory)
    else:
        config = load_config(model_directory, rope_path, trust_remote_code)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            model_directory,
            config=config,
            dtype=torch_dtype(dtype),
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"the tensors in {model_directory} do not have the shapes of its config.json; "
            "model.source mixes files of two models, so restore them"
        ) from None
    if loading["missing_keys"]:
        # transformers would continue with random numbers in their place.
        raise UserError(
            f"{model_directory} lacks the tensor {min(loading['missing_keys'])}; restore the files of "
            "model.source"
        )
    rope.check_model(model)
    return model


def load_tokenizer(model_directory: Path, trust_remote_code: bool):
    """Return the model's tokenizer; stop if the model lacks an embedding for one of its tokens."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_directory, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises no more specific type
        raise UserError(
            f"the tokenizer in {model_directory} cannot be loaded ({first_line(error)}); restore its "
            "files in model.source"
        ) from None
    check_vocabulary(tokenizer, model_directory)
    return tokenizer


def check_vocabulary(tokenizer, model_directory: Path) -> None:
    """Stop if the tokenizer has a token beyond the model's embeddings.

    A tokenizer with fewer tokens is common, because embeddings are padded to a round number.
    """
    size = read_json(Path(model_directory) / "config.json").get("vocab_size")
    largest, token = max((number, token) for token, number in tokenizer.get_vocab().items())
    if size is not None and largest >= size:
        raise UserError(
            f"the tokenizer in {model_directory} has the token {token!r} with the number {largest}, but "
            f"the model's vocabulary ends at {size - 1} (vocab_size {size} in config.json); they come from "
            "two models, or tokens were added later, so restore the tokenizer's files in model.source"
        )


def torch_dtype(name: str):
    """Return torch's dtype for ``fp32``, ``bf16`` or ``fp16``."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
