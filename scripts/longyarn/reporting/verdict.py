"""The verdict: what the figures show about the extension, and what a reader should beware of.

Pure functions of the instruments' facts. A *ratio* is one perplexity divided by another over the same
tokens; its 95 % interval is bootstrapped over documents, paired, so what the documents have in common
cancels out. A check compares the value, not the end of its interval, with the threshold, and says
when the interval reaches across it. Thresholds on the trained model are those of config section `gate`.
"""

from dataclasses import asdict, dataclass

import numpy as np

from longyarn.config.thresholds import KEY_OF
from longyarn.core.errors import UserError
from longyarn.evaluation import intervals

# Of the base, on which nothing depends but what the extension proves.
OF_THE_BASE = {
    "base_perplexity_breaks": 1.5,  # perplexity, target over original length: at least
    "base_passkey_fails": 0.10,  # share of passkeys at the target length: at most
}

FEW_DOCUMENTS = 5
SMALL_SHARE = 0.01


@dataclass(frozen=True)
class Figures:
    """What the instruments found, and the two lengths, in tokens, that the claim is about.

    ``perplexity`` holds each variant's facts as the perplexity stage wrote them; ``passkey`` each
    variant's grid, length by depth, as the passkey stage wrote it.
    """

    original: int
    target: int
    perplexity: dict[str, dict]
    passkey: dict[str, dict]


@dataclass(frozen=True)
class Check:
    """One comparison: ``decided`` tells whether the interval lies on one side of the threshold."""

    name: str
    passed: bool
    decided: bool
    value: float
    low: float
    high: float
    threshold: float
    sentence: str


def judge(figures: Figures, thresholds: dict[str, float | None]) -> dict:
    """Return the verdict: a headline, a sentence, the checks, and those that could not be made.

    ``thresholds`` is config section `gate`.
    """
    checks, missing = [], []
    for name, check in CHECKS.items():
        if figures.target == figures.original and name not in WITHOUT_EXTENSION:
            continue
        try:
            checks.append(check(name, figures, threshold_of(name, thresholds)))
        except KeyError as gap:
            missing.append({"name": name, "reason": gap.args[0]})
    return {
        "headline": headline(checks, missing),
        "sentence": sentence(checks, missing, figures),
        "checks": [asdict(check) for check in checks],
        "not_checked": missing,
    }


def threshold_of(name: str, thresholds: dict[str, float | None]) -> float:
    """Return a check's threshold; KeyError tells why there is none."""
    if name in OF_THE_BASE:
        return OF_THE_BASE[name]
    if thresholds[KEY_OF[name]] is None:
        raise KeyError(f"gate.{KEY_OF[name]} is null")
    return thresholds[KEY_OF[name]]


def trained_perplexity_holds(name: str, figures: Figures, threshold: float) -> Check:
    return at_most(
        name,
        ratio(figures, "trained", figures.target, "trained", figures.original),
        threshold,
        f"the trained model's perplexity at {figures.target:,} tokens is {{}} times its own at "
        f"{figures.original:,}",
    )


def original_length_kept(name: str, figures: Figures, threshold: float) -> Check:
    return at_most(
        name,
        ratio(figures, "trained", figures.original, "base", figures.original),
        threshold,
        f"at {figures.original:,} tokens the trained model's perplexity is {{}} times the base's",
    )


def base_perplexity_breaks(name: str, figures: Figures, threshold: float) -> Check:
    return at_least(
        name,
        ratio(figures, "base", figures.target, "base", figures.original),
        threshold,
        f"the base's perplexity at {figures.target:,} tokens is {{}} times its own at "
        f"{figures.original:,}",
    )


def trained_passkey_found(name: str, figures: Figures, threshold: float) -> Check:
    found = retrieved(figures, "trained", figures.target)
    claim = (
        f"at {figures.target:,} tokens the trained model retrieves {count(found)} passkeys, {{}}"
    )
    return at_least(name, rate(found), threshold, claim, percent)


def base_passkey_fails(name: str, figures: Figures, threshold: float) -> Check:
    found = retrieved(figures, "base", figures.target)
    claim = f"at {figures.target:,} tokens the base retrieves {count(found)} passkeys, {{}}"
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
# The checks that mean something when the model was trained at its own length.
WITHOUT_EXTENSION = ("original_length_kept", "trained_passkey_found")


def significant(value: float) -> str:
    """Write a perplexity, a loss or a ratio with four significant digits."""
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def percent(share: float) -> str:
    """Write a share of 1 in per cent, one decimal where it needs one; never 0 or 100 by rounding."""
    if 1e-9 < share < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= share < 1 - 1e-9:
        return "> 99.9 %"
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def at_most(name: str, figure: tuple, threshold: float, claim: str, words=significant) -> Check:
    """Return the check that a figure (value, low, high) is at most the threshold."""
    _, low, high = figure
    decided = high <= threshold or low > threshold
    return _check(name, figure[0] <= threshold, decided, figure, "most", threshold, claim, words)


