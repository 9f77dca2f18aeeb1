"""Extends a model's RoPE to a longer context: linear, NTK or YaRN."""

import math

from longyarn.core.errors import UserError
from longyarn.rope.frequencies import inverse_frequencies, ramp_limits
from longyarn.rope.parameters import check_parameters
from longyarn.rope.record import RopeRecord


def extended_record(config, settings: dict) -> RopeRecord:
    """Return the RoPE of one variant of a base model.

    ``config`` is the base's transformers configuration; ``settings`` is the config section ``rope``.
    A null target_length is derived from the factor.
    """
    own = dict(config.rope_parameters)
    check_parameters(own)
    own.pop("type", None)
    method, rotary_dim = settings["method"], rotary_dimensions(config)
    length = original = config.max_position_embeddings
    parameters, factor, full_attention = dict(own), 1.0, False
    if method != "none":
        given = {k: v for k, v in settings.items() if k not in ("write_config", "sliding_window")}
        if given["target_length"] is None:
            start = given["original_max_position_embeddings"] or original
            given["target_length"] = round(given["factor"] * start)
        length = given["target_length"]
        full_attention = removes_window(config, length, settings.get("sliding_window", "keep"))
        parameters, factor, original = extend(
            own, max_position_embeddings=original, rotary_dim=rotary_dim, **given
        )
    frequencies, attention_factor = inverse_frequencies(parameters, rotary_dim)
    return RopeRecord(
        method=method,
        replaced=own if method != "none" and own["rope_type"] != "default" else None,
        full_attention=full_attention,
        factor=factor,
        original_max_position_embeddings=original,
        max_position_embeddings=length,
        rope_parameters=parameters,
        rotary_dim=rotary_dim,
        attention_factor=attention_factor,
        inverse_frequencies=frequencies.tolist(),
        base_inverse_frequencies=inverse_frequencies(own, rotary_dim)[0].tolist(),
        ramp_limits=ramp_limits(parameters, rotary_dim) if method == "yarn" else None,
    )


def rotary_dimensions(config) -> int:
    """Return how many dimensions of a head are rotated."""
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


def removes_window(config, target_length: int, setting: str) -> bool:
    """Tell whether the model's sliding window must go; stop if the window would hide the new length.

    ``setting`` is rope.sliding_window: ``keep`` or ``full``.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in kinds and len(kinds) > 1:
        raise UserError(
            f"the model mixes layers that attend within {window} tokens with layers that attend to all "
            "tokens, and one RoPE serves both; extending it would change the distances that the local "
            "layers know, so choose a model whose layers are all of one kind"
        )
    windowed = getattr(config, "use_sliding_window", True) and window and window < target_length
    if windowed and setting == "keep":
        raise UserError(
            f"the model attends within a sliding window of {window} tokens, less than "
            f"rope.target_length {target_length}; set rope.sliding_window to full, so that every token "
            "attends to all tokens before it, or choose a model that attends to its whole context"
        )
    return bool(windowed)


def extend(
    base: dict,
    *,
    method: str,
    max_position_embeddings: int,
    rotary_dim: int,
    target_length: int,
    factor: float | None = None,
    original_max_position_embeddings: int | None = None,
    original_reason: str | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
) -> tuple[dict, float, int]:
    """Return ``(rope_parameters, factor s, original length)`` of ``base`` extended to a new length.

    ``base`` holds the model's own rope_parameters. The original length comes from the model, and
    s = target length / original length. If the caller states either, it must agree with the model;
    only with an ``original_reason`` does a stated original length override it.

    ``linear``: every frequency divided by s (Chen et al., arXiv 2306.15595). ``ntk``: the default
    rotation with θ′ = θ·s^(d/(d−2)), d = rotary_dim, so that the slowest pair is divided by s and
    the fastest does not change. ``yarn``: by parts, with attention temperature (arXiv 2309.00071,
    section 3).
    """
    check_parameters(base)
    stated = original_max_position_embeddings
    if base["rope_type"] != "default":
        start = stated if original_reason else None
        check_replacement(base, max_position_embeddings, target_length, start)
    original = stated or max_position_embeddings
    if original != max_position_embeddings and not original_reason:
        raise UserError(
            f"rope.original_max_position_embeddings {original} contradicts the model's "
            f"max_position_embeddings {max_position_embeddings}; leave it null, or explain in "
            "rope.original_reason why the model's own number is wrong"
        )
    derived = check_factor(target_length, original, factor)
    if method != "yarn" and attention_factor is not None:
        raise UserError(f"rope.attention_factor belongs to yarn, not to {method!r}; leave it null")
    if beta_fast <= beta_slow:
        raise UserError(
            f"rope.beta_fast {beta_fast:g} must be larger than rope.beta_slow {beta_slow:g}"
        )

    kept = {key: base[key] for key in ("rope_theta", "partial_rotary_factor") if key in base}
    if method == "linear":
        parameters = {"rope_type": "linear"} | kept | {"factor": derived}
    elif method == "ntk":
        theta = base["rope_theta"] * derived ** (rotary_dim / (rotary_dim - 2))
        parameters = {"rope_type": "default"} | kept | {"rope_theta": theta}
    elif method == "yarn":
        parameters = {"rope_type": "yarn"} | kept
        parameters |= {"factor": derived, "original_max_position_embeddings": original}
        parameters |= {"beta_fast": float(beta_fast), "beta_slow": float(beta_slow)}
        if attention_factor is not None:
            parameters["attention_factor"] = float(attention_factor)
    else:
        raise ValueError(f"{method!r} is not a method of extension")
    return parameters, derived, original


def check_factor(target_length: int, original: int, stated: float | None) -> float:
    """Return s = target length / original length; stop unless s > 1 and equals a stated factor."""
    if target_length <= original:
        raise UserError(
            f"rope.target_length {target_length} is not longer than the original length {original}; "
            "raise it"
        )
    derived = target_length / original
    if stated is not None and not math.isclose(stated, derived, rel_tol=1e-6):
        raise UserError(
            f"rope.factor {stated:g} contradicts rope.target_length {target_length} / original length "
            f"{original} = {derived:g}; leave rope.factor null or correct the lengths"
        )
    return derived


def check_replacement(base: dict, reached: int, target: int, original: int | None) -> None:
    """Refuse to replace a model's own scaling, unless the user asks for it and the target is longer.

    ``reached`` is the length that the model's own scaling reaches; ``original`` is the length before
    that scaling, if the user states it together with a reason.
    """
    kind, own = base["rope_type"], base.get("original_max_position_embeddings")
    if original is None:
        first = f"{own}, where that scaling starts," if own else "the length of its first training"
        raise UserError(
            f"the model already has RoPE scaling of type {kind!r}; to replace it, set "
            f"rope.original_max_position_embeddings to {first} and explain why in rope.original_reason "
            "(the model was trained with the old frequencies, so training has more to undo)"
        )
    if own and original != own:
        raise UserError(
            f"rope.original_max_position_embeddings {original} is not the length {own} where the model's "
            f"own scaling of type {kind!r} starts; set it to {own}"
        )
    if target <= reached:
        raise UserError(
            f"rope.target_length {target} is within the {reached} positions that the model's own scaling of "
            f"type {kind!r} reaches; use the model as it is, or raise the target"
        )
