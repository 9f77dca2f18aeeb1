"""What perplexity and passkey found, and the numbers that the report derives from it.

A *ratio* is one perplexity divided by another over the same tokens. Its 95 % interval is bootstrapped over
documents, in pairs, so the difficulty of a document cancels out.
"""

from dataclasses import dataclass

import numpy as np

from longyarn.core.errors import UserError
from longyarn.evaluation import intervals


class NotEvaluated(Exception):
    """A number was asked for that no stage measured; the text says which, to stand inside a sentence."""


@dataclass(frozen=True)
class Results:
    """What was found for each variant, and the two lengths, in tokens, that the report compares.

    ``perplexity`` holds each variant's facts as the stage perplexity wrote them. ``passkey`` holds each
    variant's grid (length → depth → successes and trials) as the stage passkey wrote it.
    """

    original: int
    target: int
    perplexity: dict[str, dict]
    passkey: dict[str, dict]

    @property
    def lengths(self) -> list[int]:
        """The original and the target length; one length if they are equal."""
        return sorted({self.original, self.target})

    def losses(self, variant: str, length: int) -> dict[str, float]:
        """Return each document's summed loss in nats; raise ``NotEvaluated`` if there is none."""
        facts = self.perplexity.get(variant)
        if facts is None:
            raise NotEvaluated(f"perplexity of {variant!r} was not evaluated")
        if str(length) not in facts["lengths"]:
            raise NotEvaluated(f"perplexity of {variant!r} was not evaluated at {length:,} tokens")
        return facts["lengths"][str(length)]["losses"]

    def ratio(
        self, above: str, above_length: int, below: str, below_length: int
    ) -> tuple[float, float, float]:
        """Return ``(value, low, high)`` of one variant's perplexity divided by another's.

        Raise ``NotEvaluated`` if one of them is missing, ``UserError`` if their tokens differ.
        """
        top, bottom = self.losses(above, above_length), self.losses(below, below_length)
        tokens = self.perplexity[above]["documents"]
        if tokens != self.perplexity[below]["documents"]:
            raise UserError(
                f"the perplexities of {above!r} and of {below!r} were computed over different tokens; "
                "delete both manifests and run again"
            )
        names = list(tokens)
        return intervals.bootstrap_perplexity(
            np.asarray([top[name] - bottom[name] for name in names]),
            np.asarray([tokens[name] for name in names]),
        )

    def retrieved(self, variant: str, length: int) -> dict:
        """Return a variant's passkeys at a length, pooled over depths; raise ``NotEvaluated`` if none."""
        grid = self.passkey.get(variant)
        if grid is None:
            raise NotEvaluated(f"passkey of {variant!r} was not evaluated")
        if str(length) not in grid:
            raise NotEvaluated(f"passkey of {variant!r} was not evaluated at {length:,} tokens")
        return pooled(grid[str(length)])


def pooled(cells: dict) -> dict:
    """Return the summed ``successes`` and ``trials`` of some cells, with Wilson's interval of the rate."""
    successes = sum(cell["successes"] for cell in cells.values())
    trials = sum(cell["trials"] for cell in cells.values())
    low, high = intervals.wilson(successes, trials)
    return {"successes": successes, "trials": trials, "low": low, "high": high}


def rate(found: dict) -> tuple[float, float, float]:
    """Return ``(value, low, high)`` of a rate of success."""
    return found["successes"] / found["trials"], found["low"], found["high"]
