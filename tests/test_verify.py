"""Verify: it names any file of a sealed run that was changed, and notes what is legitimately missing."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from stages import edit_json, refusal, run, sealed_again

import verify
from longyarn.core import run_directory, superseded
from longyarn.core.files import sha256
from longyarn.provenance import checksums
from longyarn.provenance.verification import Run

VERIFY = ROOT / "scripts" / "verify.py"


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    """A copy of the finished run; a test that changes it must restore it."""
    directory = tmp_path_factory.mktemp("verify") / "tests"
    shutil.copytree(finished.directory / "results" / "tests", directory)
    return directory


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "tests")
    return tmp_path / "tests"


def found(directory) -> list[str]:
    return verify.findings(Run(directory))


def flip(content: bytes) -> bytes:
    """Return content with one bit of its middle byte flipped."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


WAYS = {"flip": flip, "append": lambda content: content + b" ", "delete": lambda content: None}


def test_tampering_with_any_one_file_is_found_and_named(whole):
    """Every sealed file, in every way; each file of the workflow's copy in one of the ways."""
    assert found(whole) == []
    names = [*checksums.read(whole), run_directory.SEAL]
    assert {"config.yaml", "report.json", "merged/model.safetensors", run_directory.CRATE} <= {
        *names
    }
    missed = []
    for number, name in enumerate(names):
        path = whole / name
        before = path.read_bytes()
        ways = [*WAYS] if not name.startswith("workflow/") else [[*WAYS][number % 3]]
        for way in ways:
            after = WAYS[way](before) if before or way != "flip" else b"\0"
            if after is None:
                path.unlink()
            else:
                path.write_bytes(after)
            said = found(whole)
            if not any(str(path) in sentence for sentence in said):
                missed.append((name, way, said))
        path.write_bytes(before)
    assert missed == []
    assert found(whole) == []


def test_the_file_and_its_stage_are_named_and_a_changed_record_is_told_from_a_changed_file(copy):
    weights = copy / "merged/model.safetensors"
    weights.write_bytes(flip(weights.read_bytes()))
    (sentence,) = found(copy)
    assert f"{weights}, made by merge, was changed" in sentence
    assert "SHA256SUMS, merged.json and ro-crate-metadata.json list it" in sentence


def test_a_seal_that_lists_another_hash_is_what_is_blamed(copy):
    listed = checksums.read(copy)
    listed["merged/model.safetensors"] = "0" * 64
    (copy / run_directory.SEAL).write_text(checksums.render(listed))
    (sentence,) = found(copy)
    assert f"{copy / run_directory.SEAL}, made by provenance, was changed" in sentence
    del listed["merged/model.safetensors"]
    (copy / run_directory.SEAL).write_text(checksums.render(listed))
    (sentence,) = found(copy)
    assert "it lacks merged/model.safetensors" in sentence


@pytest.mark.parametrize("name", ["merged/evil.py", "figures/evil.svg", "workflow/scripts/evil.py"])
def test_a_file_added_to_a_payload_is_found_and_elsewhere_it_is_said(copy, capsys, name):
    (copy / name).write_text("print('evil')")
    (sentence,) = found(copy)
    assert str(copy / name) in sentence and "remove it" in sentence
    (copy / name).unlink()
    (copy / "later.txt").write_text("of a later stage")
    run(verify, copy)
    assert (
        "because they came later: 1 of the files here, for example later.txt"
        in capsys.readouterr().err
    )


def test_a_stamp_of_snakemake_that_holds_something_is_found(copy):
    stamp = copy / "merged/.snakemake_timestamp"
    assert stamp.stat().st_size == 0
    stamp.write_text("import evil")
    assert str(stamp) in found(copy)[0]


def seal_all(directory) -> None:
    """Forge the crate, provenance.json and SHA256SUMS so that they match the files."""
    hashes = checksums.hashes(directory, checksums.read(directory), "hash")
    crate = json.loads((directory / run_directory.CRATE).read_text())
    for entity in crate["@graph"]:
        if "contentSize" in entity:
            entity["sha256"] = hashes[entity["@id"]]
            entity["contentSize"] = str((directory / entity["@id"]).stat().st_size)
    (directory / run_directory.CRATE).write_text(json.dumps(crate))
    record = json.loads((directory / run_directory.PROVENANCE).read_text())
    record["inputs"] = {name: hashes[name] for name in record["inputs"]}
    for name, entry in record["files"].items():
        path = directory / name
        entry |= {"size": path.stat().st_size, "sha256": sha256(path)}
    (directory / run_directory.PROVENANCE).write_text(json.dumps(record))
    hashes = checksums.hashes(directory, hashes, "hash")
    (directory / run_directory.SEAL).write_text(checksums.render(hashes))


def test_a_forged_figure_with_forged_records_is_found_by_the_figures_own_chain(copy):
    seal_all(copy)
    assert found(copy) == []
    report = json.loads((copy / "report.json").read_text())
    figure = report["perplexity"]["trained"]["1024"]
    edit_json(
        copy / "report.json",
        perplexity=report["perplexity"]
        | {"trained": report["perplexity"]["trained"] | {"1024": figure | {"value": 9.9}}},
    )
    seal_all(copy)
    (sentence,) = found(copy)
    assert "report.json, made by report, has other 'perplexity' than the manifests give" in sentence


def test_a_forged_manifest_with_forged_records_is_found_by_the_chain(copy):
    edit_json(copy / "trained.json", settings={})
    seal_all(copy)
    said = found(copy)
    assert any("merge was made from another train than there is now" in one for one in said)


