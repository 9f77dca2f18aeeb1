"""Confidence intervals: each has the coverage that it claims."""

import math

import numpy as np
import pytest

from longyarn.evaluation import intervals


def test_perplexity_is_token_weighted_and_the_interval_of_two_is_their_range():
    losses, tokens = np.array([10.0, 300.0]), np.array([10, 100])
    value, low, high = intervals.bootstrap_perplexity(losses, tokens)
    assert value == pytest.approx(math.exp(310 / 110))
    assert low == pytest.approx(math.exp(1.0))
    assert high == pytest.approx(math.exp(3.0))
    assert intervals.bootstrap_perplexity(losses[:1], tokens[:1]) == (math.e, math.e, math.e)


def test_documents_that_are_alike_leave_no_doubt():
    found = intervals.bootstrap_perplexity(np.full(8, 24.0), np.full(8, 8))
    assert found == pytest.approx((math.exp(3),) * 3)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (19, 2.0930), (999, 1.9623)]
)
def test_quantiles_of_student_are_those_of_the_tables(freedom, quantile):
    assert intervals.student_quantile(0.975, freedom) == pytest.approx(quantile, rel=1e-4)


@pytest.mark.parametrize("documents", [20, 40])
def test_the_interval_of_perplexity_covers_19_times_in_20(documents):
    """Documents differ in length and in difficulty, whose distribution is skewed.

    The mean loss of a document is 3 nats a token, give or take 0.35, with a longer tail to hard ones.
    """
    generator = np.random.default_rng(0)

    def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.exp(generator.normal(9, 0.5, count)).round()
        hard = 3 + 0.35 * (generator.gamma(4, 0.5, count) - 2)
        return hard * tokens, tokens

    losses, tokens = sample(1_000_000)
    truth = math.exp(losses.sum() / tokens.sum())
    repeats, covered = 2000, 0
    for _ in range(repeats):
        _, low, high = intervals.bootstrap_perplexity(*sample(documents), resamples=1000)
        covered += low <= truth <= high
    assert 0.93 <= covered / repeats <= 0.97


@pytest.mark.parametrize("trials", [10, 50, 75])
def test_wilson_covers_19_times_in_20_on_the_mean_over_rates(trials):
    """The coverage is exact, from the binomial distribution, and averaged over rates from 0 to 1."""
    rates = np.linspace(0.0005, 0.9995, 1000)
    coverage = np.zeros(len(rates))
    for successes in range(trials + 1):
        low, high = intervals.wilson(successes, trials)
        ways = math.comb(trials, successes)
        chance = ways * rates**successes * (1 - rates) ** (trials - successes)
        coverage += chance * ((low <= rates) & (rates <= high))
    assert 0.945 <= coverage.mean() <= 0.96
