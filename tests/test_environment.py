"""The record of where and when a job ran: its content, and that only a full disk makes a stage fail."""

import getpass
import json
import os
import platform
import subprocess
from datetime import UTC, datetime

import pytest
from conftest import ROOT
from stages import one_sentence, small_disk

from longyarn.core import job_record, manifest
from longyarn.core.errors import program


def written(path) -> dict:
    return json.loads(job_record.path_of(path).read_text())


def write(path) -> None:
    """Write a manifest in the way that a stage does."""
    manifest.write(
        path, script=ROOT / "scripts/gate.py", settings={}, inputs={}, files=[], facts={}
    )


def test_it_lies_beside_the_manifest_and_names_neither_host_nor_user(tmp_path, monkeypatch):
    monkeypatch.setenv(job_record.COMMIT, f"{'ab' * 20}-dirty")
    monkeypatch.setenv(job_record.IMAGE, "docker://here.example/image@sha256:00")
    write(tmp_path / "rope" / "yarn.json")
    text = (tmp_path / "rope" / "environments" / "yarn.json").read_text()
    found = json.loads(text)
    assert list(found) == [
        "start", "end", "cpu", "cores", "memory", "gpus", "system", "kernel", "python", "commit",
        "dirty", "image",
    ]  # fmt: skip
    assert (found["commit"], found["dirty"]) == ("ab" * 20, True)
    assert found["image"] == "docker://here.example/image@sha256:00"
    assert found["python"] == platform.python_version() and found["memory"] > 2**28
    start, end = (datetime.fromisoformat(found[key]) for key in ("start", "end"))
    assert start <= end <= datetime.now(UTC) and start.utcoffset().total_seconds() == 0
    for name in {platform.node(), os.environ.get("HOSTNAME"), str(tmp_path), str(ROOT)} - {None}:
        assert len(name) < 4 or name not in text
    assert getpass.getuser() not in [value for value in found.values() if isinstance(value, str)]


def test_the_manifest_is_the_same_whatever_the_record_says(tmp_path, monkeypatch):
    for number in ("1", "2"):
        monkeypatch.setenv(job_record.COMMIT, number * 40)
        write(tmp_path / number / "a.json")
    assert (tmp_path / "1/a.json").read_bytes() == (tmp_path / "2/a.json").read_bytes()
    assert written(tmp_path / "1/a.json")["commit"] != written(tmp_path / "2/a.json")["commit"]


def test_a_record_that_cannot_be_written_fails_no_stage(tmp_path, capsys):
    (tmp_path / "environments").write_text("a file, where the directory would be")
    write(tmp_path / "a.json")
    assert manifest.read(tmp_path / "a.json")["stage"] == "gate"
    assert "is not written" in capsys.readouterr().err


def test_a_full_disk_does(tmp_path):
    with small_disk(tmp_path / "disk", 1) as disk:
        with pytest.raises(OSError, match="No space left"):
            (disk / "fill").write_bytes(bytes(2**21))
        with pytest.raises(SystemExit) as stop:
            program(lambda: write(disk / "a.json"))()
        assert "no space left on the disk" in one_sentence(str(stop.value.code))


def git(directory, *arguments) -> str:
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    command = ["git", "-C", str(directory), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_the_workflow_s_own_and_says_if_files_differ(tmp_path):
    assert job_record.commit_of(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    git(tmp_path, "tag", "named")  # a tag does not take the place of the commit
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert job_record.commit_of(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert job_record.commit_of(tmp_path) == f"{commit}-dirty"
    # A copy without its own history does not use that of the repository around it.
    (tmp_path / "copy").mkdir()
    assert job_record.commit_of(tmp_path / "copy") is None


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (None, ""),
        ("docker://name@sha256:00", "docker://name@sha256:00"),
        ("/scratch/someone/images/longyarn-cpu-00.sif", "longyarn-cpu-00.sif"),
    ],
)
def test_jobs_are_told_the_image_also_in_a_container_kept_clean(tmp_path, image, told):
    values = job_record.variables(tmp_path, image)
    assert values[job_record.IMAGE] == told and values[job_record.COMMIT] == ""
    inside = {key: value for key, value in values.items() if key.startswith("APPTAINERENV_")}
    assert inside == (
        {f"APPTAINERENV_{key}": values[key] for key in (job_record.COMMIT, job_record.IMAGE)}
        if image
        else {}
    )
