"""Guards of training: they check the model before the first step, every step, and the trend of the loss."""

from collections.abc import Callable
from statistics import fmean, pstdev

import torch
from transformers import TrainerCallback

from longyarn.core.errors import UserError
from longyarn.rope.record import RopeRecord
from longyarn.training.deepspeed_setup import say

FINITE, GRADIENT_IS_BAD, LOSS_IS_BAD = range(3)
NAMED = 5  # documents listed in a message
WINDOW, ENOUGH = 50, 5  # logged losses to compare a spike with: at most, at least
COMPARED = 10  # logged losses at either end that show divergence


class Guards(TrainerCallback):
    """Checks the model before the first step, every step, and the trend of the loss.

    ``rope``: the run's RoPE. ``documents`` returns the names of the documents in a step's
    batch (the first step is 1), and ``last_good`` the name of the newest whole checkpoint or None. Both
    are for the message about a step that is not finite. ``longyarn.training.trainer.Trainer`` calls
    ``saw_loss`` and ``check_step``, because transformers has no event that shows a callback the loss and
    gradient of every step.
    """

    def __init__(
        self,
        rope: RopeRecord,
        document_masks: bool,
        *,
        documents: Callable[[int], list[str]] | None = None,
        last_good: Callable[[], str | None] | None = None,
    ) -> None:
        self.rope = rope
        self.document_masks = document_masks
        self.documents = documents
        self.last_good = last_good
        self.passed: dict[str, object] = {}
        self.loss_is_bad: torch.Tensor | None = None  # of any micro-batch in the current step

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Check the rotation and, if documents are masked, the masks."""
        self.rope.check_model(model)
        self.passed["inverse_frequencies_float32"] = True
        if self.document_masks:
            self.passed["document_mask_leak"] = check_masks(model, args.per_device_train_batch_size)

    def saw_loss(self, loss: torch.Tensor) -> None:
        """Remember whether a micro-batch's loss is finite, on its device, so that nothing waits for it."""
        bad = ~torch.isfinite(loss.detach())
        self.loss_is_bad = bad if self.loss_is_bad is None else self.loss_is_bad | bad

    def check_step(self, step: int, gradient_is_bad: bool, device: torch.device) -> None:
        """Raise ``UserError`` in all processes if the step was not finite in any of them."""
        found = torch.tensor(GRADIENT_IS_BAD if gradient_is_bad else FINITE, device=device)
        if self.loss_is_bad is not None:
            found = torch.maximum(found, self.loss_is_bad.to(found) * LOSS_IS_BAD)
        self.loss_is_bad = None
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        if found == FINITE:
            return
        what = "loss" if found == LOSS_IS_BAD else "gradient"
        batch = f" on {listed(self.documents(step))}" if self.documents else ""
        last = self.last_good() if self.last_good else None
        raise UserError(
            f"the {what} is not finite at step {step}{batch}; this step was not saved, and "
            f"{f'the last good checkpoint is {last}' if last else 'there is no checkpoint yet'}: check the "
            "batch, lower training.learning_rate or choose another training.precision, and run again"
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Warn about a loss that jumps or keeps rising.

        Everything comes from the logged history, which checkpoints contain, so a resumed run gives the
        same warnings.
        """
        if not (logs and "loss" in logs):
            return
        entries = [entry for entry in state.log_history if "loss" in entry]
        losses = [entry["loss"] for entry in entries]
        if usual := spike(losses):
            say(
                f"train: warning: the loss jumped to {losses[-1]:.4f} at step {state.global_step} from "
                f"an average of {usual:.4f}; check that it comes down again"
            )
        warm = args.get_warmup_steps(state.max_steps)
        settled = [entry["loss"] for entry in entries if entry["step"] > warm]
        if diverges(settled) and not diverges(settled[:-1]):  # once, when it begins
            say(
                f"train: warning: the loss is rising: it averages {fmean(settled[-COMPARED:]):.4f} at step "
                f"{state.global_step} and averaged {fmean(settled[:COMPARED]):.4f} after the warm-up; if "
                "this continues, lower training.learning_rate"
            )


def listed(documents: list[str]) -> str:
    """Return a batch's documents for a message: at most five, and how many more there are."""
    more = len(documents) - NAMED
    return ", ".join(documents[:NAMED]) + (f" and {more} more documents" if more > 0 else "")


def spike(losses: list[float]) -> float | None:
    """Return the mean of up to 50 losses before the last one if that is a spike, else None.

    A spike is more than six standard deviations above the mean, which ordinary noise does not reach, and
    more than 20 % above it, because the deviation of a few similar losses says little.
    """
    before = losses[-1 - WINDOW : -1]
    if len(before) < ENOUGH:
        return None
    mean = fmean(before)
    return mean if losses[-1] > mean + max(6 * pstdev(before), 0.2 * mean) else None


def diverges(losses: list[float]) -> bool:
    """Return whether the mean of the last ten losses is more than 10 % above that of the first ten."""
    if len(losses) < 2 * COMPARED:
        return False
    return fmean(losses[-COMPARED:]) > 1.1 * fmean(losses[:COMPARED])


def check_masks(model, micro_batch_size: int = 1, length: int = 16) -> float:
    """Return how much a document sees of the one before it; raise ``UserError`` if it is too much.

    The leak is the largest difference between a document's logits when it is packed behind another and
    when it is alone, relative to the largest logit. Several things switch masks off silently: an
    attention_mask that is passed, a cache, some attention kernels, and with others more than one
    sequence. So this checks what the model does, with ``micro_batch_size`` random sequences of two
    documents of ``length`` tokens.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    size = (2, micro_batch_size, length)
    first, second = torch.randint(vocabulary, size, generator=generator).to(model.device)
    alone_positions = torch.arange(length, device=model.device).expand(micro_batch_size, length)
    both = torch.cat([first, second], dim=1)
    both_positions = torch.cat([alone_positions, alone_positions], dim=1)
    with torch.no_grad():
        packed = model(input_ids=both, position_ids=both_positions, use_cache=False).logits
        alone = model(input_ids=second, position_ids=alone_positions, use_cache=False).logits
    model.train(was_training)
    difference = (packed[:, length:].float() - alone.float()).abs().max()
    leak = float(difference / alone.float().abs().max())
    tolerance = 1e-4 if alone.dtype == torch.float32 else 3e-2
    if not leak <= tolerance:
        raise UserError(
            f"document masks have no effect (leak {leak:.1e}), because training.attention "
            f"{model.config._attn_implementation} drops them here; choose another, or set "
            "mix.document_masks to false"
        )
    return leak
