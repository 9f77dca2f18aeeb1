"""The verdict: what the results show about the extension, checked against thresholds and put in words.

A check compares the value, not the end of its interval, with the threshold, and says so if the interval
includes the threshold. The thresholds for the trained model come from config section `gate`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from longyarn.config.thresholds import KEY_OF
from longyarn.reporting.results import NotEvaluated, Results, pooled, rate
from longyarn.reporting.wording import between, capitalized, clause, count, percent, significant

# Thresholds for the base. No gate depends on them: they show that the extension was needed.
OF_THE_BASE = {
    "base_perplexity_breaks": 1.5,  # perplexity at the target length / original length: at least
    "base_passkey_fails": 0.10,  # share of passkeys at the target length: at most
}


@dataclass(frozen=True)
class Check:
    """One comparison; ``decided`` tells whether the whole interval is on one side of the threshold."""

    name: str
    passed: bool
    decided: bool
    value: float
    low: float
    high: float
    threshold: float
    sentence: str


def judge(results: Results, thresholds: dict[str, float | None]) -> dict:
    """Return the verdict: a headline, a sentence, the checks, and those that could not be made.

    ``thresholds`` is config section `gate`.
    """
    checks, missing = [], []
    for name, check in CHECKS.items():
        if results.target == results.original and name not in WITHOUT_EXTENSION:
            continue
        threshold = OF_THE_BASE[name] if name in OF_THE_BASE else thresholds[KEY_OF[name]]
        if threshold is None:
            missing.append({"name": name, "reason": f"gate.{KEY_OF[name]} is null"})
            continue
        try:
            checks.append(check(name, results, threshold))
        except NotEvaluated as gap:
            missing.append({"name": name, "reason": str(gap)})
    return {
        "headline": headline(checks, missing),
        "sentence": sentence(checks, missing, results),
        "checks": [asdict(check) for check in checks],
        "not_checked": missing,
    }


def trained_perplexity_holds(name: str, results: Results, threshold: float) -> Check:
    return at_most(
        name,
        results.ratio("trained", results.target, "trained", results.original),
        threshold,
        f"the trained model's perplexity at {results.target:,} tokens is {{}} times its own at "
        f"{results.original:,}",
    )


def original_length_kept(name: str, results: Results, threshold: float) -> Check:
    return at_most(
        name,
        results.ratio("trained", results.original, "base", results.original),
        threshold,
        f"at {results.original:,} tokens the trained model's perplexity is {{}} times the base's",
    )


def base_perplexity_breaks(name: str, results: Results, threshold: float) -> Check:
    return at_least(
        name,
        results.ratio("base", results.target, "base", results.original),
        threshold,
        f"the base's perplexity at {results.target:,} tokens is {{}} times its own at "
        f"{results.original:,}",
    )


def trained_passkey_found(name: str, results: Results, threshold: float) -> Check:
    found = results.retrieved("trained", results.target)
    claim = (
        f"at {results.target:,} tokens the trained model retrieves {count(found)} passkeys, {{}}"
    )
    return at_least(name, rate(found), threshold, claim, percent)


def base_passkey_fails(name: str, results: Results, threshold: float) -> Check:
    found = results.retrieved("base", results.target)
    claim = f"at {results.target:,} tokens the base retrieves {count(found)} passkeys, {{}}"
    return at_most(name, rate(found), threshold, claim, percent)


CHECKS = {
    check.__name__: check
    for check in (
        trained_perplexity_holds,
        original_length_kept,
        base_perplexity_breaks,
        trained_passkey_found,
        base_passkey_fails,
    )
}
# The checks that mean something if the model was trained at its original length.
WITHOUT_EXTENSION = ("original_length_kept", "trained_passkey_found")


def at_most(name: str, figure: tuple, threshold: float, claim: str, write=significant) -> Check:
    """Return the check that a figure (value, low, high) is at most the threshold."""
    value, low, high = figure
    decided = high <= threshold or low > threshold
    return _check(name, value <= threshold, decided, figure, "most", threshold, claim, write)


def at_least(name: str, figure: tuple, threshold: float, claim: str, write=significant) -> Check:
    """Return the check that a figure (value, low, high) is at least the threshold."""
    value, low, high = figure
    decided = low >= threshold or high < threshold
    return _check(name, value >= threshold, decided, figure, "least", threshold, claim, write)


def _check(
    name: str, passed: bool, decided: bool, figure: tuple, bound: str, threshold: float, claim: str,
    write: Callable[[float], str],
) -> Check:  # fmt: skip
    value, low, high = figure
    interval = f" (95 % interval {between(low, high, write)})" if low < high else ""
    limit = percent(threshold) if write is percent else f"{threshold:g}"
    text = f"{claim.format(write(value))}{interval}, where at {bound} {limit} is required."
    # A figure without an interval decides nothing.
    decided = low < high and decided
    return Check(name, passed, decided, value, low, high, threshold, capitalized(text))


def headline(checks: list[Check], missing: list[dict]) -> str:
    """Return the verdict in a few words."""
    failed = sum(not check.passed for check in checks)
    if not checks:
        return "Nothing could be checked"
    if failed:
        return f"{failed} of {len(checks)} checks {'fail' if failed > 1 else 'fails'}"
    if missing:
        return f"{len(checks)} of {len(checks) + len(missing)} checks made, all of them passed"
    return f"All {len(checks)} checks pass"


def sentence(checks: list[Check], missing: list[dict], results: Results) -> str:
    """Return the main figures of the trained model and of the base, and what the checks say."""
    described = [
        f"{subject} {words}"
        for variant, subject in (("trained", "the trained model"), ("base", "the base"))
        if (words := describe(results, variant))
    ]
    text = "; ".join([*described, outcome(checks, missing)])
    return capitalized(text if described else text.removeprefix("and ")) + "."


def outcome(checks: list[Check], missing: list[dict]) -> str:
    """Return what the checks say, as the last part of the verdict's sentence."""
    failed = [check for check in checks if not check.passed]
    if failed:
        text = "but " + "; and ".join(clause(check.sentence) for check in failed)
    elif checks:
        made = f"all {len(checks)} checks pass" if len(checks) > 1 else "the one check passes"
        text = "and " + (made if not missing else f"{made} that these figures allow")
        close = [check for check in checks if not check.decided and check.low < check.high]
        if close:
            names = " and ".join(f"“{check.name.replace('_', ' ')}”" for check in close)
            text += f", though the 95 % interval includes the threshold of {names}"
    else:
        text = "and nothing could be checked"
    if missing:
        text += f" ({len(missing)} not made: {missing[0]['reason']})"
    return text


def describe(results: Results, variant: str) -> str:
    """Return a variant's figures at the target and at the original length, in words."""
    parts = []
    lengths = results.perplexity.get(variant, {"lengths": {}})["lengths"]
    at = [n for n in dict.fromkeys((results.target, results.original)) if str(n) in lengths]
    if at:
        one = len(results.perplexity[variant]["documents"]) == 1
        words = [
            _perplexity_words(lengths[str(n)], n, i == 0 and not one) for i, n in enumerate(at)
        ]
        parts.append("has perplexity " + " against ".join(words))
    depths = results.passkey.get(variant, {}).get(str(results.target))
    if depths:
        found = pooled(depths)
        parts.append(
            f"retrieves {count(found)} passkeys ({between(found['low'], found['high'], percent)}) "
            f"at {results.target:,}"
        )
    return " and ".join(parts)


def _perplexity_words(figure: dict, length: int, first: bool) -> str:
    name = "95 % interval " if first else ""
    interval = f" ({name}{between(figure['low'], figure['high'])})"
    if figure["low"] == figure["high"]:
        interval = " (one document, so no interval)"
    unit = " tokens" if first else ""
    return f"{significant(figure['value'])}{interval} at {length:,}{unit}"
