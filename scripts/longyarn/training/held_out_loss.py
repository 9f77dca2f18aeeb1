"""The loss on held-out documents during training, at the original and the full length.

The same tokens are scored at both lengths. A token that begins a window of the original length has no
context there, so it is scored at neither length.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import TrainerCallback

from longyarn.core.errors import UserError
from longyarn.data.packed_dataset import IGNORED
from longyarn.training.deepspeed_setup import say

DOCUMENTS = 8  # measured at most, so that measuring stays short compared with training
FALLEN = 0.001  # a better loss must be below the best one by more than this fraction


class HeldOut(TrainerCallback):
    """Measures the held-out loss at intervals, and stops training when it no longer falls.

    ``documents``: the token ids of each, int (n,). Up to 8 documents with at least ``full`` tokens are
    used, cut to ``full``. ``lengths``: ``(original, full)`` in tokens. ``every``: steps between
    measurements; there is also one before the first step and one after the last. ``patience``: training
    stops after so many measurements without a lower loss at full length; None never stops it. ``log``:
    the Trainer's ``log``, which gets ``{"held_out_<length>": mean loss in nats per token}``.

    All processes do the same work, because under ZeRO-3 each holds a part of every weight. Past
    measurements are read from the logged history, which checkpoints contain, so a resumed run stops at
    the same step. Raises ``UserError`` if no document is long enough.
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
                f"no held-out document has {self.full} tokens, so there is nothing to measure; hold out a "
                "longer one (corpus.held_out), or set training.held_out_steps to null"
            )
        self.every = every
        self.patience = patience
        self.log = log

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Measure the untrained model, or make up for a measurement that a stopped run had no time for."""
        self._measure_if_due(args, state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Measure, unless training must stop early: then there is only time for the checkpoint."""
        if not control.should_training_stop or state.global_step >= state.max_steps:
            self._measure_if_due(args, state, control, model)

    def _measure_if_due(self, args, state, control, model) -> None:
        step, key = state.global_step, f"held_out_{self.full}"
        measured = any(key in entry and entry["step"] == step for entry in state.log_history)
        if (step % self.every == 0 or step >= state.max_steps) and not measured:
            began, should_log = time.monotonic(), control.should_log
            found = losses(model, self.documents, (self.original, self.full), args.device)
            self.log({f"held_out_{length}": loss for length, loss in found.items()})
            control.should_log = should_log  # logging this entry has cleared it
            told = ", ".join(f"{loss:.4f} at length {length}" for length, loss in found.items())
            say(f"train: held-out loss {told} (step {step}, {time.monotonic() - began:.0f} s)")
        history = [entry[key] for entry in state.log_history if key in entry]
        if self.patience and waited(history) >= self.patience and not control.should_training_stop:
            say(
                f"train: stopping early at step {step}: the held-out loss at length {self.full} has not "
                f"fallen below {min(history):.4f} in the last {self.patience} measurements"
            )
            control.should_training_stop = control.should_save = True


def waited(history: list[float]) -> int:
    """Return how many losses have passed since the last one that was clearly below all before it."""
    best, count = float("inf"), 0
    for loss in history:
        count += 1
        if loss < best * (1 - FALLEN):
            best, count = loss, 0
    return count


def losses(
    model, documents: list[np.ndarray], lengths: tuple[int, int], device: torch.device
) -> dict[int, float]:
    """Return the mean loss in nats per token at each of two lengths, over the same tokens.

    ``lengths``: of the windows that each document is cut into, and of the whole documents. The modules
    keep their training or evaluation mode, and no random number is drawn.
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
def _mean_loss(model, documents, length: int, window: int, device: torch.device) -> float:
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for ids in documents:
        document = torch.from_numpy(ids.astype(np.int64))[None].to(device)
        labels = document.clone()
        labels[:, ::window] = IGNORED  # the first token of a window has no context
        for begin in range(0, len(ids), length):
            part = slice(begin, begin + length)
            scored = int((labels[:, part] != IGNORED).sum())
            if scored:
                loss = model(
                    input_ids=document[:, part], labels=labels[:, part], use_cache=False
                ).loss
                total += loss.double().cpu() * scored
                count += scored
    return float(total / count)
