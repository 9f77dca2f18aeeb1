"""Writes a model's settings in the form of transformers 4 as well, in agreement with the current form.

transformers 4 reads ``rope_scaling``, with theta and the rotated fraction at the top level, and does not know
``rope_parameters``. transformers 5 reads both forms. If a file has both, ``rope_scaling`` wins, with theta
and the fraction of the top level. So all of these keys are written, or none. docs/artifacts.md has the table.
"""

# By model type: the names of theta and of the rotated fraction, if they are not the usual ones.
NAMES = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct"),
}
TOP_LEVEL = ("rope_theta", "partial_rotary_factor")
# Families that transformers 4.57.6 runs unscaled (the first three), or whose scaled RoPE it refuses.
UNSCALED = ("dbrx", "nemotron", "recurrent_gemma", "llama4_text", "olmo", "olmo2")


def rope_keys(model_type: str, parameters: dict) -> dict:
    """Return ``rope_parameters`` as keys of transformers 4; empty if it has no keys for this model."""
    scaling = {key: value for key, value in parameters.items() if key not in TOP_LEVEL}
    scaled = scaling["rope_type"] != "default"
    if scaled and model_type in UNSCALED:
        return {}
    names = NAMES.get(model_type, TOP_LEVEL)
    found = {
        name: parameters[key]
        for name, key in zip(names, TOP_LEVEL, strict=True)
        if key in parameters
    }
    return found | ({"rope_scaling": scaling} if scaled else {})


def with_old_keys(config: dict, parameters: dict, loaded) -> dict:
    """Return a config.json with its RoPE in both forms, and its dtype under both names.

    ``loaded`` is the model's transformers configuration. ``head_dim`` is written if the config leaves it
    open, because YaRN in transformers 4 fails on a null one.
    """
    both = config | rope_keys(config["model_type"], parameters)
    if not isinstance(getattr(type(loaded), "head_dim", None), property):  # computed, as for Falcon
        stated = config.get("head_dim") or getattr(loaded, "head_dim", None)
        both["head_dim"] = stated or loaded.hidden_size // loaded.num_attention_heads
    dtype = config.get("dtype") or config.get("torch_dtype")
    return both | ({"dtype": dtype, "torch_dtype": dtype} if dtype else {})


def tokenizer_keys(record: dict) -> dict:
    """Return a tokenizer_config.json with the names of transformers 4, which transformers 5 accepts too."""
    found = dict(record)
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    # transformers 4 gives this key another meaning and fails on a list.
    if isinstance(found.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return found
