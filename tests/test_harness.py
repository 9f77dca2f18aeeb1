"""Tasks of lm_eval: real ones, on the micro base, with no network at all."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from stages import MICRO_BASE, bring, one_sentence, run

import harness
import patch_rope
from longyarn import manifest
from longyarn.cli import UserError

pytest.importorskip("lm_eval", reason="needs `make setup-harness`")


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """The micro base with YaRN to 2048 tokens, brought and patched."""
    directory = tmp_path_factory.mktemp("variant")
    base = bring(MICRO_BASE, directory)
    settings = json.dumps({"method": "yarn", "target_length": 2048, "write_config": True})
    run(
        patch_rope, "--base", base, "--settings", settings,
        "--manifest", directory / "rope.json", "--output", directory / "rope",
    )  # fmt: skip
    return directory


def command(variant, output, *arguments) -> list:
    words = [
        sys.executable, ROOT / "scripts/harness.py", "--variant", "yarn", "--model", variant / "base.json",
        "--rope", variant / "rope.json", "--precision", "fp32", "--attention", "sdpa", "--threads", 1,
        "--manifest", output, *arguments,
    ]  # fmt: skip
    return [str(word) for word in words]


def apart(words: list) -> subprocess.CompletedProcess:
    """Run a command where there is no network, or skip."""
    cut = [sys.executable, str(ROOT / "tests/no_network.py")]
    if subprocess.run([*cut, "true"]).returncode:
        pytest.skip("no network namespace can be made here")
    return subprocess.run([*cut, *words], capture_output=True, text=True)


def test_tasks_of_ruler_without_a_network(variant, tmp_path):
    words = ["--tasks", *harness.MADE_HERE, "--lengths", 1024, 2048, "--limit", 2]
    done = apart(command(variant, tmp_path / "result.json", *words))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nltk_data" not in done.stdout + done.stderr, "it would tell of a download"
    found = manifest.read(tmp_path / "result.json")
    assert found["settings"]["limit"] == 2
    tasks = found["facts"]["tasks"]
    assert set(tasks) == set(harness.MADE_HERE)
    for entry in tasks.values():
        assert entry["version"] is not None
        assert set(entry["metrics"]) == {"1024", "2048"}
        for figure in entry["metrics"].values():
            assert figure["examples"] == 2
            assert 0 <= figure["value"] <= 1
            assert figure["stderr"] >= 0


def test_a_task_that_lm_eval_does_not_have(variant, tmp_path):
    done = subprocess.run(
        command(variant, tmp_path / "result.json", "--tasks", "helaswag", "--lengths", 1024),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    sentence = one_sentence(done.stderr.splitlines()[-1])
    assert "evaluation.harness.tasks has 'helaswag', which lm_eval" in sentence
    assert "hellaswag" in sentence
    assert not (tmp_path / "result.json").exists()


def test_lm_eval_is_an_extra(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="lm_eval, which is not installed; run `make setup-harness`"
    ):
        harness.check_installed()


def test_the_prompt_of_a_short_model_is_not_cut(variant):
    """The base's 512 positions would leave lm_eval the last of a prompt alone."""
    ...


def test_scores_of_an_entry():
    entry = {
        "alias": "x",
        "acc,none": 0.25,
        "acc_stderr,none": 0.1,
        "f1,strict": 1,
        "f1_stderr,strict": "N/A",
    }
    assert harness.scores(entry, 8) == {
        "acc": {"value": 0.25, "stderr": 0.1, "examples": 8},
        "f1 (strict)": {"value": 1.0, "stderr": None, "examples": 8},
    }


def test_the_error_of_the_mean():
    """Half of four found: the standard deviation of 0, 0, 1, 1 is √(1/3), over √4."""
    found = harness.score_at(64, [{"64": value} for value in (0.0, 0.0, 1.0, 1.0)])
    assert found["64"]["value"] == 0.5
    assert found["64"]["stderr"] == pytest.approx((1 / 3) ** 0.5 / 2)
    assert harness.score_at(64, [{"64": 1.0}])["64"]["stderr"] is None