def at_least(name: str, figure: tuple, threshold: float, claim: str, words=significant) -> Check:
    """Return the check that a figure (value, low, high) is at least the threshold."""
    _, low, high = figure
    decided = low >= threshold or high < threshold
    return _check(name, figure[0] >= threshold, decided, figure, "least", threshold, claim, words)


def _check(name, passed, decided, figure, bound, threshold, claim, words) -> Check:
    value, low, high = figure
    asked = percent(threshold) if words is percent else f"{threshold:g}"
    text = _in_words(figure, claim, words) + f", where at {bound} {asked} is asked."
    return Check(name, passed, low < high and decided, value, low, high, threshold, text)


def _in_words(figure: tuple[float, float, float], claim: str, words) -> str:
    value, low, high = figure
    interval = f" (95 % interval {between(low, high, words)})" if low < high else ""
    text = claim.format(words(value)) + interval
    return text[0].upper() + text[1:]


def between(low: float, high: float, words=significant) -> str:
    """Write an interval, with the unit once."""
    return f"{words(low).removesuffix(' %')} to {words(high)}"


def ratio(
    figures: Figures, above: str, above_length: int, below: str, below_length: int
) -> tuple[float, float, float]:
    """Return ``(value, low, high)`` of one perplexity over another, paired by document."""
    top, bottom = _losses(figures, above, above_length), _losses(figures, below, below_length)
    tokens = figures.perplexity[above]["documents"]
    if tokens != figures.perplexity[below]["documents"]:
        raise UserError(
            f"perplexity of {above!r} and of {below!r} was taken over different tokens; delete both "
            "manifests and run again, so that they are made anew"
        )
    names = list(tokens)
    return intervals.bootstrap_perplexity(
        np.asarray([top[name] - bottom[name] for name in names]),
        np.asarray([tokens[name] for name in names]),
    )


def _losses(figures: Figures, variant: str, length: int) -> dict[str, float]:
    facts = figures.perplexity.get(variant)
    if facts is None:
        raise KeyError(f"perplexity of {variant!r} was not evaluated")
    if str(length) not in facts["lengths"]:
        raise KeyError(f"perplexity of {variant!r} was not evaluated at {length:,} tokens")
    return facts["lengths"][str(length)]["losses"]


def retrieved(figures: Figures, variant: str, length: int) -> dict:
    """Return successes and trials of a variant at a length, over all depths, with the interval."""
    grid = figures.passkey.get(variant)
    if grid is None:
        raise KeyError(f"passkey of {variant!r} was not evaluated")
    if str(length) not in grid:
        raise KeyError(f"passkey of {variant!r} was not evaluated at {length:,} tokens")
    return pooled(grid[str(length)])


def pooled(depths: dict[str, dict]) -> dict:
    """Return the sum over depths of successes and trials, with the Wilson interval of the rate."""
    successes = sum(cell["successes"] for cell in depths.values())
    trials = sum(cell["trials"] for cell in depths.values())
    low, high = intervals.wilson(successes, trials)
    return {"successes": successes, "trials": trials, "low": low, "high": high}


def rate(found: dict) -> tuple[float, float, float]:
    """Return the rate of success with its interval."""
    return found["successes"] / found["trials"], found["low"], found["high"]


def count(found: dict) -> str:
    """Write successes and trials."""
    return f"{found['successes']} of {found['trials']}"


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


def sentence(checks: list[Check], missing: list[dict], figures: Figures) -> str:
    """Return what the figures show of the trained model and of the base, and what the checks say."""
    described = [
        f"{subject} {words}"
        for variant, subject in (("trained", "the trained model"), ("base", "the base"))
        if (words := describe(figures, variant))
    ]
    failed = [check for check in checks if not check.passed]
    if failed:
        outcome = "but " + "; and ".join(clause(check.sentence) for check in failed)
    elif checks:
        made = f"all {len(checks)} checks pass" if len(checks) > 1 else "the one check passes"
        outcome = "and " + (made if not missing else f"{made} that these figures allow")
        close = [check for check in checks if not check.decided and check.low < check.high]
        if close:
            names = " and ".join(f"“{check.name.replace('_', ' ')}”" for check in close)
            outcome += f", though the 95 % interval reaches across the threshold of {names}"
    else:
        outcome = "and nothing could be checked"
    if missing:
        outcome += f" ({len(missing)} not made: {missing[0]['reason']})"
    text = "; ".join([*described, outcome]) if described else outcome.removeprefix("and ")
    return text[0].upper() + text[1:] + "."


def clause(sentence: str) -> str:
    """Return a sentence to stand inside another."""
    return sentence[0].lower() + sentence[1:].removesuffix(".")


