"""Loading models: always from safetensors, always with the RoPE that the manifest says.

RoPE can reach a model in two ways that give identical frequencies. Written: the stage patch_rope
wrote a ``config.json``, which is loaded. At load: nothing was written, and the settings are put into
the configuration before the model is built (after that, they would have no effect).
"""

from pathlib import Path

import numpy as np

from longyarn import manifest
from longyarn.cli import UserError, first_line

# By the setting of Granite, Cohere and Gemma: the value that changes nothing, and what another one does.
AFTER_THE_HEAD = {
    "logits_scaling": (1, lambda logits, value: logits / value),
    "logit_scale": (1, lambda logits, value: logits * value),
    "final_logit_softcapping": (None, lambda logits, value: (logits / value).tanh() * value),
}


def load_config(model_directory: Path, rope_path: Path, trust_remote_code: bool = False):
    """Return the transformers configuration of a model with the RoPE of the manifest ``rope_path``.

    A merged model carries its RoPE in its own ``config.json``; that must then agree.
    """
    from transformers import AutoConfig

    rope = manifest.read(rope_path)
    facts = rope["facts"]
    written = [name for name in rope["files"] if name.endswith("config.json")]
    source = Path(rope_path).parent / written[0] if written else Path(model_directory)
    config = AutoConfig.from_pretrained(model_directory, trust_remote_code=trust_remote_code)
    if written:
        # By the class of the model's own, whose code may lie beside its weights.
        config = type(config).from_dict(manifest.read_json(source))
    else:
        config.rope_parameters = dict(facts["rope_parameters"])
        config.max_position_embeddings = facts["max_position_embeddings"]
        if facts["full_attention"]:
            config.sliding_window = None
    check_config(config, facts, source)
    return config


def check_config(config, facts: dict, source: Path) -> None:
    """Stop when a configuration's RoPE is not the manifest's."""
    loaded = {k: v for k, v in (config.rope_parameters or {}).items() if k != "type"}
    expected = facts["rope_parameters"]
    lengths = (config.max_position_embeddings, facts["max_position_embeddings"])
    if loaded != expected or lengths[0] != lengths[1]:
        raise UserError(
            f"{source} carries RoPE {loaded} to {lengths[0]} positions where the run's manifest says "
            f"{expected} to {lengths[1]}; it was changed or made by another run, so rebuild it"
        )
    if facts["full_attention"] and config.sliding_window is not None:
        raise UserError(
            f"{source} has a sliding window of {config.sliding_window} where the run's manifest says that "
            "it has none; it was changed or made by another run, so rebuild it"
        )


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

    ``own_config``: the directory is a finished model, which must carry that RoPE by itself.
    ``dtype`` is ``fp32``, ``bf16`` or ``fp16``; ``attention`` is transformers' attn_implementation.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = manifest.read_facts(rope_path)
    if own_config:
        config = AutoConfig.from_pretrained(model_directory, trust_remote_code=trust_remote_code)
        check_config(config, facts, model_directory)
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
            f"the tensors in {model_directory} do not have the shapes that its config.json says; "
            "model.source mixes files of two models, so restore them"
        ) from None
    if loading["missing_keys"]:
        # transformers would go on with random numbers in their place.
        raise UserError(
            f"{model_directory} lacks the tensor {min(loading['missing_keys'])}; restore the files of "
            "model.source"
        )
    check_rotation(model, facts)
    return model


