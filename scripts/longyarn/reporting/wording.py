"""How the report writes its numbers: perplexities, shares, intervals and sizes."""


def significant(value: float) -> str:
    """Write a perplexity, a loss or a ratio with four significant digits."""
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def percent(share: float) -> str:
    """Write a share (0 to 1) in percent, with at most one decimal; never round it to 0 or 100 %."""
    if 1e-9 < share < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= share < 1 - 1e-9:
        return "> 99.9 %"
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def points(share: float) -> str:
    """Write a difference of two shares in percentage points, with its sign."""
    text = f"{100 * share:+.1f}".removesuffix(".0")
    return "0" if text in ("+0", "-0") else text.replace("-", "\N{MINUS SIGN}")


def between(low: float, high: float, write=significant) -> str:
    """Write an interval, with its unit once; ``write`` writes one number."""
    return f"{write(low).removesuffix(' %')} to {write(high)}"


def count(found: dict) -> str:
    """Write successes and trials: 28 of 30."""
    return f"{found['successes']} of {found['trials']}"


def clause(sentence: str) -> str:
    """Return a sentence in the form that it has inside another sentence."""
    return sentence[0].lower() + sentence[1:].removesuffix(".")


def capitalized(text: str) -> str:
    """Return a text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def size(count: int) -> str:
    """Write a number of bytes in the unit that suits it."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} bytes"
