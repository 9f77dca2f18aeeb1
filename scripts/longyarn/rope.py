"""RoPE settings: the one place that computes and checks them.

Shapes: a head has ``rotary_dim`` rotated dimensions, taken as ``rotary_dim // 2`` pairs. Pair i turns
by ``inverse_frequencies[i]`` radians a token. ``rope_parameters`` is the dictionary of that name in a
transformers config: ``rope_type``, ``rope_theta`` and, when scaled, ``factor`` and what goes with it.
"""

import math

import numpy as np

from longyarn.cli import UserError

METHODS = ("none", "linear", "ntk", "yarn")

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

# Perplexity reads all lengths from one pass over the longest, which supposes one set of frequencies.
OF_THE_INPUT = ("dynamic", "longrope")


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


def check_parameters(parameters: dict) -> None:
    """Refuse rope_parameters that we could misread: nested, of an unknown type, or misspelt."""
    kind = parameters.get("rope_type")
    if kind is None and any(isinstance(value, dict) for value in parameters.values()):
        raise UserError(
            "the model gives each kind of layer its own RoPE (local and global attention); "
            "Longyarn extends models with one RoPE for all layers"
        )
    if kind in OF_THE_INPUT:
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


def ramp_limits(parameters: dict, rotary_dim: int) -> tuple[float, float]:
    """Return the pair indices between which YaRN ramps from unscaled to divided by s.

    The index of the pair that turns β times within the original length L is
    d·ln(L / 2πβ) / (2·ln θ); β_fast gives the lower limit, rounded down, β_slow the upper, rounded
    up, as in the code that came with the paper and in transformers. (The paper's equations ramp over
    r = L/λ itself, unrounded; docs/rope.md shows the difference.)
    """
    length = parameters["original_max_position_embeddings"]

    def pair(rotations: float) -> float:
        turns = length / (rotations * 2 * math.pi)
        return rotary_dim * math.log(turns) / (2 * math.log(parameters["rope_theta"]))

    low, high = pair(parameters.get("beta_fast", 32)), pair(parameters.get("beta_slow", 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, rotary_dim - 1)


def inverse_frequencies(parameters: dict, rotary_dim: int) -> tuple[np.ndarray, float]:
    """Return ``(inverse_frequencies, attention_factor)``: float64 (rotary_dim // 2,), radians a token.

    default: θ^(−2i/d). linear: that divided by s. llama3: divided by s where a pair turns less often than
    low_freq_factor within the original length, left where more often than high_freq_factor, mixed by the
    number of turns between. yarn: divided by s above the ramp, left below it,
    mixed on it; attention_factor 0.1·ln s + 1 multiplies cos and sin (arXiv 2309.00071, section 3.4).
    """
    check_parameters(parameters)
    pairs = np.arange(rotary_dim // 2, dtype=np.float64)
    plain = parameters["rope_theta"] ** (-2 * pairs / rotary_dim)
    if parameters["rope_type"] == "default":
        return plain, 1.0
    factor = parameters["factor"]
    if parameters["rope_type"] == "linear":
        return plain / factor, 1.0
    if parameters["rope_type"] == "llama3":
        turns = parameters["original_max_position_embeddings"] * plain / (2 * math.pi)
        slow, fast = parameters["low_freq_factor"], parameters["high_freq_factor"]
        kept = np.clip((turns - slow) / (fast - slow), 0, 1)
        return plain / factor * (1 - kept) + plain * kept, 1.0
    low, high = ramp_limits(parameters, rotary_dim)
    if low == high:
        high += 0.001
    interpolated = np.clip((pairs - low) / (high - low), 0, 1)
    mixed = plain / factor * interpolated + plain * (1 - interpolated)
    return mixed, attention_factor(parameters)


def attention_factor(parameters: dict) -> float:
    """Return the factor on cos and sin; logits scale by its square."""
    stated = parameters.get("attention_factor")
    if stated is not None:
        return float(stated)

    def temperature(mscale: float) -> float:
        return (
            0.1 * mscale * math.log(parameters["factor"]) + 1 if parameters["factor"] > 1 else 1.0
        )

    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and all_dim:
        return temperature(mscale) / temperature(all_dim)
    return temperature(1.0)


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
