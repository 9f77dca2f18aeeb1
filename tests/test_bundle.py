"""The archive of a run: elsewhere, without a network, it verifies and evaluates to the same figures."""

import shutil
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT, Workspace
from stages import refusal, run

import bundle
from longyarn.core import run_directory
from longyarn.core.files import sha256
from longyarn.provenance.archive import is_left_out, settings_of_elsewhere

ALONE = (sys.executable, str(ROOT / "tests" / "no_network.py"))
RUN = "results/tests"
SEAL = f"{RUN}/SHA256SUMS"


@pytest.fixture(scope="module")
def archive(finished, tmp_path_factory):
    """The archive of the finished run, made by its rule."""
    directory = tmp_path_factory.mktemp("bundle") / "copy"
    shutil.copytree(finished.directory, directory, symlinks=True)
    workspace = object.__new__(Workspace)
    workspace.directory = directory
    workspace.snakemake("bundle")
    return directory / f"{RUN}.tar"


@pytest.fixture(scope="module")
def unpacked(archive, tmp_path_factory):
    """The archive unpacked elsewhere, as a working directory."""
    directory = tmp_path_factory.mktemp("elsewhere")
    subprocess.run(["tar", "xf", archive, "-C", directory], check=True)
    workspace = object.__new__(Workspace)
    workspace.directory = directory / "longyarn-tests"
    return workspace


def test_it_holds_the_workflow_and_all_but_the_corpus_and_the_sequences(archive, finished):
    with tarfile.open(archive) as opened:
        members = opened.getmembers()
    names = [one.name for one in members]
    assert {name.partition("/")[0] for name in names} == {"longyarn-tests"}
    run_part = f"longyarn-tests/{RUN}/"
    held = {name.removeprefix(run_part) for name in names if name.startswith(run_part)}
    for kept in ("base", "merged", "rope/yarn", "tokens", "figures", "workflow/scripts"):
        assert any(name.startswith(f"{kept}/") for name in held), kept
    assert {"SHA256SUMS", "config.yaml", "report.html", "pack.json", "corpus.json"} <= held
    assert not [name for name in held if name.startswith(("corpus/", "pack/"))]
    assert {"longyarn-tests/Snakefile", "longyarn-tests/scripts/verify.py"} <= set(names)
    assert {(one.uid, one.gid, one.uname, one.gname) for one in members} == {(0, 0, "", "")}
    made = finished.directory / RUN / "merged.json"
    (told,) = [one for one in members if one.name == f"{run_part}merged.json"]
    assert told.mtime == int(made.stat().st_mtime)


def test_the_same_run_gives_the_same_bytes_and_links_stay_links(archive, tmp_path, monkeypatch):
    monkeypatch.chdir(archive.parents[1])
    again = tmp_path / "again.tar"
    run(bundle, "--seal", SEAL, "--output", again)
    assert again.read_bytes() == archive.read_bytes()

    shutil.copytree(archive.parents[1] / RUN, tmp_path / RUN)
    monkeypatch.chdir(tmp_path)
    one, other = (
        tmp_path / RUN / name for name in ("base/tokenizer.json", "merged/tokenizer.json")
    )
    assert one.read_bytes() == other.read_bytes()
    other.unlink()
    other.hardlink_to(one)
    run(bundle, "--seal", SEAL, "--output", again)
    with tarfile.open(again) as opened:
        links = [entry.name for entry in opened.getmembers() if entry.islnk()]
    assert links == [f"longyarn-tests/{RUN}/merged/tokenizer.json"]
    assert again.stat().st_size < archive.stat().st_size


def test_elsewhere_it_verifies_and_nothing_is_to_be_done(unpacked):
    done = unpacked.run([sys.executable, "scripts/verify.py", RUN])
    assert f"{RUN} is whole" in done.stdout
    for name in ("corpus", "pack"):
        assert f"note: {RUN}/{name}/ is not here" in done.stdout
    assert done.stdout.count("note: ") == 2
    done = unpacked.run(["snakemake", "-n", "--configfile", f"{RUN}/config.yaml"])
    assert "Nothing to be done" in done.stdout


def test_elsewhere_the_evaluation_without_a_network_gives_the_same_figures(unpacked):
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("needs root or user namespaces")
    targets = [f"{RUN}/{name}/trained.json" for name in ("perplexity", "passkey")]
    before = [(unpacked.directory / name).read_bytes() for name in targets]
    again = ["--forcerun", "perplexity", "passkey", "--"]
    command = ["snakemake", "--cores", "2", "--configfile", f"{RUN}/config.yaml", *again, *targets]
    done = unpacked.run([*ALONE, *command])
    assert done.stdout.count("rule perplexity:") == done.stdout.count("rule passkey:") == 1
    assert "rule train:" not in done.stdout and "rule merge:" not in done.stdout
    assert [(unpacked.directory / name).read_bytes() for name in targets] == before


def test_what_cannot_be_packed_is_one_sentence(archive, tmp_path, monkeypatch):
    output = tmp_path / "out.tar"
    for place in (tmp_path / "results/tests", "../results/tests"):
        sentence = refusal(bundle, "--seal", f"{place}/SHA256SUMS", "--output", output)
        assert "paths.results leads out of it" in sentence
    shutil.copytree(archive.parents[1] / RUN, tmp_path / RUN)
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / RUN / "base")
    sentence = refusal(bundle, "--seal", SEAL, "--output", output)
    assert "is sealed but missing" in sentence and "--forcerun download_model" not in sentence
    assert f"make it again with `snakemake -- {RUN}/base`, then seal the run again" in sentence
    (tmp_path / RUN / run_directory.SEAL).unlink()
    sentence = refusal(bundle, "--seal", SEAL, "--output", output)
    assert "SHA256SUMS is missing" in sentence
    assert not list(tmp_path.glob("out.tar*"))


def test_training_data_stays_behind_in_all_its_forms_and_variants_go_in():
    for name in (
        "corpus/a/b.txt", "pack/x", "phase-1/pack/x", "cells/mix.seed=1/pack/deep/x",
        "llamafactory/model/x", "axolotl/data/x.parquet",
    ):  # fmt: skip
        assert is_left_out(name), name
    for name in ("pack.json", "logs/pack.log", "models/pack/x", "rope/axolotl/x", "tokens/x",
                 "workflow/pack/x"):  # fmt: skip
        assert not is_left_out(name), name


def test_settings_that_lead_out_of_the_archive_are_named_and_can_be_taken_out():
    evaluation = {
        "passkey": {"haystack": "mine.txt"},
        "variants": ["base", "other", "trained"],
        "more_variants": {"other": {"run": "other"}, "unused": {"run": "unused"}},
    }
    assert [*settings_of_elsewhere({"evaluation": evaluation})] == [
        "evaluation.passkey.haystack", "evaluation.more_variants.other.run",
    ]  # fmt: skip
    corrected = evaluation | {"passkey": {"haystack": None}, "variants": ["base", "trained"]}
    assert [*settings_of_elsewhere({"evaluation": corrected})] == []


def test_a_disk_that_is_too_small_is_said_beforehand(archive, monkeypatch):
    monkeypatch.chdir(archive.parents[1])
    before = sha256(archive)
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert "no space left for the archive" in refusal(bundle, "--seal", SEAL, "--output", archive)
    assert sha256(archive) == before
