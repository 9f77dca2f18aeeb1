"""Tokens per second of the training stage against a bare loop, on the inputs of the default run."""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import small_runs
import yaml
from paths import ROOT, RUN

from longyarn.config.load import complete

WARM, STEPS, ROUNDS = 2, 7, 3  # the first steps are not timed
OUR_LINE = r"train: step .* loss ([0-9.]+)"


def settings() -> dict:
    """Return the default's config section `training` for a few steps, without checkpoints in between."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    config["training"] |= {"steps": STEPS, "logging_steps": 1, "save_steps": 1000}
    return complete(config, ROOT / "schemas" / "config.schema.yaml")["training"]


def steps(command: list, line_of_a_step: str = OUR_LINE) -> tuple[float, list[float]]:
    """Run a training; return its seconds per step, timed by its lines after the first steps, and its losses.

    ``line_of_a_step``: a pattern whose group is the loss.
    """
    times, seen = [], []
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            if found := re.match(line_of_a_step, line):
                times.append(time.perf_counter())
                seen.append(float(found.group(1)))
    if process.returncode or len(times) != STEPS:
        raise SystemExit(
            f"error: {' '.join(map(str, command[:4]))}… failed or logged {len(times)} of {STEPS} steps"
        )
    return (times[-1] - times[WARM - 1]) / (STEPS - WARM), seen


def measure() -> dict:
    """Return the median tokens per second of both sides, run in turn, and of their ratio."""
    training = settings()
    bare = [sys.executable, ROOT / "benchmarks/bare_loop.py", RUN, json.dumps(training)]
    pairs = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as directory:
            stage = small_runs.train_command(RUN, Path(directory), training, rope="rope/yarn.json")
            ours, our_losses = steps(stage)
        other, other_losses = steps(bare)
        if any(abs(a - b) > 2e-4 for a, b in zip(our_losses, other_losses, strict=True)):
            raise SystemExit(f"error: losses differ: {our_losses} against {other_losses}")
        pairs.append((ours, other))
    return rates(pairs, training["batch_size"])


def rates(pairs: list[tuple[float, float]], batch_size: int) -> dict:
    """Return the median tokens per second of both sides and their ratio, from pairs of seconds per step."""
    tokens = json.loads((RUN / "pack.json").read_text())["facts"]["sequence_length"] * batch_size
    return {
        "ours": statistics.median(tokens / a for a, _ in pairs),
        "other": statistics.median(tokens / b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
