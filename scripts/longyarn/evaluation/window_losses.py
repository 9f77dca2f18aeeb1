"""Windows over documents, and the loss of each token that a window scores.

A document's tokens are read in windows, with one forward pass for each window or for several short ones
of equal length. Logits are computed only for the tokens that a window scores, and in chunks.
"""

from typing import NamedTuple

import numpy as np

from longyarn.core.console import progress
from longyarn.models.logits import logits as logits_of

TOKENS_AT_ONCE = 1024  # tokens in one forward pass; a longer window has a pass of its own
LOGITS_AT_ONCE = 1024  # positions whose logits are in memory at the same time


class Window(NamedTuple):
    """A document's tokens from ``begin`` to ``end``; those from ``first`` on are scored."""

    document: str
    begin: int
    end: int
    first: int

    @property
    def length(self) -> int:
        """The number of tokens that are read."""
        return self.end - self.begin


def windows(document: str, total: int, length: int, stride: int | None = None) -> list[Window]:
    """Return the windows of ``length`` over a document of ``total`` tokens.

    Without a stride, windows do not overlap, and each scores all its tokens except the first, which has no
    context. With a stride, each window after the first scores only tokens that no earlier window has
    scored: its last ``stride`` tokens, or what is left at the document's end.
    """
    stride = stride or length
    found, scored = [], 1
    for begin in range(0, total, stride):
        end = min(begin + length, total)
        found.append(Window(document, begin, end, max(scored, begin + 1)))
        scored = end
        if end == total:
            break
    return found


def batches(windows: list[Window]) -> list[list[Window]]:
    """Group neighboring windows of equal length; each group has one forward pass."""
    groups: list[list[Window]] = []
    for window in windows:
        last = groups[-1] if groups else []
        if (
            last
            and last[0].length == window.length
            and (len(last) + 1) * window.length <= TOKENS_AT_ONCE
        ):
            last.append(window)
        else:
            groups.append([window])
    return groups


def window_losses(
    model, texts: dict[str, np.ndarray], length: int, stride: int | None, label: str
) -> dict[str, list[np.ndarray]]:
    """Return the negative log-likelihoods, in nats, that each window of each document scores.

    ``texts`` holds token ids by document. The losses are float64 (scored tokens,), in the order of a
    document's windows. ``label`` names the work on the progress line.
    """
    every = [
        window for name, ids in texts.items() for window in windows(name, len(ids), length, stride)
    ]
    losses: dict[str, list[np.ndarray]] = {name: [] for name in texts}
    for batch in progress(batches(every), len(every), label, size=len):
        read = np.stack([texts[window.document][window.begin : window.end] for window in batch])
        for window, found in zip(batch, _scored_losses(model, read, batch), strict=True):
            losses[window.document].append(found)
    return losses


def _scored_losses(model, read: np.ndarray, batch: list[Window]) -> list[np.ndarray]:
    """Return the losses of the tokens that each window scores, float64, from one forward pass."""
    import torch

    tokens = torch.from_numpy(read.astype(np.int64)).to(model.device)
    found = []
    with torch.inference_mode():
        hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        for window, states, ids in zip(batch, hidden, tokens, strict=True):
            losses = np.empty(window.end - window.first)
            first = window.first - window.begin
            for at in range(first, window.length, LOGITS_AT_ONCE):
                to = min(at + LOGITS_AT_ONCE, window.length)
                logits = logits_of(model, states[at - 1 : to - 1])
                targets = ids[at:to].to(logits.device)
                loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                losses[at - first : to - first] = loss.double().cpu().numpy()
            found.append(losses)
    return found
