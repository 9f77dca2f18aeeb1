"""Small training runs without Snakemake: a random model, a few sequences, the launcher itself."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from stages import bring, make_model
from stages import run as run_stage

import patch_rope

sys.path.insert(0, str(ROOT / "benchmarks"))
import small_runs

LENGTH, BATCH, STEPS = 128, 4, 5


def settings(masks: bool = True, **changes) -> dict:
    """Return a complete config section `training`, checked like a user's."""
    training = {
        "steps": STEPS, "learning_rate": 1.0e-3, "warmup_steps": 0, "batch_size": BATCH, "threads": 1,
        "precision": "fp32", "logging_steps": 1, "gradient_checkpointing": False,
    }  # fmt: skip
    return small_runs.configured(LENGTH, training | changes, masks)["training"]


def make_inputs(directory: Path, masks: bool = True) -> Path:
    """Make base, RoPE and packed sequences below a directory, and return it."""
    base = bring(make_model(directory / "model", max_position_embeddings=LENGTH // 2), directory)
    rope = json.dumps({"method": "yarn", "target_length": LENGTH, "write_config": True})
    run_stage(
        patch_rope, "--base", base, "--settings", rope,
        "--manifest", directory / "rope.json", "--output", directory / "rope",
    )  # fmt: skip
    small_runs.write_pack(directory, small_runs.random_ids(BATCH * STEPS, LENGTH, 500), masks)
    return directory


def command(inputs: Path, output: Path, training: dict, work: Path | None = None) -> list[str]:
    """Return the command that trains, with all processes of ``training`` on this machine."""
    return small_runs.train_command(inputs, output, training, work=work, metrics=True)


def train(inputs: Path, output: Path, training: dict, check: bool = True, **more):
    """Train to the end."""
    done = subprocess.run(command(inputs, output, training, **more), capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def metrics(output: Path) -> list[dict]:
    """Return the records of steps in the metrics file."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]