def describe(figures: Figures, variant: str) -> str:
    """Return a variant's figures at the target and at the original length, in words."""
    parts = []
    lengths = figures.perplexity.get(variant, {"lengths": {}})["lengths"]
    at = [n for n in dict.fromkeys((figures.target, figures.original)) if str(n) in lengths]
    if at:
        one = len(figures.perplexity[variant]["documents"]) == 1
        words = [
            _perplexity_words(lengths[str(n)], n, i == 0 and not one) for i, n in enumerate(at)
        ]
        parts.append("has perplexity " + " against ".join(words))
    depths = figures.passkey.get(variant, {}).get(str(figures.target))
    if depths:
        found = pooled(depths)
        parts.append(
            f"retrieves {count(found)} passkeys ({between(found['low'], found['high'], percent)}) "
            f"at {figures.target:,}"
        )
    return " and ".join(parts)


def _perplexity_words(figure: dict, length: int, first: bool) -> str:
    name = "95 % interval " if first else ""
    interval = f" ({name}{between(figure['low'], figure['high'])})"
    if figure["low"] == figure["high"]:
        interval = " (one document, so no interval)"
    unit = " tokens" if first else ""
    return f"{significant(figure['value'])}{interval} at {length:,}{unit}"


def warnings(figures: Figures, mix: dict, training: dict) -> list[str]:
    """Return a sentence for each thing that weakens the evidence.

    ``mix`` and ``training`` hold the facts of the stages pack and train.
    """
    return [
        *mix_warnings(figures, mix),
        *training_warnings(training),
        *evaluation_warnings(figures),
    ]


def mix_warnings(figures: Figures, mix: dict) -> list[str]:
    """Warn where the mix cannot teach the new positions, or does not add up."""
    found = []
    share = mix["share_past_original"]
    if figures.target > figures.original and share < SMALL_SHARE:
        found.append(
            f"Only {percent(share)} of the packed tokens stand at a position past "
            f"{figures.original:,}, so training hardly saw the new positions; bring longer documents "
            "or raise mix.long_share."
        )
    if not balanced(mix):
        found.append(
            f"The token balance is off: {mix['tokens_in']:,} came in and "
            f"{balance(mix):,} are accounted for."
        )
    return found


def balance(mix: dict) -> int:
    """Return the tokens that the mix accounts for: packed, dropped, unused, held out, duplicates."""
    parts = ("tokens_packed", "tails_dropped", "unused_by_the_mix", "held_out", "duplicates")
    return sum(mix[part] for part in parts)


def balanced(mix: dict) -> bool:
    """Tell whether every token that came in is accounted for."""
    return mix["tokens_in"] == balance(mix)


def training_warnings(training: dict) -> list[str]:
    """Warn where the loss rose, the packed sequences were not read once each, or nothing is known of it."""
    if training.get("source"):
        return elsewhere_warnings(training)
    found = []
    losses = [loss for _, loss in training["loss"]]
    quarter = max(1, len(losses) // 4)
    first, last = np.mean(losses[:quarter]), np.mean(losses[-quarter:])
    if len(losses) > 1 and last > first:
        found.append(
            f"The training loss rose, from {first:.4f} over the first quarter of its record to "
            f"{last:.4f} over the last."
        )
    if training["epochs"] > 1.0001:
        found.append(
            f"Training read the packed sequences {training['epochs']:.2f} times; more than once "
            "invites memorising."
        )
    elif training["epochs"] < 0.99:
        found.append(
            f"Training read {percent(training['epochs'])} of the packed sequences; the mix describes "
            "all of them."
        )
    return found


def elsewhere_warnings(training: dict) -> list[str]:
    """Warn of what nothing here shows of a model trained elsewhere."""
    found = [
        "The model was trained elsewhere: nothing here shows what it read, how long, or whether held-out "
        "documents were among it; the mix is what this run packed."
    ]
    if not training["rope_is_known"]:
        found.append(
            "No config.json came with the adapter, so nothing shows that it was trained with this run's RoPE."
        )
    return found


def evaluation_warnings(figures: Figures) -> list[str]:
    """Warn where the instruments rest on little, or show a loss at the original length."""
    found = []
    if figures.perplexity:
        facts = next(iter(figures.perplexity.values()))
        documents, short = len(facts["documents"]), facts["too_short"]
        if documents < FEW_DOCUMENTS:
            found.append(
                f"Perplexity rests on {documents} held-out document{'s' if documents > 1 else ''}; "
                f"with fewer than {FEW_DOCUMENTS} its interval says little."
            )
        if short:
            longest = max(int(length) for length in facts["lengths"])
            found.append(
                f"{len(short)} held-out document{'s' if len(short) > 1 else ''} with fewer than "
                f"{longest:,} tokens {'were' if len(short) > 1 else 'was'} left out of perplexity: "
                f"{', '.join(short)}."
            )
    try:
        trained = retrieved(figures, "trained", figures.original)
        base = retrieved(figures, "base", figures.original)
    except KeyError:
        return found
    if trained["high"] < base["low"]:
        found.append(
            f"At its original {figures.original:,} tokens the trained model retrieves "
            f"{count(trained)} passkeys where the base retrieved {count(base)}."
        )
    return found
