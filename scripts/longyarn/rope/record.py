"""Writes RoPE settings into a ``config.json``."""


def patched_config(
    config: dict, parameters: dict, max_position_embeddings: int, full_attention: bool
) -> dict:
    """Return a copy of a ``config.json`` with RoPE in today's form and no older form beside it.

    ``full_attention``: and without its sliding window.
    """
    history = (
        "rope_scaling",
        "rope_theta",
        "rotary_emb_base",
        "rotary_pct",
        "partial_rotary_factor",
    )
    patched = {key: value for key, value in config.items() if key not in history}
    patched["rope_parameters"] = dict(parameters)
    patched["max_position_embeddings"] = int(max_position_embeddings)
    # Where this stands at the top level, transformers lets it override the one in rope_parameters.
    patched.pop("original_max_position_embeddings", None)
    if full_attention:
        patched["sliding_window"] = None
    return patched
