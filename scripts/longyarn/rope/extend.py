"""Extends a model's ``rope_parameters`` to a longer context: linear, NTK or YaRN."""

import math

from longyarn.core.errors import UserError
from longyarn.rope.parameters import check_parameters


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

    ``base`` holds the model's own rope_parameters. The original length comes from the model and the
    factor from the two lengths, s = target / original; where the caller states either, it must
    agree, except that an ``original_reason`` lets the stated original length win.

    ``linear``: every frequency divided by s (Chen et al., arXiv 2306.15595). ``ntk``: the default
    rotation with θ′ = θ·s^(d/(d−2)), d = rotary_dim, so that the slowest pair is divided by s and
    the fastest is left. ``yarn``: by parts, with attention temperature (arXiv 2309.00071, section 3).
    """
    check_parameters(base)
    if base["rope_type"] != "default":
        check_replacement(
            base,
            max_position_embeddings,
            target_length,
            original_max_position_embeddings if original_reason else None,
        )
    original = original_max_position_embeddings or max_position_embeddings
    if original != max_position_embeddings and not original_reason:
        raise UserError(
            f"rope.original_max_position_embeddings {original} contradicts the model's "
            f"max_position_embeddings {max_position_embeddings}; leave it null, or say in "
            "rope.original_reason why the model's own figure is wrong"
        )
    if target_length <= original:
        raise UserError(
            f"rope.target_length {target_length} is not longer than the original length {original}; "
            "raise it"
        )
    derived = target_length / original
    if factor is not None and not math.isclose(factor, derived, rel_tol=1e-6):
        raise UserError(
            f"rope.factor {factor:g} contradicts rope.target_length {target_length} / original length "
            f"{original} = {derived:g}; leave rope.factor null or mend the lengths"
        )
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
        raise ValueError(f"{method!r} does not extend anything")
    return parameters, derived, original


def check_replacement(base: dict, reached: int, target: int, original: int | None) -> None:
    """Refuse to put new scaling in the place of a model's own, unless it is asked for and longer.

    ``reached`` is the length of the model's own scaling; ``original`` the length before it, as stated
    together with a reason.
    """
    kind, own = base["rope_type"], base.get("original_max_position_embeddings")
    if original is None:
        first = (
            f"{own}, which that scaling starts from,"
            if own
            else "the length it was first trained at"
        )
        raise UserError(
            f"the model already carries RoPE scaling of type {kind!r}; to replace it, set "
            f"rope.original_max_position_embeddings to {first} and say why in rope.original_reason (it was "
            "trained with the old frequencies, so training has more to undo)"
        )
    if own and original != own:
        raise UserError(
            f"rope.original_max_position_embeddings {original} is not the length {own} that the model's "
            f"own scaling of type {kind!r} starts from; set it to {own}"
        )
    if target <= reached:
        raise UserError(
            f"rope.target_length {target} is within the {reached} positions that the model's own scaling of "
            f"type {kind!r} reaches; use the model as it is, or raise the target"
        )
