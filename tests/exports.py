"""Shared by the tests of the exports: a small run with every kind of piece, and its sequences."""

import json
from pathlib import Path

import numpy as np
import yaml
from conftest import ROOT
from stages import run
from test_adopt import make_run
from training_runs import settings

from longyarn.core import manifest, tensorfile
from longyarn.data.packed_dataset import Packed
from longyarn.data.pieces import PADDING

LENGTH = 60  # not a multiple of what collators pad to
# Lengths and documents: alone; with a single token between; a conversation, and padding; two.
PIECES = (
    [(60, 0)],
    [(30, 1), (1, 2), (29, 3)],
    [(20, 4), (25, 5), (15, PADDING)],
    [(40, 6), (20, 7)],
)
SCHEMA = yaml.safe_load((ROOT / "schemas/config.schema.yaml").read_text(encoding="utf-8"))


def make(directory: Path, masks: bool = True, **model) -> Path:
    """Make base, RoPE and packed sequences below a directory, and return it."""
    make_run(directory, **model)
    ids = np.random.default_rng(0).integers(4, 2000, (len(PIECES), LENGTH), dtype=np.int32)
    scored = np.ones(ids.shape, dtype=bool)
    scored[2, :10] = False  # the question
    lengths, documents = np.asarray([piece for row in PIECES for piece in row], np.int32).T
    offsets = np.cumsum([0, *map(len, PIECES)])
    file = directory / "pack" / "pack.safetensors"
    file.parent.mkdir()
    tensorfile.write(file, {
        "input_ids": ids, "piece_lengths": lengths, "piece_documents": documents,
        "piece_offsets": offsets, "scored": scored,
    })  # fmt: skip
    facts = {"document_masks": masks, "sequence_length": LENGTH, "sequences": len(PIECES)}
    manifest.write(
        directory / "pack.json", script=ROOT / "scripts/pack.py", settings={}, inputs={},
        files=[file], facts=facts,
    )  # fmt: skip
    return directory


def packed(directory: Path, masks: bool = True) -> Packed:
    """Return the sequences as Longyarn's training reads them."""
    return Packed(directory / "pack/pack.safetensors", masks)


def export(module, directory: Path, masks: bool = True, **changes) -> Path:
    """Run an export with changed settings of training; return the directory that it wrote."""
    output = directory / module.__name__
    given = {"steps": 2, "batch_size": 2, "lora": {"rank": 4, "alpha": 8}} | changes
    run(
        module, "--base", directory / "base.json", "--rope", directory / "rope.json",
        "--pack", directory / "pack.json", "--settings", json.dumps(settings(masks, **given)),
        "--manifest", directory / f"{module.__name__}.json", "--output", output,
    )  # fmt: skip
    return output


def said(output: Path) -> dict:
    """Return the settings that an export wrote."""
    return yaml.safe_load((output / "train.yaml").read_text(encoding="utf-8"))


def our_keys() -> set[str]:
    """Return the keys of section `training` that say how to train."""
    keys = SCHEMA["properties"]["training"]["properties"]
    lora = {f"lora.{key}" for key in keys["lora"]["properties"]}
    return (keys.keys() - {"source", "revision", "lora"}) | lora


def documented(theirs: dict[str, str | None]) -> None:
    """Check that docs/interoperation.md has a row for each of our keys, with the framework's names."""
    rows = (ROOT / "docs/interoperation.md").read_text(encoding="utf-8").splitlines()
    for key, names in theirs.items():
        row = next((row for row in rows if row.startswith(f"| `{key}` |")), None)
        assert row, key
        for name in (names or "").split(", "):
            assert f"`{name}`" in row or not name, (key, name)
