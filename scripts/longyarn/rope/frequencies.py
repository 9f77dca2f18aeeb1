"""Computes the inverse frequencies and the attention factor of ``rope_parameters``.

A head has ``rotary_dim`` rotated dimensions, in ``rotary_dim // 2`` pairs. Pair i turns by
``inverse_frequencies[i]`` radians a token.
"""

import math

import numpy as np

from longyarn.rope.parameters import check_parameters


def ramp_limits(parameters: dict, rotary_dim: int) -> tuple[float, float]:
    """Return the indices of the pairs where YaRN's ramp begins and ends.

    Below the ramp a frequency is not scaled; above it, it is divided by s.

    The index of the pair that turns β times within the original length L is
    d·ln(L / 2πβ) / (2·ln θ); β_fast gives the lower limit, rounded down, β_slow the upper, rounded
    up, as in the paper's reference code and in transformers. (The paper's equations ramp over r = L/λ
    itself, without rounding; docs/rope.md shows the difference.)
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

    default: θ^(−2i/d). linear: divided by s. llama3: divided by s if a pair turns less often than
    low_freq_factor within the original length, unchanged if it turns more often than high_freq_factor,
    interpolated by the number of turns in between. yarn: divided by s above the ramp, unchanged below it,
    interpolated on it; attention_factor 0.1·ln s + 1 multiplies cos and sin (arXiv 2309.00071, section 3.4).
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
    """Return the factor that multiplies cos and sin; attention logits scale by its square."""
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