def load_tokenizer(model_directory: Path, trust_remote_code: bool):
    """Return the model's tokenizer, all of whose tokens the model has embeddings for."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_directory, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises nothing more special
        raise UserError(
            f"the tokenizer in {model_directory} cannot be loaded ({first_line(error)}); restore its "
            "files in model.source"
        ) from None
    check_vocabulary(tokenizer, model_directory)
    return tokenizer


def check_vocabulary(tokenizer, model_directory: Path) -> None:
    """Stop when the tokenizer has a token beyond the model's embeddings.

    A tokenizer with fewer tokens is common: embeddings are padded to a round number.
    """
    size = manifest.read_json(Path(model_directory) / "config.json").get("vocab_size")
    largest, token = max((number, token) for token, number in tokenizer.get_vocab().items())
    if size is not None and largest >= size:
        raise UserError(
            f"the tokenizer in {model_directory} has the token {token!r} with the number {largest}, where "
            f"the model's vocabulary ends at {size - 1} (vocab_size {size} in config.json); they are of two "
            "models, or tokens were added later, so restore the tokenizer's files in model.source"
        )


def torch_dtype(name: str):
    """Return torch's dtype for ``fp32``, ``bf16`` or ``fp16``."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def check_rotation(model, facts: dict) -> None:
    """Stop unless every rotary module turns as the manifest says, in float32.

    A config can be right and the rotation wrong: RoPE set too late, an arange in bfloat16.
    """
    import torch

    expected = np.asarray(facts["inverse_frequencies"], dtype=np.float64)
    found = 0
    for name, module in model.named_modules():
        frequencies = getattr(module, "inv_freq", None)
        if frequencies is None:
            continue
        found += 1
        actual = frequencies.detach().cpu().double().numpy()
        if frequencies.dtype != torch.float32:
            raise UserError(f"{name}.inv_freq is {frequencies.dtype}; RoPE needs float32")
        if actual.shape != expected.shape or not np.allclose(actual, expected, rtol=1e-6, atol=0):
            raise UserError(
                f"{name} does not rotate as the RoPE manifest says (expected {expected[:3]}…, found "
                f"{actual[:3]}…); the model was built before its RoPE was set, or by other code"
            )
        scaling = getattr(module, "attention_scaling", 1.0)
        if abs(scaling - facts["attention_factor"]) > 1e-6:
            raise UserError(
                f"{name} scales attention by {scaling} where the RoPE manifest says "
                f"{facts['attention_factor']}"
            )
    if not found:
        raise UserError("the model has no rotary embedding with inv_freq, so its RoPE is unproved")


def after_the_head(config) -> dict[str, float]:
    """Return the settings by which a model changes its logits after the output head, with their values."""
    values = {key: getattr(config, key, None) for key in AFTER_THE_HEAD}
    return {k: v for k, v in values.items() if v not in (None, AFTER_THE_HEAD[k][0])}


def logits(model, states):
    """Return the logits of hidden states (…, hidden_size) as the model makes them, in float32."""
    found = model.get_output_embeddings()(states).float()
    for key, value in after_the_head(model.config.get_text_config()).items():
        found = AFTER_THE_HEAD[key][1](found, value)
    return found


def check_logits(model) -> None:
    """Stop where ``logits`` of the decoder's states are not the model's own: it does more to them."""
    import torch

    tokens = torch.arange(1, 17, device=model.device)[None]
    with torch.inference_mode():
        own = model(input_ids=tokens, use_cache=False).logits.float()
        states = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        found = logits(model, states).to(own.device)
    if not torch.allclose(found, own, rtol=0.02, atol=0.02 * float(own.abs().max())):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output head in a way that Longyarn does "
            "not know, so its perplexity would be wrong; choose another model"
        )


def tensor_files(model_directory: Path) -> list[Path]:
    """Return the safetensors files of a model directory, in shard order."""
    model_directory = Path(model_directory)
    index = model_directory / "model.safetensors.index.json"
    if index.is_file():
        names = manifest.read_json(index).get("weight_map")
        if not names:
            raise UserError(f"{index} has no weight_map; restore it from where the model came")
        if outside := [name for name in names.values() if "/" in name]:
            raise UserError(
                f"{index} names {outside[0]}, which is not beside it; restore the index"
            )
        return [model_directory / name for name in sorted(set(names.values()))]
    single = model_directory / "model.safetensors"
    if not single.is_file():
        raise UserError(
            f"{model_directory} has no model.safetensors; Longyarn loads safetensors only, so convert "
            "the weights first"
        )
    return [single]
