"""The perplexity protocols: which tokens each one scores, and the figures that it reports.

``tiled`` is always computed. It reads the same text in windows of each length, without overlap, and
scores exactly the same tokens at every length: a token that begins a window at any length has no context
there, so it is scored at none. ``truncate`` scores the first window of each document. ``by_position``
groups losses by their position in the longest window. ``sliding`` uses overlapping windows, each of which
scores its last tokens. docs/evaluation.md has the formulas and the sources.
"""

import math
from itertools import pairwise

import numpy as np

from longyarn.core.errors import UserError
from longyarn.evaluation import intervals


def whole_windows(
    documents: dict[str, int], longest: int, limit: int
) -> tuple[dict[str, int], list[str]]:
    """Return how many tokens to take of each document, and which documents are too short.

    ``documents`` maps names to numbers of tokens. The tokens taken are whole windows of the ``longest``
    length, at most ``limit`` tokens. Raise ``UserError`` if every document is shorter than one window.
    """
    kept = {name: min(length, limit) // longest * longest for name, length in documents.items()}
    if not any(kept.values()):
        raise UserError(
            f"no held-out document has {longest} tokens; hold out longer documents (corpus.held_out) or "
            "lower evaluation.perplexity.lengths"
        )
    too_short = [name for name, length in kept.items() if not length]
    return {name: length for name, length in kept.items() if length}, too_short


def measure(losses, documents: dict[str, np.ndarray], kept: dict[str, int], settings: dict) -> dict:
    """Return the facts of every protocol that ``settings``, section evaluation.perplexity, asks for.

    ``losses(texts, length, stride)`` is ``window_losses`` of the model. ``documents`` holds token ids by
    name. ``kept`` holds, for each document that is long enough, how many tokens ``tiled`` reads.
    """
    lengths, longest = settings["lengths"], max(settings["lengths"])
    tiles = {name: documents[name][:count] for name, count in kept.items()}
    facts, whole = tiled(losses, tiles, lengths)
    if settings["truncate"]:
        facts["truncate"] = truncate(whole, settings["truncate"]["lengths"] or lengths)
    if settings["by_position"]:
        facts["by_position"] = by_position(whole, longest, settings["by_position"]["buckets"])
    if settings["sliding"]:
        texts = {name: documents[name][: settings["tokens_per_document"]] for name in kept}
        facts["sliding"] = sliding(losses, texts, **settings["sliding"])
    return facts


def tiled(losses, texts: dict[str, np.ndarray], lengths: list[int]) -> tuple[dict, dict]:
    """Return the figures of windows of each length over the same tokens, and the longest windows' losses.

    The ``texts`` must be whole windows of the longest length.
    """
    scored = {name: scored_everywhere(len(ids), lengths) for name, ids in texts.items()}
    figures, whole = {}, {}
    for length in lengths:
        found = losses(texts, length)
        if length == max(lengths):
            whole = found
        tiles = {
            name: np.split(mask, range(length, len(mask), length)) for name, mask in scored.items()
        }
        figures[str(length)] = figure(
            {
                name: [part[mask[1:]] for part, mask in zip(parts, tiles[name], strict=True)]
                for name, parts in found.items()
            }
        )
    counts = {name: int(mask.sum()) for name, mask in scored.items()}
    return {"tokens_scored": sum(counts.values()), "lengths": figures, "documents": counts}, whole


def scored_everywhere(total: int, lengths: list[int]) -> np.ndarray:
    """Return which tokens have a context in windows of every length, bool (total,)."""
    everywhere = np.ones(total, dtype=bool)
    for length in lengths:
        everywhere[::length] = False
    return everywhere


def truncate(whole: dict[str, list[np.ndarray]], lengths: list[int]) -> dict[str, dict]:
    """Return the figure of each document's first window, by the window's length.

    ``whole`` has the losses of windows of the longest length. The model is causal and its RoPE does not
    change with the length (longyarn.rope.parameters refuses any that does). So a token's loss is the same
    in every window that begins where this one does, and one forward pass serves all lengths.
    """
    return {
        str(length): figure({name: [parts[0][: length - 1]] for name, parts in whole.items()})
        for length in lengths
    }


def by_position(whole: dict[str, list[np.ndarray]], length: int, buckets: int) -> dict[str, dict]:
    """Return the figure of each bucket of positions in the window, by the position where it ends.

    ``whole`` has the losses of windows of ``length`` tokens. The buckets have equal widths. The window's
    first token has no context and no loss.
    """
    ends = [length * number // buckets for number in range(buckets + 1)]
    return {
        str(end): figure(
            {
                name: [losses[max(begin, 1) - 1 : end - 1] for losses in parts]
                for name, parts in whole.items()
            }
        )
        for begin, end in pairwise(ends)
    }


def sliding(
    losses, texts: dict[str, np.ndarray], lengths: list[int], stride: int
) -> dict[str, dict]:
    """Return the figure of windows that begin every ``stride`` tokens, by the window's length.

    Each window after the first scores its last ``stride`` tokens. So every token of a document except the
    first is scored once, with a context of at least ``length - stride`` tokens after the first window.
    """
    return {str(length): figure(losses(texts, length, stride)) for length in lengths}


def figure(scored: dict[str, list[np.ndarray]]) -> dict:
    """Return the perplexity, averaged in two ways, of the losses that each document's windows score.

    ``value``, with its 95 % interval from ``low`` to ``high``, gives every token the same weight.
    ``window_mean`` is exp of the mean over windows of each window's mean loss, as in the code published
    with YaRN (arXiv 2309.00071). ``losses`` are the sums of each document, in nats.
    """
    losses = {name: float(np.concatenate(parts).sum()) for name, parts in scored.items()}
    tokens = np.asarray([sum(map(len, parts)) for parts in scored.values()])
    value, low, high = intervals.bootstrap_perplexity(np.asarray(list(losses.values())), tokens)
    means = [part.mean() for parts in scored.values() for part in parts if len(part)]
    return {
        "value": value, "low": low, "high": high, "window_mean": math.exp(np.mean(means)),
        "losses": losses,
    }  # fmt: skip
