"""Defines which ``rope_parameters`` Longyarn supports, and refuses all others."""

from longyarn.core.errors import UserError

KNOWN_PARAMETERS = {
    "default": {"rope_type", "rope_theta", "partial_rotary_factor"},
    "linear": {"rope_type", "rope_theta", "partial_rotary_factor", "factor"},
    "yarn": {
        "rope_type", "rope_theta", "partial_rotary_factor", "factor", "beta_fast", "beta_slow",
        "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim", "truncate",
    },
    "llama3": {
        "rope_type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor",
        "high_freq_factor", "original_max_position_embeddings",
    },
}  # fmt: skip

NEEDED = {
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    },
}  # fmt: skip

# Frequencies that depend on the input. Perplexity derives all lengths from one pass over the longest one,
# which needs the same frequencies at every length.
INPUT_DEPENDENT = ("dynamic", "longrope")


def check_parameters(parameters: dict) -> None:
    """Refuse rope_parameters that could be misread: nested, of an unknown type, or with unknown keys."""
    kind = parameters.get("rope_type")
    if kind is None and any(isinstance(value, dict) for value in parameters.values()):
        raise UserError(
            "the model gives each kind of layer its own RoPE (local and global attention); "
            "Longyarn extends models with one RoPE for all layers"
        )
    if kind in INPUT_DEPENDENT:
        raise UserError(
            f"the model's RoPE is of type {kind!r}, whose frequencies change with the length of the input, "
            "so no one length can be measured by another; choose a model from before that scaling"
        )
    if kind not in KNOWN_PARAMETERS:
        raise UserError(
            f"the model's rope_type {kind!r} is not one that Longyarn knows "
            f"({', '.join(KNOWN_PARAMETERS)}); choose a model with one of these"
        )
    unknown = sorted(set(parameters) - KNOWN_PARAMETERS[kind] - {"type"})
    if unknown:
        raise UserError(
            f"rope_parameters of type {kind!r} has the unknown key {unknown[0]!r}; known are "
            f"{', '.join(sorted(KNOWN_PARAMETERS[kind]))}"
        )
    words = sorted(
        key for key in set(parameters) - {"rope_type", "type"} if isinstance(parameters[key], str)
    )
    if words:
        raise UserError(
            f"rope_parameters has {words[0]} {parameters[words[0]]!r}, which is text; write a number in "
            "the model's config.json"
        )
    missing = sorted(({"rope_theta"} | NEEDED.get(kind, set())) - set(parameters))
    if missing:
        raise UserError(
            f"rope_parameters of type {kind!r} lacks {missing[0]!r}; add it to the model's config.json"
        )
