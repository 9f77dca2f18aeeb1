"""Small training runs without Snakemake: a random model, a few sequences, the launcher itself."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from conftest import ROOT
from safetensors.numpy import save_file
from stages import bring, make_model
from stages import run as run_stage

import patch_rope
from longyarn import config, manifest

LENGTH, BATCH, STEPS = 128, 4, 5


def settings(masks: bool = True, **changes) -> dict:
    """Return a whole config section `training`, checked as a user's is."""
    whole = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    training = {
        "steps": STEPS, "learning_rate": 1.0e-3, "warmup_steps": 0, "batch_size": BATCH, "threads": 1,
        "precision": "fp32", "logging_steps": 1, "gradient_checkpointing": False,
    }  # fmt: skip
    whole |= {"training": training | changes}
    whole["mix"]["document_masks"] = masks
    whole["rope"]["target_length"] = LENGTH
    for instrument in ("perplexity", "passkey"):
        whole["evaluation"][instrument]["lengths"] = [64]
    return config.complete(whole, ROOT / "schemas" / "config.schema.yaml")["training"]


def write_pack(directory: Path, masks: bool) -> None:
    """Write sequences of random tokens in several pieces, as the stage pack would."""
    generator = np.random.default_rng(0)
    rows, pieces = BATCH * STEPS, [LENGTH // 2, LENGTH // 4, LENGTH // 4]
    (directory / "pack").mkdir()
    file = directory / "pack" / "pack.safetensors"
    save_file(
        {
            "input_ids": generator.integers(500, size=(rows, LENGTH), dtype=np.int32),
            "piece_lengths": np.asarray(pieces * rows, np.int32),
            "piece_documents": np.arange(len(pieces) * rows, dtype=np.int32),
            "piece_offsets": np.arange(rows + 1) * len(pieces),
        },
        file,
    )
    manifest.write(
        directory / "pack.json",
        script=ROOT / "scripts/pack.py",
        settings={},
        inputs={},
        files=[file],
        facts={"document_masks": masks, "sequence_length": LENGTH, "sequences": rows},
    )


def make_inputs(directory: Path, masks: bool = True) -> Path:
    """Make base, RoPE and training sequences below a directory, and return it."""
    base = bring(make_model(directory / "model", max_position_embeddings=LENGTH // 2), directory)
    rope = json.dumps({"method": "yarn", "target_length": LENGTH, "write_config": True})
    run_stage(
        patch_rope, "--base", base, "--settings", rope,
        "--manifest", directory / "rope.json", "--output", directory / "rope",
    )  # fmt: skip
    write_pack(directory, masks)
    return directory


def command(inputs: Path, output: Path, training: dict, work: Path | None = None) -> list[str]:
    """Return the command that trains, one process a machine of ``training``, all on this one."""
    parts = [
        sys.executable, ROOT / "scripts/launch.py", "1", "--nproc-per-node", training["nodes"],
        ROOT / "scripts/train.py", "--base", inputs / "base.json", "--rope", inputs / "rope.json",
        "--pack", inputs / "pack.json", "--settings", json.dumps(training),
        "--work", work or output / "work", "--manifest", output / "trained.json",
        "--output", output / "trained", "--metrics", output / "metrics.jsonl",
    ]  # fmt: skip
    return list(map(str, parts))


def train(inputs: Path, output: Path, training: dict, check: bool = True, **more):
    """Train to the end."""
    done = subprocess.run(command(inputs, output, training, **more), capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def metrics(output: Path) -> list[dict]:
    """Return the records of steps in the metrics file."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]
