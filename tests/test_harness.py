"""Tasks of lm_eval: real tasks, on the micro base, without a network."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from stages import MICRO_BASE, bring, refusal, run

import harness
import patch_rope
from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.evaluation import lm_eval_tasks, variant_model

pytest.importorskip("lm_eval", reason="needs `make setup-harness`")


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    """The downloaded micro base, with its own RoPE and with YaRN to 2048 tokens."""
    directory = tmp_path_factory.mktemp("downloaded")
    base = bring(MICRO_BASE, directory)
    for method in ("none", "yarn"):
        settings = json.dumps({"method": method, "target_length": 2048, "write_config": True})
        run(
            patch_rope, "--base", base, "--settings", settings,
            "--manifest", directory / f"{method}.json", "--output", directory / method,
        )  # fmt: skip
    return directory


def options(downloaded, rope: str, output, *more) -> list:
    return [
        "--variant", "base", "--model", downloaded / "base.json", "--rope", downloaded / f"{rope}.json",
        "--precision", "fp32", "--attention", "sdpa", "--threads", 1, "--manifest", output, *more,
    ]  # fmt: skip


def test_tasks_of_ruler_without_a_network(downloaded, tmp_path):
    cut = [sys.executable, ROOT / "tests/no_network.py"]
    if subprocess.run([*cut, "true"]).returncode:
        pytest.skip("no network namespace can be made here")
    more = ["--tasks", *lm_eval_tasks.GENERATED, "--lengths", 2048, "--limit", 1]
    words = [*cut, sys.executable, ROOT / "scripts/harness.py"]
    words += options(downloaded, "yarn", tmp_path / "result.json", *more)
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nltk_data" not in done.stdout + done.stderr, "lm_eval would announce a download"
    tasks = manifest.read(tmp_path / "result.json")["facts"]["tasks"]
    assert set(tasks) == set(lm_eval_tasks.GENERATED)
    for entry in tasks.values():
        assert entry["version"] is not None
        (figure,) = entry["metrics"].values()
        assert 0 <= figure["value"] <= 1
        assert (figure["stderr"], figure["examples"]) == (None, 1)


@pytest.fixture
def environment(monkeypatch):
    """Restore the environment variables that a run in this process sets."""
    for name in ("NLTK_DATA", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def test_each_length_has_its_examples_and_no_prompt_is_cut(
    downloaded, tmp_path, monkeypatch, environment
):
    """With the base's 512 positions, lm_eval would keep only the last tokens of each prompt."""
    prompts, load = [], variant_model.load

    def watched(arguments):
        model = load(arguments)
        see = lambda module, given, named: prompts.append(named["input_ids"].shape[1])  # noqa: E731
        model.register_forward_pre_hook(see, with_kwargs=True)
        return model

    monkeypatch.setattr(variant_model, "load", watched)
    more = ["--tasks", "niah_single_1", "--lengths", 1024, 2048, "--limit", 2]
    run(harness, *options(downloaded, "none", tmp_path / "result.json", *more))
    found = manifest.read(tmp_path / "result.json")
    assert found["settings"]["lengths"] == [1024, 2048]
    metrics = found["facts"]["tasks"]["niah_single_1"]["metrics"]
    assert {name: figure["examples"] for name, figure in metrics.items()} == {"1024": 2, "2048": 2}
    assert all(figure["stderr"] >= 0 for figure in metrics.values())
    whole = sorted(length for length in prompts if length > 1)
    assert len(whole) == 4
    assert 700 < whole[0] <= whole[1] <= 1024 < 1700 < whole[2] <= whole[3] <= 2048


def test_a_task_that_lm_eval_does_not_have(downloaded, tmp_path):
    more = ["--tasks", "helaswag", "--lengths", 1024]
    sentence = refusal(harness, *options(downloaded, "yarn", tmp_path / "result.json", *more))
    assert "evaluation.harness.tasks has 'helaswag', which lm_eval 0." in sentence
    assert "does not know; similar names are hellaswag" in sentence
    assert not (tmp_path / "result.json").exists()


def test_code_of_a_tokenizer_is_not_run_by_tasks_of_ruler(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["x.X", null]}}'
    )
    with pytest.raises(UserError, match="names code of its own"):
        lm_eval_tasks.check_no_code(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    lm_eval_tasks.check_no_code(tmp_path)


def test_lm_eval_is_an_extra(monkeypatch):
    monkeypatch.setattr(lm_eval_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="lm_eval, which is not installed; run `make setup-harness`"
    ):
        lm_eval_tasks.check_installed()


def test_scores_of_an_entry():
    entry = {
        "alias": "x",
        "acc,none": 0.25,
        "acc_stderr,none": 0.1,
        "f1,strict": 1,
        "f1_stderr,strict": "N/A",
    }
    assert lm_eval_tasks.scores(entry, 8) == {
        "acc": {"value": 0.25, "stderr": 0.1, "examples": 8},
        "f1 (strict)": {"value": 1.0, "stderr": None, "examples": 8},
    }


def test_the_error_of_the_mean():
    """Two of four found: the standard deviation of 0, 0, 1, 1 is √(1/3), divided by √4."""
    found = lm_eval_tasks.score_at(64, [{"64": value} for value in (0.0, 0.0, 1.0, 1.0)])
    assert found["64"]["value"] == 0.5
    assert found["64"]["stderr"] == pytest.approx((1 / 3) ** 0.5 / 2)
    assert lm_eval_tasks.score_at(64, [{"64": 1.0}])["64"]["stderr"] is None