def test_a_forged_configuration_with_forged_records_is_found_by_what_ran(copy):
    text = (copy / "config.yaml").read_text()
    assert text.count("\n  steps: 4\n") == 1
    (copy / "config.yaml").write_text(text.replace("\n  steps: 4\n", "\n  steps: 400\n"))
    seal_all(copy)
    (sentence,) = found(copy)
    assert "config.yaml, made by provenance, has another 'training' than train ran with" in sentence


def test_another_configuration_than_an_adopted_model_had_is_found(copy):
    """Its manifest records only the source and the revision of section training."""
    edit_json(
        copy / "trained.json", stage="adopt", settings={"source": "elsewhere", "revision": None}
    )
    one = Run(copy)
    assert [*verify.of_config(one)] != []
    text = (copy / "config.yaml").read_text()
    assert text.count("\n  source: null\n  revision: null\n") == 1
    changed = text.replace("\n  source: null\n  rev", "\n  source: /at/elsewhere\n  rev")
    (copy / "config.yaml").write_text(changed)
    assert [*verify.of_config(one)] == []
    assert superseded.reported(one.manifests, one.json("report.json"))["train"] == "trained.json"


def test_a_manifest_that_nothing_asks_for_any_more_is_a_note(copy, capsys):
    """Manifests of an old push, checkpoint, cell and variant; a stale one of the report is an error."""
    for name, source in {
        "push.json": "verified.json",
        "step-2/trained.json": "trained.json",
        "cells/seeds/trained.json": "trained.json",
        "passkey/linear.json": "passkey/base.json",
    }.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(copy / source, copy / name)
        stage = {"stage": "push"} if name == "push.json" else {}
        edit_json(copy / name, inputs={"base": "0" * 64}, files={}, **stage)
    shutil.copy(copy / "rope/base.json", copy / "rope/linear.json")
    edit_json(copy / "rope/linear.json", files={})
    sealed_again(copy)
    said = [line for line in capsys.readouterr().err.splitlines() if "an earlier state" in line]
    assert len(said) == 4 and all(line.startswith("provenance: ") for line in said)
    run(verify, copy)
    notes = [line for line in capsys.readouterr().err.splitlines() if "an earlier state" in line]
    assert [line.replace("note", "provenance") for line in notes] == said
    record = json.loads((copy / "perplexity/trained.json").read_text())
    edit_json(copy / "perplexity/trained.json", inputs=record["inputs"] | {"model": "0" * 64})
    sealed_again(copy)
    assert any("perplexity.trained was made from another merge" in line for line in found(copy))


def test_what_lies_in_a_linked_directory_is_of_the_run_and_a_loop_ends(copy, tmp_path):
    shutil.move(copy / "base", tmp_path / "moved")
    (copy / "base").symlink_to(tmp_path / "moved")
    assert found(copy) == []
    for name, target in {"merged/up": "..", "figures/there": tmp_path / "other"}.items():
        (copy / name).symlink_to(target)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/back").symlink_to(copy / "figures")
    (tmp_path / "other/evil.svg").write_text("evil")
    (sentence,) = found(copy)
    assert str(copy / "figures/there/evil.svg") in sentence and "remove it" in sentence


def test_a_run_that_misses_the_gate_is_told_so_and_no_more(copy):
    for name in (run_directory.SEAL, run_directory.CRATE, run_directory.PROVENANCE):
        (copy / name).unlink()
    (sentence,) = found(copy)
    assert "so that it is sealed" in sentence
    (copy / run_directory.MARK).write_text("the gate was missed.")
    (sentence,) = found(copy)
    assert "misses a threshold" in sentence and "such a run is not sealed" in sentence


def test_purged_payloads_are_said_and_the_product_must_be_there(copy, capsys):
    for name in ("base", "corpus", "tokens", "pack"):
        shutil.rmtree(copy / name)
    run(verify, copy)
    said = capsys.readouterr()
    for name in ("base", "corpus", "tokens", "pack"):
        assert f"{copy / name}/ is not here, so not checked" in said.err
    assert sha256(copy / run_directory.SEAL) in said.out and "is whole" in said.out
    shutil.rmtree(copy / "merged")
    said = found(copy)
    assert said and all("merged/" in one and "is missing" in one for one in said)


def test_a_part_of_a_purged_payload_is_no_purge(copy):
    (copy / "tokens/index.safetensors").unlink()
    (sentence,) = found(copy)
    assert "tokens/index.safetensors, made by tokenise, is missing" in sentence


def test_code_that_changed_since_is_a_note(copy, capsys, monkeypatch):
    other = copy.parent / "checkout"
    shutil.copytree(ROOT / "scripts", other / "scripts")
    script = other / "scripts" / "gate.py"
    script.write_text(script.read_text() + "\n\nADDED = 1\n")
    monkeypatch.setattr(verify, "CHECKOUT", other)
    run(verify, copy)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "gate was made with other code than" in notes[0]


def test_the_program_ends_with_1_and_a_sentence_for_each_finding(copy):
    (copy / "report.html").write_text("forged")
    (copy / "merged/evil.py").write_text("forged")
    done = subprocess.run([sys.executable, VERIFY, copy], capture_output=True, text=True)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "report.html" in errors[0] and "evil.py" in errors[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "use `make verify RUN=results/micro`"),
        (["nowhere"], "nowhere is not a directory"),
        (["empty"], "empty holds no manifest"),
    ],
)
def test_what_is_no_run_is_one_sentence(tmp_path, monkeypatch, arguments, words):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert words in refusal(verify, *arguments)


def test_make_asks_for_the_run():
    done = subprocess.run(["make", "--dry-run", "verify"], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "RUN=results/micro" in last, done.stderr


def test_it_starts_without_torch_and_transformers():
    code = "import sys, verify; print({'torch', 'transformers', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stderr
