"""The evaluation is checked before training, on the real finished run."""

import pytest
from stages import one_sentence, refusal, run

import check_evaluation
from longyarn import manifest

GOOD = {
    "perplexity-lengths": [512, 1024], "tokens-per-document": 2048, "passkey-lengths": [512],
    "digits": 5,
}  # fmt: skip


def arguments(finished, tmp_path, **changes) -> list:
    made = finished.directory / "results" / "tests"
    words = ["--base", made / "base.json", "--tokens", made / "tokens.json"]
    for name, value in (GOOD | {k.replace("_", "-"): v for k, v in changes.items()}).items():
        words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return [*words, "--manifest", tmp_path / "evaluation.json"]


def test_a_possible_evaluation_passes_and_says_what_it_will_score(finished, tmp_path):
    run(check_evaluation, *arguments(finished, tmp_path))
    facts = manifest.read_facts(tmp_path / "evaluation.json")
    assert facts["tokens_evaluated"] == {"shakespeare/hamlet": 2048, "shakespeare/tempest": 2048}
    assert facts["too_short"] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"perplexity_lengths": [10**6], "tokens_per_document": 10**6}, "no held-out document has"),
        ({"passkey_lengths": [512, 60]}, "evaluation.passkey.lengths has 60"),
    ],
)
def test_an_impossible_one_is_refused(finished, tmp_path, changes, words):
    assert words in refusal(check_evaluation, *arguments(finished, tmp_path, **changes))
    assert not (tmp_path / "evaluation.json").exists()


def test_training_waits_for_the_check(finished_copy):
    """Only the trained variant is asked for, so nothing but the check could notice before training."""
    overrides = {
        "training": {"learning_rate": 5e-4},
        "evaluation": {"variants": ["trained"], "passkey": {"lengths": [60]}},
    }
    done = finished_copy.snakemake(overrides=overrides, check=False)
    assert done.returncode != 0
    error = next(line for line in done.stdout.splitlines() if line.startswith("error: "))
    assert "evaluation.passkey.lengths has 60" in one_sentence(error)
    assert "Traceback" not in done.stdout
    assert "rule train:" not in done.stdout
