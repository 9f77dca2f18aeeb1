"""Two runs of one configuration in different directories write the same bytes."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import Workspace
from stages import MICRO_BASE, bring

from longyarn.core import manifest
from longyarn.core.files import sha256

# These contain times.
OF_THEIR_TIME = {"benchmarks", "environments", "logs", "report.html", "report.json"}
# These contain hashes of files that contain times.
OF_THEIR_TIME |= {"ro-crate-metadata.json", "provenance.json", "SHA256SUMS"}
MADE = ("pack", "trained", "merged", "perplexity/trained", "passkey/trained")


@pytest.fixture(scope="module")
def again(tmp_path_factory) -> Path:
    """The results of the test configuration, run again in another directory with another ``--cores``."""
    workspace = Workspace(tmp_path_factory.mktemp("again"))
    workspace.snakemake("--cores=1")
    return workspace.directory / "results" / "tests"


def hashes(run: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a run, except those that contain times."""
    files = (path for path in run.rglob("*") if path.is_file())
    names = {path.relative_to(run): path for path in files}
    return {
        name.as_posix(): sha256(path)
        for name, path in names.items()
        if not OF_THEIR_TIME & {*name.parts}
    }


def test_every_manifest_and_payload_is_the_same_to_the_byte(finished, again):
    first, second = (hashes(run) for run in (finished.directory / "results" / "tests", again))
    assert {f"{name}.json" for name in MADE} | {"merged/model.safetensors"} <= first.keys()
    assert first == second


def test_the_report_has_the_same_figures(finished, again):
    runs = (finished.directory / "results" / "tests", again)
    first, second = (json.loads((run / "report.json").read_text()) for run in runs)
    assert first.pop("timings").keys() == second.pop("timings").keys()
    assert first == second


def test_where_a_local_model_lies_is_not_in_its_manifest(tmp_path):
    for place in ("here", "there"):
        shutil.copytree(MICRO_BASE, tmp_path / place / "model")
        (tmp_path / place / "run").mkdir()
    first, second = (
        bring(tmp_path / place / "model", tmp_path / place / "run") for place in ("here", "there")
    )
    assert first.read_bytes() == second.read_bytes()
    assert manifest.read_facts(first)["source"] == "model"
