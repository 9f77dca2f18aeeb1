"""Perplexity of one variant on the held-out documents, at each window length.

For each length L the same text is tiled in windows of L (or slid by a stride), and exactly the same
tokens are scored at every length: a token that begins a window at any length, and so has no context
there, is scored at none.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from longyarn import evaluation, statistics
from longyarn.cli import UserError, program, progress
from longyarn.tokens import held_out_documents

LOGITS_AT_ONCE = 1024  # positions whose logits are in memory together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    evaluation.add_model_arguments(parser)
    parser.add_argument("--tokens", type=Path, required=True, help="manifest of the tokens")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="window lengths")
    parser.add_argument("--stride", type=int, help="tokens between windows; default: the length")
    parser.add_argument("--tokens-per-document", type=int, required=True, help="at most this many")
    arguments = parser.parse_args()
    documents = held_out_documents(arguments.tokens)
    kept, too_short = whole_windows(
        {name: len(ids) for name, ids in documents.items()},
        max(arguments.lengths),
        arguments.tokens_per_document,
    )
    texts = {name: documents[name][:length] for name, length in kept.items()}
    for name in too_short:
        print(f"perplexity: {name} is too short and left out", file=sys.stderr)
    model = evaluation.load(arguments)

    scored = {
        name: scored_everywhere(len(ids), arguments.lengths, arguments.stride)
        for name, ids in texts.items()
    }
    facts = {"tokens_scored": int(sum(mask.sum() for mask in scored.values())), "lengths": {}}
    for length in arguments.lengths:
        losses = {
            name: float(token_losses(model, ids, length, arguments.stride)[scored[name]].sum())
            for name, ids in progress(
                texts.items(), len(texts), f"perplexity of {arguments.variant} at {length}"
            )
        }
        counts = np.asarray([scored[name].sum() for name in texts])
        value, low, high = statistics.bootstrap_perplexity(
            np.asarray(list(losses.values())), counts
        )
        facts["lengths"][str(length)] = {"value": value, "low": low, "high": high, "losses": losses}
    facts["documents"] = {name: int(mask.sum()) for name, mask in scored.items()}
    facts["too_short"] = too_short
    evaluation.write(
        arguments,
        script=Path(__file__),
        settings={
            "lengths": arguments.lengths,
            "stride": arguments.stride,
            "tokens_per_document": arguments.tokens_per_document,
        },
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


def windows(total: int, length: int, stride: int | None) -> list[tuple[int, int, int]]:
    """Return ``(begin, end, first)`` for each window: its tokens, and the first that it scores.

    Without a stride windows do not overlap and each scores all but its first token. With one, each
    after the first scores only the ``stride`` tokens that no window before it has scored.
    """
    stride = stride or length
    found, scored = [], 1
    for begin in range(0, total, stride):
        end = min(begin + length, total)
        found.append((begin, end, max(scored, begin + 1)))
        scored = end
        if end == total:
            break
    return found


def scored_everywhere(total: int, lengths: list[int], stride: int | None) -> np.ndarray:
    """Return which tokens are scored at every length, bool (total,)."""
    everywhere = np.ones(total, dtype=bool)
    for length in lengths:
        here = np.zeros(total, dtype=bool)
        for _, end, first in windows(total, length, stride):
            here[first:end] = True
        everywhere &= here
    return everywhere


def token_losses(model, ids: np.ndarray, length: int, stride: int | None) -> np.ndarray:
    """Return each token's negative log-likelihood in nats, float64 (tokens,); unscored ones are nan.

    Only the logits that are scored are computed, some at a time, in float32.
    """
    import torch

    losses = np.full(len(ids), np.nan)
    for begin, end, first in windows(len(ids), length, stride):
        window = torch.from_numpy(ids[begin:end].astype(np.int64))[None].to(model.device)
        with torch.inference_mode():
            hidden = model.get_decoder()(input_ids=window, use_cache=False).last_hidden_state[0]
            for at in range(first, end, LOGITS_AT_ONCE):
                to = min(at + LOGITS_AT_ONCE, end)
                logits = model.get_output_embeddings()(hidden[at - 1 - begin : to - 1 - begin])
                targets = window[0, at - begin : to - begin].to(logits.device)
                loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
                losses[at:to] = loss.double().cpu().numpy()
    return losses


if __name__ == "__main__":
    program(main)()
