"""What watches over training: the checks before the first step, and a line for each log entry."""

import math
import os
import sys
import time

import torch
from transformers import TrainerCallback

from longyarn import models
from longyarn.cli import UserError


def say(line: str) -> None:
    """Print a line of progress from the first process."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(line, file=sys.stderr, flush=True)


class Guards(TrainerCallback):
    """Checks that run on the built engine, before the first step and at each log line."""

    def __init__(self, rope: dict, document_masks: bool) -> None:
        self.rope = rope
        self.document_masks = document_masks
        self.passed: dict[str, object] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Check the rotation, and the masks where there are any."""
        models.check_rotation(model, self.rope)
        self.passed["inverse_frequencies_float32"] = True
        if self.document_masks:
            self.passed["document_mask_leak"] = check_masks(model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Stop when the loss is not a number."""
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise UserError(
                f"the loss is {logs['loss']} at step {state.global_step}; lower training.learning_rate "
                "or choose another precision, and run again"
            )


class Lines(TrainerCallback):
    """A line of progress for each log entry: step, loss, tokens a second, time left."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.start, self.first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print a line."""
        if logs and "loss" in logs:
            done = state.global_step - self.first
            elapsed = time.monotonic() - self.start
            left = elapsed / max(1, done) * (state.max_steps - state.global_step)
            say(
                f"train: step {state.global_step}/{state.max_steps} loss {logs['loss']:.4f} "
                f"({elapsed:.0f} s, {left:.0f} s left)"
            )


def check_masks(model, length: int = 16) -> float:
    """Stop unless a piece's logits are the same packed behind another and alone; return the leak.

    The leak is the largest difference of logits relative to the largest logit. Masks have several
    silent off-switches (an attention_mask passed, a cache in use, some attention kernels), so this
    looks at what the model does.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    first, second = torch.randint(vocabulary, (2, 1, length), generator=generator).to(model.device)
    alone_positions = torch.arange(length, device=model.device)[None]
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
            f"document masks are not in force (leak {leak:.1e}): training.attention "
            f"{model.config._attn_implementation} drops them here; choose another, or set "
            "mix.document_masks to false"
        )
    return leak
