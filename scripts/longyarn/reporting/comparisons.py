"""How each variant compares with the trained model, and which differences are more than chance.

Perplexities are compared by their ratio over identical tokens, bootstrapped in pairs by document. Passkeys
are compared by the difference of the shares found (Newcombe 1998, method 10). A difference is *significant*
if its 95 % interval excludes 1 (ratio) or 0 (difference). Nothing is corrected for the number of comparisons.
"""

from longyarn.evaluation import intervals
from longyarn.reporting.results import NotEvaluated, Results
from longyarn.reporting.wording import between, points, significant


def compare(results: Results) -> list[dict]:
    """Compare each variant with the trained model, or with the base if none was evaluated.

    There is one entry for each variant and length (original and target). It has ``variant``, ``reference``,
    ``length``, ``perplexity``, ``passkey`` and ``sentence``. The two figures have ``value``, ``low``,
    ``high`` and ``significant``; a figure is None if one of the two variants lacks it.
    """
    names = list(dict.fromkeys([*results.perplexity, *results.passkey]))
    reference = "trained" if "trained" in names else "base"
    found = []
    for variant in names:
        for length in results.lengths:
            perplexity = perplexity_ratio(results, variant, reference, length)
            passkey = passkey_difference(results, variant, reference, length)
            if variant != reference and (perplexity or passkey):
                found.append(
                    {
                        "variant": variant,
                        "reference": reference,
                        "length": length,
                        "perplexity": perplexity,
                        "passkey": passkey,
                        "sentence": sentence(variant, reference, length, perplexity, passkey),
                    }
                )
    return found


def perplexity_ratio(results: Results, variant: str, reference: str, length: int) -> dict | None:
    """Return a variant's perplexity divided by the reference's; None if one was not evaluated.

    With one document there is no interval, so the ratio is never significant.
    """
    try:
        value, low, high = results.ratio(variant, length, reference, length)
    except NotEvaluated:
        return None
    return _figure(value, low, high, low < high and not low <= 1 <= high)


def passkey_difference(results: Results, variant: str, reference: str, length: int) -> dict | None:
    """Return a variant's share of passkeys found minus the reference's; None if one is missing."""
    try:
        ours, theirs = (results.retrieved(name, length) for name in (variant, reference))
    except NotEvaluated:
        return None
    counts = ((found["successes"], found["trials"]) for found in (ours, theirs))
    value, low, high = intervals.newcombe(*counts)
    return _figure(value, low, high, not low <= 0 <= high)


def _figure(value: float, low: float, high: float, is_significant: bool) -> dict:
    return {"value": value, "low": low, "high": high, "significant": is_significant}


def sentence(
    variant: str, reference: str, length: int, perplexity: dict | None, passkey: dict | None
) -> str:
    """Return a comparison in words."""
    parts = []
    if perplexity:
        interval = between(perplexity["low"], perplexity["high"])
        parts.append(
            f"the perplexity of {variant} is {significant(perplexity['value'])} times that of {reference} "
            f"(95 % interval {interval}), {_says(perplexity)}"
        )
    if passkey:
        interval = between(passkey["low"], passkey["high"], points)
        share = points(abs(passkey["value"])).removeprefix("+")
        more = "more" if passkey["value"] >= 0 else "fewer"
        parts.append(
            f"{variant} finds {share} percentage points {more} of the passkeys than {reference} "
            f"(95 % interval {interval}), {_says(passkey)}"
        )
    return f"At {length:,} tokens " + "; ".join(parts) + "."


def _says(figure: dict) -> str:
    return "which is significant" if figure["significant"] else "which is not significant"
