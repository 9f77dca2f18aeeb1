"""Progress of training: for each log entry, a line to read and a line of JSON."""

import json
import math
import resource
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from longyarn.core.console import duration
from longyarn.core.files import write_text
from longyarn.training.deepspeed_setup import say


class Metrics(TrainerCallback):
    """Prints a line for each log entry and appends it to a JSON lines file, in the first process.

    ``file``: where to append; with None it only prints. ``tokens_per_step``: of the whole job, like
    ``flops_per_token`` (of training) and ``peak_flops`` (operations per second of all GPUs), which give the
    model FLOPs utilization (MFU).

    A line of the file has ``step``, ``loss``, ``learning_rate``, ``grad_norm``, ``tokens`` (trained on
    since step 0), ``tokens_per_second`` (since the previous entry), ``seconds`` (of training since step 0,
    over all attempts), ``memory_bytes`` (peak of the first process, on its GPU if it has one) and, where
    known, ``mfu`` (a fraction). Or it has ``step`` and the losses on the held-out documents, each as
    ``held_out_<length>``. A number that is not finite is null.
    """

    def __init__(
        self,
        file: Path | None,
        *,
        tokens_per_step: int,
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
    ) -> None:
        self.file = Path(file) if file else None
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops

    def on_train_begin(self, args, state, control, **kwargs):
        """Remove the lines after the checkpoint from the file, and start the clock."""
        kept = []
        if self.file and state.is_world_process_zero:
            kept = keep_until(self.file, state.global_step)
        self.seconds_before = max((line.get("seconds", 0.0) for line in kept), default=0.0)
        self.begin = self.last = time.monotonic()
        self.first_step = self.last_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print and append an entry with a loss; only append one with held-out losses."""
        if not (logs and state.is_world_process_zero):
            return
        if held_out := {key: logs[key] for key in logs if key.startswith("held_out_")}:
            self._append({"step": state.global_step} | held_out)
        if "loss" not in logs:
            return
        now, step = time.monotonic(), state.global_step
        elapsed = now - self.begin
        rate = (step - self.last_step) * self.tokens_per_step / (now - self.last)
        self.last, self.last_step = now, step
        line = {
            "step": step,
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens": step * self.tokens_per_step,
            "tokens_per_second": rate,
            "seconds": self.seconds_before + elapsed,
            "memory_bytes": peak_memory(args.device),
        }
        if self.peak_flops and self.flops_per_token and args.device.type == "cuda":
            line["mfu"] = self.flops_per_token * rate / self.peak_flops
        self._append(line)
        left = elapsed / max(1, step - self.first_step) * (state.max_steps - step)
        say(describe(line, state.max_steps, left))

    def _append(self, line: dict) -> None:
        if self.file:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps({key: finite(value) for key, value in line.items()}) + "\n")


def describe(line: dict, steps: int, left: float) -> str:
    """Return the line of progress for a line of the file; ``left``: the seconds left."""
    parts = [
        f"learning rate {line['learning_rate']:.2e}" if line["learning_rate"] is not None else "",
        f"grad norm {line['grad_norm']:.3f}" if line["grad_norm"] is not None else "",
        f"{line['tokens_per_second']:.0f} tokens/s",
        f"{line['memory_bytes'] / 2**30:.1f} GiB",
        f"MFU {line['mfu']:.1%}" if "mfu" in line else "",
        f"{duration(left)} left",
    ]
    told = ", ".join(part for part in parts if part)
    return f"train: step {line['step']}/{steps} loss {line['loss']:.4f} ({told})"


def peak_memory(device: torch.device) -> int:
    """Return this process's peak memory in bytes: allocated on its GPU, or else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def finite(value: float | None) -> float | None:
    """Return the value, or None for a number that JSON cannot express."""
    return value if value is None or math.isfinite(value) else None


def keep_until(file: Path, step: int) -> list[dict]:
    """Remove the lines after ``step`` and incomplete ones from a metrics file; return the lines kept.

    An attempt that was killed has logged steps after its last checkpoint, which will be trained again.
    """
    kept = [line for line in read(file) if line["step"] <= step] if file.is_file() else []
    write_text(file, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def read(file: Path) -> list[dict]:
    """Return the lines of a metrics file, except any that a crash left incomplete."""
    lines = []
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines
