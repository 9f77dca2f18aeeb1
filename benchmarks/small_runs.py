"""Training runs without Snakemake, for benchmarks and tests: settings, sequences, the command."""

import json
import sys
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save_file

from longyarn.config import derived
from longyarn.config.load import complete
from longyarn.core import manifest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))


def configured(length: int, training: dict, document_masks: bool = True) -> dict:
    """Return a whole configuration with this section `training`, checked as a user's is."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    config["rope"]["target_length"] = length
    config["mix"]["document_masks"] = document_masks
    config["training"] = training
    for instrument in ("perplexity", "passkey"):
        config["evaluation"][instrument]["lengths"] = [64]
    config["gate"] = {}
    return complete(config, ROOT / "schemas" / "config.schema.yaml")


def random_ids(sequences: int, length: int, vocabulary: int) -> np.ndarray:
    """Return random tokens, int32 (sequences, length)."""
    generator = np.random.default_rng(0)
    return generator.integers(vocabulary, size=(sequences, length), dtype=np.int32)


def write_pack(directory: Path, input_ids: np.ndarray, document_masks: bool = True) -> None:
    """Write sequences of three pieces each, as the stage pack would."""
    length = input_ids.shape[1]
    pieces = [[length // 2, length // 4, length // 4]] * len(input_ids)
    write_pieces(directory, input_ids, pieces, document_masks)


def write_pieces(
    directory: Path, input_ids: np.ndarray, pieces: list[list[int]], document_masks: bool = True
) -> None:
    """Write sequences of pieces of these lengths, as the stage pack would."""
    sequences, length = input_ids.shape
    lengths = [piece for row in pieces for piece in row]
    (directory / "pack").mkdir()
    file = directory / "pack" / "pack.safetensors"
    save_file(
        {
            "input_ids": input_ids,
            "piece_lengths": np.asarray(lengths, np.int32),
            "piece_documents": np.arange(len(lengths), dtype=np.int32),
            "piece_offsets": np.cumsum([0, *map(len, pieces)]),
        },
        file,
    )
    manifest.write(
        directory / "pack.json",
        script=ROOT / "scripts/pack.py",
        settings={},
        inputs={},
        files=[file],
        facts={
            "document_masks": document_masks,
            "allow_repeats": True,
            "sequence_length": length,
            "sequences": sequences,
        },
    )


def train_command(
    inputs: Path,
    output: Path,
    training: dict,
    *,
    rope: str = "rope.json",
    work: Path | None = None,
    metrics: bool = False,
) -> list[str]:
    """Return the command that trains on the manifests below ``inputs``, all processes on this machine."""
    parts = [
        sys.executable, ROOT / "scripts/launch.py", "1", "--nproc-per-node",
        derived.processes(training), ROOT / "scripts/train.py", "--base", inputs / "base.json",
        "--rope", inputs / rope, "--pack", inputs / "pack.json",
        "--settings", json.dumps(training), "--work", work or output / "work",
        "--manifest", output / "trained.json", "--output", output / "trained",
    ]  # fmt: skip
    if metrics:
        parts += ["--metrics", output / "metrics.jsonl"]
    return list(map(str, parts))
