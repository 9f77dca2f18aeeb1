"""Stops training between two steps, in all processes together, with a whole checkpoint.

The reasons are a signal (SLURM sends SIGTERM before it preempts, cancels or ends a job), a time limit that
is near, and a newer attempt that has taken over. Processes may notice a reason at different steps, so
after every step they all act on the strongest one that any of them has.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from longyarn.core import attempts
from longyarn.core.errors import UserError
from longyarn.training.deepspeed_setup import say

GO_ON, SAVE, CHECKPOINT, REPLACED = range(4)

# Seconds of a job before training starts: Snakemake's own start and the check of the evaluation.
BEFORE_TRAINING = 60
# Seconds kept free at the end, for the exit itself.
MARGIN = 15


def deadline(minutes: float) -> float:
    """Return when SLURM will end this job of ``minutes``, in seconds since the epoch.

    SLURM 23.02 and later state it in the environment; otherwise it is computed from now.
    """
    told = os.environ.get("SLURM_JOB_END_TIME")
    return float(told) if told else time.time() + 60 * minutes - BEFORE_TRAINING


class Stopping(TrainerCallback):
    """Watches for reasons to stop, marks checkpoints as whole, and measures how long a stop takes.

    ``attempt``: the directory of this attempt. ``deadline``: seconds since the epoch, or None.
    ``save_minutes``: the longest time between saves, or None. ``stopped`` is the reason in words once
    training was told to stop.
    """

    def __init__(
        self, attempt: Path, deadline: float | None, save_minutes: float | None = None
    ) -> None:
        self.attempt = attempt
        self.deadline = deadline
        self.signal: int | None = None
        self.stopped: str | None = None
        self.longest_step = self.longest_save = 0.0
        self.save_minutes = save_minutes
        self.step_began = self.save_began = self.saved = time.monotonic()
        self.first_lead = max(0.0, (deadline - time.time()) / 10) if deadline else 0.0
        for number in (signal.SIGTERM, signal.SIGURG):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        self.signal = number

    def lead(self) -> float:
        """Return how many seconds before the deadline training must stop to save in time.

        This is the longest step so far, twice the longest save so far, and a margin. Before the first
        save, one tenth of the time that was left at the start stands in for the saves.
        """
        save = 2 * self.longest_save or self.first_lead
        return self.longest_step + save + MARGIN

    def wish(self) -> int:
        """Return what this process would do now if it were alone."""
        if attempts.superseded(self.attempt):
            return REPLACED
        late = self.deadline is not None and time.time() + self.lead() > self.deadline
        if self.signal or late:
            return CHECKPOINT
        due = self.save_minutes and time.monotonic() - self.saved >= 60 * self.save_minutes
        return SAVE if due else GO_ON

    def agree(self, device: torch.device) -> int:
        """Return the strongest wish of all processes; raise ``UserError`` in all if one was replaced."""
        wish = torch.tensor(self.wish(), device=device)
        torch.distributed.all_reduce(wish, torch.distributed.ReduceOp.MAX)
        if wish == REPLACED:
            raise UserError(
                f"a newer attempt has taken over {self.attempt.parent}, so this one stops; there is "
                "nothing to fix"
            )
        return int(wish)

    def on_step_begin(self, args, state, control, **kwargs):
        """Start timing the step."""
        self.step_began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        """Agree with the other processes whether to go on; either all stop or none does."""
        self.save_began = time.monotonic()
        self.longest_step = max(self.longest_step, self.save_began - self.step_began)
        wish = self.agree(args.device)
        if wish == SAVE:
            control.should_save = True
        if wish == CHECKPOINT and state.global_step < state.max_steps:
            name = signal.Signals(self.signal).name if self.signal else "the time limit"
            self.stopped = f"{name} at step {state.global_step} of {state.max_steps}"
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        """Mark the checkpoint as whole once all processes have written it, and remove older attempts."""
        torch.distributed.barrier()
        self.saved = time.monotonic()
        self.longest_save = max(self.longest_save, self.saved - self.save_began)
        if state.is_world_process_zero:
            attempts.mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if not attempts.superseded(self.attempt):
                attempts.remove_older(self.attempt)

    def end(self, device: torch.device) -> None:
        """Exit with code 75 if training was stopped; otherwise only check that no attempt is newer."""
        self.agree(device)
        if self.stopped:
            say(
                f"train: stopped by {self.stopped}; a whole checkpoint is saved, run again to resume"
            )
            sys.exit(os.EX_TEMPFAIL)  # 75, "try again": not finished, but nothing is wrong
