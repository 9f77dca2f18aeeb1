"""Cleaning up work directories: only those that no run can resume from are deleted."""

import json
import os
import time

import pytest
from stages import refusal, run

import clean_work
from longyarn.core import attempts


@pytest.fixture
def work(tmp_path):
    """Work directories of a finished run, its former settings, an unfinished run, and an unknown one."""
    for name, trained in (
        ("made", "done"),
        ("former", "done"),
        ("open", "open"),
        ("fresh", "done"),
    ):
        checkpoint = attempts.claim(tmp_path / "work" / name) / "checkpoint-3"
        checkpoint.mkdir()
        attempts.mark_whole(checkpoint)
        run_of = str(tmp_path / trained / "trained.json")
        attempts.record(tmp_path / "work" / name, {"run": run_of, "placement": {}})
    (tmp_path / "work" / "stranger").mkdir()
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "trained.json").write_text(json.dumps({"facts": {"work": "made"}}))
    old = time.time() - 2 * clean_work.QUIET
    for name in ("made", "former", "open", "stranger"):
        for path in [tmp_path / "work" / name, *(tmp_path / "work" / name).rglob("*")]:
            os.utime(path, (old, old))
    return tmp_path / "work"


def test_only_what_a_changed_setting_left_behind_is_removed(work, capsys):
    run(clean_work, "--work", work)
    told = capsys.readouterr().out
    assert len(told.splitlines()) == 5
    assert f"{work / 'former'}  step 3  0.0 MB  old" in told
    assert (work / "former").is_dir()
    run(clean_work, "--work", work, "--delete")
    assert sorted(path.name for path in work.iterdir()) == ["fresh", "made", "open", "stranger"]


def test_a_directory_that_is_not_there_is_one_sentence(tmp_path):
    assert "is not a directory" in refusal(clean_work, "--work", tmp_path / "nowhere")
