"""The loss on held-out documents during training, at the original and the full length.

The same tokens are scored at both lengths: a token that begins a tile of the original length, and so
has no context there, is scored at neither.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import TrainerCallback

from longyarn.core.errors import UserError
from longyarn.data.packed_dataset import IGNORED
from longyarn.training.deepspeed_setup import say

DOCUMENTS = 8  # at most so many are measured, so that it stays short beside training
FALLEN = 0.001  # part of the best loss that a better one must be below it


class HeldOut(TrainerCallback):
    """Measures the held-out loss every so many steps, and stops training when it falls no more.

    ``documents``: each one's token ids, int (n,); the first ``full`` tokens of up to 8 that have them
    are used. ``lengths``: ``(original, full)`` in tokens. ``every``: steps between measurements; there
    is one before the first step and one after the last too. ``patience``: measurements without a lower
    loss at full length after which training stops; None never stops it. ``log``: the Trainer's ``log``,
    which takes entries ``{"held_out_<length>": mean loss in nats a token}``.

    All processes do the same work, because under ZeRO-3 each holds a part of every weight. What was
    measured is read from the logged history, which a checkpoint has: a resumed run stops alike.
    Raises ``UserError`` when no document is long enough.
    """

    def __init__(
        self,
        documents: list[np.ndarray],
        lengths: tuple[int, int],
        every: int,
        patience: int | None,
        log: Callable[[dict], None],
    ) -> None:
        self.original, self.full = lengths
        long = [ids[: self.full] for ids in documents if len(ids) >= self.full]
        self.documents = long[:DOCUMENTS]
        if not self.documents:
            raise UserError(
                f"no held-out document has {self.full} tokens, so training.held_out_steps has nothing "
                "to measure; hold out a longer one (corpus.held_out) or set it to null"
            )
        self.every = every
        self.patience = patience
        self.log = log

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Measure the untrained model, or what a stopped run had no time for."""
        self._measure_if_due(args, state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Measure, unless training is told to stop early: then the checkpoint is what counts."""
        if not control.should_training_stop or state.global_step >= state.max_steps:
            self._measure_if_due(args, state, control, model)

    def _measure_if_due(self, args, state, control, model) -> None:
        step, key = state.global_step, f"held_out_{self.full}"
        measured = any(key in entry and entry["step"] == step for entry in state.log_history)
        if (step % self.every == 0 or step >= state.max_steps) and not measured:
            began, should_log = time.monotonic(), control.should_log
            found = losses(model, self.documents, (self.original, self.full), args.device)
            self.log({f"held_out_{length}": loss for length, loss in found.items()})
            control.should_log = should_log  # which logging has taken for its own and cleared
            told = ", ".join(f"{loss:.4f} at length {length}" for length, loss in found.items())
            say(f"train: held-out loss {told} (step {step}, {time.monotonic() - began:.0f} s)")
        history = [entry[key] for entry in state.log_history if key in entry]
        if self.patience and waited(history) >= self.patience and not control.should_training_stop:
            say(
                f"train: stopping early at step {step}: the held-out loss at length {self.full} has not "
                f"fallen below {min(history):.4f} for {self.patience} measurements"
            )
            control.should_training_stop = control.should_save = True


def waited(history: list[float]) -> int:
    """Return how many of the last losses were not below the best one before them."""
    best, count = float("inf"), 0
    for loss in history:
        count += 1
        if loss < best * (1 - FALLEN):
            best, count = loss, 0
    return count


def losses(
    model, documents: list[np.ndarray], lengths: tuple[int, int], device: torch.device
) -> dict[int, float]:
    """Return the mean loss in nats a token at each length, of the same tokens of all documents.

    ``lengths``: that of tiles that each document is cut into, and that of the documents. The model
    is left in the modes in which it was, and no random number is drawn.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return {
            length: _mean_loss(model, documents, length, lengths[0], device) for length in lengths
        }
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def _mean_loss(model, documents, length: int, tile: int, device: torch.device) -> float:
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for ids in documents:
        document = torch.from_numpy(ids.astype(np.int64))[None].to(device)
        labels = document.clone()
        labels[:, ::tile] = IGNORED  # the first of each tile has no context there
        for begin in range(0, len(ids), length):
            window = slice(begin, begin + length)
            scored = int((labels[:, window] != IGNORED).sum())
            if scored:
                loss = model(
                    input_ids=document[:, window], labels=labels[:, window], use_cache=False
                ).loss
                total += loss.double().cpu() * scored
                count += scored
    return float(total / count)
