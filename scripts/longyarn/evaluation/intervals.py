"""Confidence intervals of perplexity and of rates."""

import math
from statistics import NormalDist

import numpy as np


def bootstrap_perplexity(
    losses: np.ndarray, tokens: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Return ``(value, low, high)``: token-weighted perplexity and its 95 % interval over documents.

    ``losses`` (documents,) are sums of negative log-likelihoods in nats; ``tokens`` (documents,) are the
    numbers of tokens in these sums. Perplexity is exp(Σ losses / Σ tokens). The interval is the percentile
    bootstrap over documents (Efron & Tibshirani 1993, chapter 13), because documents, not tokens, are the
    independent draws. It is expanded for the number of documents. With one document there is no interval,
    and both ends equal the value.
    """
    value = math.exp(losses.sum() / tokens.sum())
    if len(losses) < 2:
        return value, value, value
    draws = np.random.default_rng(seed).integers(len(losses), size=(resamples, len(losses)))
    ratios = losses[draws].sum(axis=1) / tokens[draws].sum(axis=1)
    tail = expanded_tail(tokens)
    low, high = np.exp(np.quantile(ratios, [tail, 1 - tail]))
    return value, float(low), float(high)


def expanded_tail(tokens: np.ndarray) -> float:
    """Return the share of bootstrap ratios beyond each end of a 95 % interval; ``tokens`` as above.

    With 2.5 % the interval is too narrow for two reasons: the bootstrap's variance lacks the factor
    n/(n − 1), and its tails are those of the normal distribution instead of Student's t. The tail
    Φ(−√(n/(n − 1)) · t) corrects both: the expanded percentile interval (Hesterberg 2015, The American
    Statistician 69(4), 371–386). Documents have unequal weights, so n is their effective number,
    (Σ tokens)² / Σ tokens² (Kish 1965).
    """
    freedom = max(tokens.sum() ** 2 / (tokens**2).sum() - 1, 1.0)
    return NormalDist().cdf(-math.sqrt(1 + 1 / freedom) * student_quantile(0.975, freedom))


def student_quantile(share: float, freedom: float) -> float:
    """Return the quantile of Student's t distribution with ``freedom`` degrees of freedom ν.

    With t = √ν · tan θ, the density of θ is proportional to cos(θ) to the power ν − 1.
    """
    parts = 20_000
    edges = math.pi * (np.arange(parts + 1) / parts - 0.5)
    below = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (freedom - 1))
    angle = np.interp(share, below / below[-1], edges[1:])
    return math.sqrt(freedom) * math.tan(angle)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a rate (Wilson 1927), which is valid near 0 and 1 and for few trials."""
    z = 1.959963984540054
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = z / (1 + z * z / trials)
    spread *= math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # At the ends exactly 0 and 1, without rounding errors.
    low = 0.0 if successes == 0 else centre - spread
    high = 1.0 if successes == trials else centre + spread
    return low, high


def newcombe(one: tuple[int, int], other: tuple[int, int]) -> tuple[float, float, float]:
    """Return ``(difference, low, high)`` of two rates, each given as (successes, trials).

    This is method 10 of Newcombe 1998 (Statistics in Medicine 17, 873–890), which combines Wilson's
    intervals of both rates. It assumes independent samples. If both rates were measured with the same keys
    and tend to succeed together, the interval is too wide, so its verdict "significant" is still safe.
    """
    (p, q), (ours, theirs) = (s / n for s, n in (one, other)), (wilson(*one), wilson(*other))
    low = p - q - math.hypot(p - ours[0], theirs[1] - q)
    high = p - q + math.hypot(ours[1] - p, q - theirs[0])
    return p - q, low, high
