"""A model's settings in the form that software before transformers 5 reads, beside today's and in agreement.

transformers 4 reads ``rope_scaling``, with the base and the rotated share at the top level, and knows no
``rope_parameters``. transformers 5 reads both, and where both stand ``rope_scaling`` wins, with the base
and the share from the top level: so all of them are written, or none. docs/artifacts.md has the table.
"""

# By model type: the names of the base and of the rotated share, where they are not the usual ones.
NAMES = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct"),
}
APART = ("rope_theta", "partial_rotary_factor")
# Families that transformers 4.57.6 would run unscaled (the first three), or whose scaled RoPE it refuses.
UNSCALED = ("dbrx", "nemotron", "recurrent_gemma", "llama4_text", "olmo", "olmo2")


def rope_keys(model_type: str, parameters: dict) -> dict:
    """Return ``rope_parameters`` as keys of a config.json before transformers 5; none where none would do."""
    scaling = {key: value for key, value in parameters.items() if key not in APART}
    scaled = scaling["rope_type"] != "default"
    if scaled and model_type in UNSCALED:
        return {}
    names = NAMES.get(model_type, APART)
    found = {
        name: parameters[key] for name, key in zip(names, APART, strict=True) if key in parameters
    }
    return found | ({"rope_scaling": scaling} if scaled else {})


def with_old_keys(config: dict, parameters: dict, loaded) -> dict:
    """Return a config.json with its RoPE in both forms, and its type under both names.

    ``loaded`` is the model's transformers configuration. ``head_dim`` is written where the config leaves it
    open, and can state it: YaRN in transformers 4 fails on a null one.
    """
    both = config | rope_keys(config["model_type"], parameters)
    if not isinstance(getattr(type(loaded), "head_dim", None), property):  # computed, as Falcon's
        stated = config.get("head_dim") or getattr(loaded, "head_dim", None)
        both["head_dim"] = stated or loaded.hidden_size // loaded.num_attention_heads
    dtype = config.get("dtype") or config.get("torch_dtype")
    return both | ({"dtype": dtype, "torch_dtype": dtype} if dtype else {})


def tokenizer_keys(record: dict) -> dict:
    """Return a tokenizer_config.json with the names of transformers 4, which transformers 5 takes too."""
    found = dict(record)
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    # A list here stops transformers 4, which means something else by this key.
    if isinstance(found.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return found
