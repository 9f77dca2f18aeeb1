"""The gate: a run that misses a threshold fails by name, keeps its files and is marked until it passes."""

import json

import pytest
from stages import one_sentence, refusal, run
from test_config import DEFAULT
from test_config import refusal as config_refusal
from test_report import FOUND, GOOD, shown

import gate
from longyarn.config import thresholds
from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.core.files import sha256, write_json
from longyarn.reporting import verdict

ASKED = {"perplexity_ratio": 1.0, "retention_ratio": 1.03, "passkey_rate": 0.95, "merge_error": 0.5}
NONE = dict.fromkeys(ASKED)


def made(directory, asked: dict, error: float = 0.25, **figures) -> list:
    """Write a report and a merge manifest with these figures; return the gate's arguments."""
    judged = verdict.judge(shown(**figures), asked)
    write_json(directory / "report.json", {"verdict": judged})
    facts = {"merge_error": error, "merge_error_tensor": "norm.weight"}
    write_json(directory / "merged.json", {"facts": facts})
    return [
        "--report", directory / "report.json", "--merge", directory / "merged.json",
        "--thresholds", json.dumps(asked), "--mark", directory / "NOT_VERIFIED.txt",
        "--manifest", directory / "verified.json",
    ]  # fmt: skip


def test_a_run_within_all_thresholds_passes_and_its_mark_goes(tmp_path):
    mark = tmp_path / "NOT_VERIFIED.txt"
    mark.write_text("of an earlier attempt")
    run(gate, *made(tmp_path, ASKED))
    assert not mark.exists()
    found = manifest.read(tmp_path / "verified.json")
    assert found["settings"] == ASKED
    assert found["inputs"] == {"merge": sha256(tmp_path / "merged.json")}
    assert [one["threshold"] for one in found["facts"]["compared"]] == list(ASKED)
    assert all(one["passed"] for one in found["facts"]["compared"])


@pytest.mark.parametrize(
    ("key", "changes", "words"),
    [
        ("perplexity_ratio", {"perplexity": GOOD | {"trained": {512: 31.2, 4096: 31.9}}}, "1.022"),
        ("retention_ratio", {"perplexity": GOOD | {"trained": {512: 32.2, 4096: 28.0}}}, "1.039"),
        ("passkey_rate", {"passkey": FOUND | {"trained": {512: 30, 4096: 28}}}, "84 of 90"),
        (
            "merge_error",
            {"error": 0.75},
            "rounding took 75 % of what training changed in norm.weight",
        ),
    ],
)
def test_each_miss_is_one_sentence_with_figure_and_threshold(tmp_path, key, changes, words):
    sentence = refusal(gate, *made(tmp_path, ASKED, **changes))
    assert words in sentence and f"gate.{key}" in sentence and "is required" in sentence
    assert [other for other in ASKED if f"gate.{other}" in sentence] == [key]
    assert not (tmp_path / "verified.json").exists()
    assert words in (tmp_path / "NOT_VERIFIED.txt").read_text()
    # Without that threshold, the same figures pass.
    run(gate, *made(tmp_path, ASKED | {key: None}, **changes))
    assert not (tmp_path / "NOT_VERIFIED.txt").exists()


def test_a_pass_on_the_value_alone_is_said(tmp_path, capsys):
    run(gate, *made(tmp_path, ASKED, passkey=FOUND | {"trained": {512: 30, 4096: 29}}))
    assert "4 thresholds met; passkey_rate only by its value" in capsys.readouterr().err


def test_no_threshold_asks_nothing_and_says_so(tmp_path, capsys):
    run(gate, *made(tmp_path, NONE))
    assert "config section gate sets no threshold" in capsys.readouterr().err
    assert manifest.read(tmp_path / "verified.json")["facts"]["compared"] == []


def test_a_figure_that_was_not_measured_is_missed(tmp_path):
    sentence = refusal(
        gate, *made(tmp_path, NONE | {"passkey_rate": 0.9}, passkey={"base": {512: 1}})
    )
    assert "passkey of 'trained' was not evaluated (gate.passkey_rate)" in sentence


def test_without_extension_what_means_nothing_is_left_out(tmp_path):
    run(gate, *made(tmp_path, ASKED, target=512))
    compared = manifest.read(tmp_path / "verified.json")["facts"]["compared"]
    assert [one["threshold"] for one in compared] == [
        "retention_ratio",
        "passkey_rate",
        "merge_error",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"evaluation.variants": ["base", "yarn"]},
            "gate.perplexity_ratio needs the variant 'trai",
        ),
        ({"evaluation.variants": ["trained"]}, "gate.retention_ratio needs the variant 'base'"),
        (
            {"evaluation.passkey.lengths": [512]},
            "gate.passkey_rate needs evaluation.passkey.lengths to have rope.target_length, 4096",
        ),
        ({"evaluation.perplexity.lengths": [512]}, "gate.perplexity_ratio needs evaluation.perp"),
        (
            {
                "evaluation.perplexity.lengths": [4096],
                "rope.original_max_position_embeddings": 512,
            },
            "to have the model's original length, 512",
        ),
        ({"gate.passkey_rate": 95}, "'gate.passkey_rate' is 95, but must be at most 1"),
    ],
)
def test_a_threshold_that_nothing_would_measure_is_refused_before_the_run(changes, words):
    assert words in config_refusal(DEFAULT, changes)


def test_the_original_length_is_checked_before_training():
    lengths = {"perplexity": [1024], "passkey": [1024]}
    with pytest.raises(UserError, match=r"perplexity\.lengths to have the model's original length"):
        thresholds.check_lengths(ASKED, lengths, {"original": 512})
    thresholds.check_lengths(NONE, lengths, {"original": 512})


def test_a_missed_threshold_fails_the_run_and_keeps_its_files(finished_copy):
    """Through Snakemake: exit code 1, nothing deleted, and only the gate runs again after the correction."""
    made = finished_copy.directory / "results/tests"
    asked = {"gate": {"perplexity_ratio": 0.01}}
    done = finished_copy.snakemake(overrides=asked, check=False)
    assert done.returncode == 1
    error = next(line for line in done.stdout.splitlines() if line.startswith("error: "))
    assert "gate.perplexity_ratio" in one_sentence(error)
    assert (made / "merged/model.safetensors").is_file()
    reasons = (made / "NOT_VERIFIED.txt").read_text().strip()
    assert "times its own at 512" in reasons
    # It is exported anyway, and its card says in the gate's own words why it is not verified.
    card = (made / "export/README.md").read_text()
    assert f"**This model is not verified**, because {reasons}" in card
    assert finished_copy.planned(asked, "push") == {"gate": 1, "push": 1}
    assert not (made / "verified.json").exists()
    assert finished_copy.planned(asked) == {"gate": 1, "provenance": 1}
    finished_copy.snakemake()
    assert not (made / "NOT_VERIFIED.txt").exists() and (made / "verified.json").is_file()
