"""Training runs without Snakemake, for benchmarks and tests: settings, sequences and the command."""

import json
import sys
from pathlib import Path

import numpy as np
import yaml
from paths import ROOT, SCRIPTS
from safetensors.numpy import save_file

from longyarn.config import derived
from longyarn.config.load import complete
from longyarn.core import manifest

# Where small runs on the CPU differ from the schema's defaults, which are for a 7B model on a GPU.
SMALL = {
    "gpus": 0, "threads": 2, "batch_size": 1, "logging_steps": 10, "save_steps": 100,
    "save_minutes": None, "held_out_steps": None,
}  # fmt: skip
ADAPTER_ALONE = {"train_embeddings": False, "train_norms": False}


def configured(length: int, training: dict, document_masks: bool = True) -> dict:
    """Return a complete configuration with these keys of section `training`, checked like a user's."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    config["rope"]["target_length"] = length
    config["mix"]["document_masks"] = document_masks
    config["training"] = SMALL | training | {"lora": ADAPTER_ALONE | training.get("lora", {})}
    for instrument in ("perplexity", "passkey"):
        config["evaluation"][instrument]["lengths"] = [64]
    config["gate"] = None
    return complete(config, ROOT / "schemas" / "config.schema.yaml")


def random_ids(sequences: int, length: int, vocabulary: int) -> np.ndarray:
    """Return random token ids, int32 (sequences, length)."""
    generator = np.random.default_rng(0)
    return generator.integers(vocabulary, size=(sequences, length), dtype=np.int32)


def write_pack(directory: Path, input_ids: np.ndarray, document_masks: bool = True) -> None:
    """Write sequences of three pieces each, in the form of the stage pack."""
    length = input_ids.shape[1]
    pieces = [[length // 2, length // 4, length // 4]] * len(input_ids)
    write_pieces(directory, input_ids, pieces, document_masks)


def write_pieces(
    directory: Path, input_ids: np.ndarray, pieces: list[list[int]], document_masks: bool = True
) -> None:
    """Write sequences whose pieces have these lengths, in the form of the stage pack."""
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
        script=SCRIPTS / "pack.py",
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
    """Return the command that trains on the manifests in ``inputs``, with all processes on this machine."""
    parts = [
        sys.executable, SCRIPTS / "launch.py", "1", "--nproc-per-node",
        derived.processes(training), SCRIPTS / "train.py", "--base", inputs / "base.json",
        "--rope", inputs / rope, "--pack", inputs / "pack.json",
        "--settings", json.dumps(training), "--work", work or output / "work",
        "--manifest", output / "trained.json", "--output", output / "trained",
    ]  # fmt: skip
    if metrics:
        parts += ["--metrics", output / "metrics.jsonl"]
    return list(map(str, parts))
