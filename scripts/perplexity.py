"""Perplexity of one variant on the held-out documents, by each protocol that the config names.

``tiled``, always made: the same text in windows of each length, without overlap, and exactly the same
tokens scored at every length: a token that begins a window at any length, and so has no context there,
is scored at none. ``truncate``: the first window of each document. ``by_position``: losses by the place
in the longest window. ``sliding``: overlapping windows, of which each scores its last tokens.
docs/evaluation.md has the formulas and the sources.
"""

import argparse
import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

from longyarn.core.errors import UserError, program
from longyarn.data.token_store import held_out_documents
from longyarn.evaluation import intervals, variant_model
from longyarn.evaluation.window_losses import window_losses
from longyarn.models.logits import check_logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    variant_model.add_model_arguments(parser)
    parser.add_argument("--tokens", type=Path, required=True, help="manifest of the tokens")
    parser.add_argument(
        "--settings", type=json.loads, required=True,
        help="config section `evaluation.perplexity`, as JSON",
    )  # fmt: skip
    arguments = parser.parse_args()
    settings = arguments.settings
    longest = max(settings["lengths"])
    documents = held_out_documents(arguments.tokens)
    counts = {name: len(ids) for name, ids in documents.items()}
    kept, too_short = whole_windows(counts, longest, settings["tokens_per_document"])
    if too_short:
        print(
            f"perplexity: {len(too_short)} of {len(documents)} held-out documents have fewer than "
            f"{longest} tokens and are left out: {', '.join(too_short)}",
            file=sys.stderr,
        )
    model = variant_model.load(arguments)
    check_logits(model)

    def losses(texts: dict[str, np.ndarray], length: int, stride: int | None = None) -> dict:
        label = f"perplexity of {arguments.variant} at {length}"
        found = window_losses(model, texts, length, stride, label)
        if not all(np.isfinite(part).all() for parts in found.values() for part in parts):
            raise UserError(
                f"losses of {arguments.variant} at {length} tokens are no numbers in "
                f"{arguments.precision}; set evaluation.precision to bf16 or fp32"
            )
        return found

    facts = measure(losses, documents, kept, settings) | {"too_short": too_short}
    variant_model.write(
        arguments,
        script=Path(__file__),
        settings=settings,
        inputs={"tokens": arguments.tokens},
        facts=facts,
    )
    told = (f"{found['value']:.4g} at {length}" for length, found in facts["lengths"].items())
    print(f"perplexity of {arguments.variant}: {', '.join(told)}", file=sys.stderr)


def whole_windows(
    documents: dict[str, int], longest: int, limit: int
) -> tuple[dict[str, int], list[str]]:
    """Return how many tokens to take of each document, and which are too short for one window.

    ``documents`` has their token counts. The taken tokens are whole windows of the longest length,
    at most ``limit``.
    """
    kept = {name: min(length, limit) // longest * longest for name, length in documents.items()}
    if not any(kept.values()):
        raise UserError(
            f"no held-out document has {longest} tokens; hold out longer ones (corpus.held_out) or "
            "lower evaluation.perplexity.lengths"
        )
    too_short = [name for name, length in kept.items() if not length]
    return {name: length for name, length in kept.items() if length}, too_short


def measure(losses, documents: dict[str, np.ndarray], kept: dict[str, int], settings: dict) -> dict:
    """Return the facts of every protocol that ``settings``, section evaluation.perplexity, asks for.

    ``losses(texts, length, stride)`` is ``window_losses`` of the model. ``documents`` holds token ids,
    ``kept`` how many of those that are long enough ``tiled`` reads.
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
    """Return the facts of windows of each length over the same tokens, and the losses of the longest.

    ``texts`` are whole windows of the longest length.
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
    """Return which tokens have a context in tiles of every length, bool (total,)."""
    everywhere = np.ones(total, dtype=bool)
    for length in lengths:
        everywhere[::length] = False
    return everywhere


def truncate(whole: dict[str, list[np.ndarray]], lengths: list[int]) -> dict[str, dict]:
    """Return the figure of each document's first window, by the window's length.

    ``whole`` has the losses of windows of the longest length. The model is causal and its RoPE does not
    change with the length (longyarn.rope.parameters refuses any that does). So a token's loss is the same
    in every window that begins where this one does, and one pass serves all lengths.
    """
    return {
        str(length): figure({name: [parts[0][: length - 1]] for name, parts in whole.items()})
        for length in lengths
    }


def by_position(whole: dict[str, list[np.ndarray]], length: int, buckets: int) -> dict[str, dict]:
    """Return the figure of each part of the window, by the position at which the part ends.

    ``whole`` has the losses of windows of ``length`` tokens; the parts are of equal width. The window's
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

    Each window after the first scores its last ``stride`` tokens, so every token but a document's first
    is scored once, with at least ``length - stride`` tokens before it from the second window on.
    """
    return {str(length): figure(losses(texts, length, stride)) for length in lengths}


def figure(scored: dict[str, list[np.ndarray]]) -> dict:
    """Return perplexity by both averagings from the losses that each window of each document scores.

    ``value``, with its interval ``low`` to ``high``, weighs every token the same; ``window_mean`` is
    exp of the mean over windows of each window's mean loss, as in the code that came with YaRN.
    ``losses`` are the documents' sums.
    """
    losses = {name: float(np.concatenate(parts).sum()) for name, parts in scored.items()}
    tokens = np.asarray([sum(map(len, parts)) for parts in scored.values()])
    value, low, high = intervals.bootstrap_perplexity(np.asarray(list(losses.values())), tokens)
    means = [part.mean() for parts in scored.values() for part in parts if len(part)]
    return {
        "value": value, "low": low, "high": high, "window_mean": math.exp(np.mean(means)),
        "losses": losses,
    }  # fmt: skip


if __name__ == "__main__":
    program(main)()
