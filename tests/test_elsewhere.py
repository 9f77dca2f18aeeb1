"""The workflow runs in any directory and as a module of another workflow; a dry run writes nothing."""

import json
import os
from pathlib import Path

import pytest
from conftest import ROOT, Workspace

from longyarn.core.files import located

RUN = "results/tests"
# These stages name most kinds of files: the model that comes with the workflow, scripts, a cache, a payload.
FIRST = [f"{RUN}/pack.json", f"{RUN}/rope/base.json"]

MODULE = """
configfile: "all.yaml"

module longyarn:
    snakefile: "WORKFLOW/Snakefile"
    config: config

use rule * from longyarn as longyarn_*

rule mine:
    default_target: True
    input:
        rules.longyarn_all.input,

rule first:
    input:
        pack="results/tests/pack.json",
    output:
        "first.txt",
    shell:
        "grep -m 1 -o tokens_packed {input.pack} > {output}"
"""


@pytest.fixture
def elsewhere(tmp_path) -> Workspace:
    """A run directory without the workflow, which stands in the directory beside it."""
    (ROOT / ".cache").mkdir(exist_ok=True)
    (tmp_path / "workflow").mkdir()
    (tmp_path / "run").mkdir()
    Workspace(tmp_path / "workflow")
    made = object.__new__(Workspace)
    made.directory = tmp_path / "run"
    (made.directory / ".cache").symlink_to(ROOT / ".cache", target_is_directory=True)
    return made


def start(place: Workspace, *arguments: str):
    """Run the workflow beside a run directory, from a third directory."""
    workflow = place.directory.parent / "workflow"
    files = [workflow / "config.yaml", workflow / "tests" / "config.yaml"]
    third = object.__new__(Workspace)
    third.directory = place.directory.parent
    command = ["snakemake", "--cores", "2", "-s", workflow / "Snakefile", *arguments]
    options = ["--directory", place.directory, "--configfile", *files]
    command[3:3] = options
    return third.run(command)


def test_it_runs_in_another_directory(elsewhere, finished):
    done = start(elsewhere, "--printshellcmds", "--", *FIRST)
    scripts = elsewhere.directory.parent / "workflow" / "scripts"
    assert f"python {scripts}/pack.py" in done.stdout
    for name in ("base.json", "corpus.json", "tokens.json", "pack.json", "rope/yarn.json"):
        made, same = (place.directory / RUN / name for place in (elsewhere, finished))
        assert made.read_bytes() == same.read_bytes(), name
    assert "Nothing to be done" in start(elsewhere, "-n", "--", *FIRST).stdout
    assert "rule report:" in start(elsewhere, "-n").stdout
    assert {path.name for path in elsewhere.directory.iterdir()} == {
        ".cache", ".snakemake", "results", "work",
    }  # fmt: skip
    assert not (elsewhere.directory.parent / "workflow" / "results").exists()


def test_it_is_a_module_of_another_workflow(elsewhere, finished):
    import yaml
    from snakemake.utils import update_config

    config: dict = {}
    for file in ("config.yaml", "tests/config.yaml"):
        update_config(config, yaml.safe_load((ROOT / file).read_text()))
    (elsewhere.directory / "all.yaml").write_text(json.dumps(config))
    workflow = elsewhere.directory.parent / "workflow"
    (elsewhere.directory / "Snakefile").write_text(MODULE.replace("WORKFLOW", str(workflow)))
    planned = elsewhere.run(["snakemake", "-n", "--cores", "2"]).stdout
    for rule in ("download_model", "train", "report", "provenance"):
        assert f"rule longyarn_{rule}:" in planned
    assert "localrules" not in planned  # Snakemake warns of rules that the module's names hide
    elsewhere.run(["snakemake", "--cores", "2", "--printshellcmds", "first"])
    made, same = (place.directory / RUN / "pack.json" for place in (elsewhere, finished))
    assert made.read_bytes() == same.read_bytes()
    assert (elsewhere.directory / "first.txt").read_text() == "tokens_packed\n"


def test_a_relative_path_of_the_config_may_come_with_the_workflow(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert located("resources/micro-base") == Path("resources/micro-base")
    monkeypatch.chdir(tmp_path)
    assert located("resources/micro-base") == ROOT / "resources/micro-base"
    assert located("an/owl") == Path("an/owl")
    (tmp_path / "resources" / "micro-base").mkdir(parents=True)
    assert located("resources/micro-base") == Path("resources/micro-base")  # the run's own


def state(directory: Path) -> dict[str, tuple]:
    """Return size, time and kind of every file and directory below one, itself included."""
    found = {}
    for path in [directory, *directory.rglob("*")]:
        status = path.lstat()
        found[str(path.relative_to(directory))] = (
            status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino,
        )  # fmt: skip
    return found


def written(before: dict, after: dict) -> set[str]:
    """Return what differs between two states."""
    return {name for name in before | after if before.get(name) != after.get(name)}


# Snakemake's own: its cache of file times, and a lock that it takes and gives back.
OF_SNAKEMAKE = {
    ".snakemake", ".snakemake/iocache", ".snakemake/iocache/latest.pkl", ".snakemake/locks",
}  # fmt: skip


@pytest.mark.parametrize("purged", [None, "merged/model.safetensors", "base/config.json"])
def test_a_dry_run_of_a_finished_run_writes_nothing(finished_copy, purged):
    run = finished_copy.directory / RUN
    if purged:
        os.unlink(run / purged)
    before = state(finished_copy.directory)
    done = finished_copy.snakemake("-n")
    assert written(before, state(finished_copy.directory)) <= OF_SNAKEMAKE
    if purged:
        assert f"{purged}, listed in" in done.stdout
        assert "the stage runs again where it is needed" in done.stdout
    assert ("rule merge:" in done.stdout) == (purged == "merged/model.safetensors")


def test_a_first_dry_run_writes_nothing_but_snakemakes_own_directory(workspace):
    before = state(workspace.directory)
    workspace.snakemake("-n")
    new = written(before, state(workspace.directory)) - {"."}
    assert {name for name in new if not name.startswith(".snakemake")} == set()
    files = {name for name in new if (workspace.directory / name).is_file()}
    assert files == {".snakemake/iocache/latest.pkl"}
