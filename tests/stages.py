"""Small parts for tests of single stages: run one as its rule does, and make a tiny model."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from longyarn.core.errors import program

MICRO_BASE = ROOT / "resources" / "micro-base"


def run(module, *arguments) -> None:
    """Run a stage's program with these command-line arguments, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        program(module.main)()


def refusal(module, *arguments) -> str:
    """Run a stage that must refuse, and return its one sentence; a traceback fails the test."""
    with pytest.raises(SystemExit) as stop:
        run(module, *arguments)
    return one_sentence(str(stop.value.code))


def one_sentence(message: str) -> str:
    """Return ``message`` after checking its form: "error: ", one line, and nothing after it."""
    message = message.strip()
    assert message.startswith("error: "), message
    assert len(message.splitlines()) == 1, message
    return message


def sealed_again(directory: Path, *options) -> None:
    """Seal a run as its rule does."""
    import provenance

    settings = json.dumps(yaml.safe_load((directory / "config.yaml").read_text()))
    run(provenance, "--seal", directory / "SHA256SUMS", "--settings", settings, *options)


def make_model(directory: Path, **settings) -> Path:
    """Write a random Llama of two layers with the micro base model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": json.loads((MICRO_BASE / "config.json").read_text())["vocab_size"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
    }
    LlamaForCausalLM(LlamaConfig(**sizes | settings)).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MICRO_BASE / name, directory)
    return directory


def edit_json(path: Path, **changes) -> None:
    """Change keys of a JSON file; a key whose new value is ``...`` is taken out."""
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))


def bring(model: Path, run_directory: Path) -> Path:
    """Run the stage download_model on a directory and return the manifest."""
    import download_model

    run(
        download_model, "--source", model, "--cache", run_directory / "cache",
        "--manifest", run_directory / "base.json", "--output", run_directory / "base",
    )  # fmt: skip
    return run_directory / "base.json"


def rope_facts(**changes) -> dict:
    """Return the facts of a RoPE manifest: YaRN from 512 to 4096 positions, with ``changes``."""
    plain = [10000 ** (-i / 8) for i in range(8)]
    return {
        "method": "yarn", "replaced": None, "full_attention": False, "factor": 8.0,
        "original_max_position_embeddings": 512, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rotary_dim": 16,
        "attention_factor": 1.0, "inverse_frequencies": plain, "base_inverse_frequencies": plain,
        "ramp_limits": None,
    } | changes  # fmt: skip


def write_mix(directory: Path) -> dict:
    """Write a small corpus in Markdown, JSON Lines and Parquet; return the section ``corpus`` for it.

    ``directory`` lies in the working directory of the run, below which the section names it.
    """
    import pyarrow.parquet

    directory.mkdir()
    long = "The sun is yellow. Here we go, there and back again.\n" * 400
    for number in range(2):
        (directory / f"book{number}.md").write_text(f"# Book {number}\n\n{long}{number}")
    lines = [json.dumps({"text": f"Short {n}. {long[:900]}"}) for n in range(40)]
    (directory / "short.jsonl").write_text("\n".join(lines))
    table = pyarrow.table({"body": [f"Row {n}. {long}" for n in range(4)]})
    pyarrow.parquet.write_table(table, directory / "rows.parquet")
    return {
        "packages": [],
        "files": [
            {"collection": "books", "files": f"{directory.name}/*.md"},
            {"collection": "short", "files": f"{directory.name}/*.jsonl"},
            {"collection": "rows", "files": f"{directory.name}/*.parquet", "column": "body"},
        ],
        "held_out": ["books/book0"],
        "held_out_documents": {"rows": 1},
    }


@contextlib.contextmanager
def small_disk(directory: Path, mebibytes: int) -> Iterator[Path]:
    """Mount a file system of this size at a new directory; only root can, so others skip."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(directory)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs a small disk, and mounting one needs root: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)
