"""How the variants compare with one of them, and which differences are more than chance.

Pure functions of the instruments' facts. Perplexities are compared by their ratio over identical tokens,
bootstrapped in pairs by document; passkeys by the difference of the shares found (Newcombe 1998). A
difference is *significant* where its 95 % interval leaves out 1, or 0; nothing is corrected for their number.
"""

from longyarn.evaluation import intervals
from longyarn.reporting.verdict import Figures, between, ratio, retrieved, significant


def compare(figures: Figures) -> list[dict]:
    """Return for each variant and length what it is against the trained one, or else against the base.

    At the original and the target length. Each has ``variant``, ``reference``, ``length``, ``perplexity``
    and ``passkey`` (``value``, ``low``, ``high``, ``significant``, or None where one was not evaluated), and
    a ``sentence``.
    """
    names = list(dict.fromkeys([*figures.perplexity, *figures.passkey]))
    reference = "trained" if "trained" in names else "base"
    found = []
    for variant in names:
        for length in sorted({figures.original, figures.target}):
            perplexity = perplexity_ratio(figures, variant, reference, length)
            passkey = passkey_difference(figures, variant, reference, length)
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


def perplexity_ratio(figures: Figures, variant: str, reference: str, length: int) -> dict | None:
    """Return a variant's perplexity over the reference's; no interval, with one document, decides nothing."""
    try:
        value, low, high = ratio(figures, variant, length, reference, length)
    except KeyError:
        return None
    return _figure(value, low, high, low < high and not low <= 1 <= high)


def passkey_difference(figures: Figures, variant: str, reference: str, length: int) -> dict | None:
    """Return the share of passkeys that a variant finds less that of the reference."""
    try:
        ours, theirs = (retrieved(figures, name, length) for name in (variant, reference))
    except KeyError:
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


def points(share: float) -> str:
    """Write a difference of shares in percentage points, with its sign."""
    text = f"{100 * share:+.1f}".removesuffix(".0")
    return "0" if text in ("+0", "-0") else text.replace("-", "\N{MINUS SIGN}")
