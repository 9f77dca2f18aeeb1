"""The evaluation is checked before training, on the real finished run."""

import json

import pytest
from stages import one_sentence, refusal, run

import check_evaluation
from longyarn.config import thresholds

GOOD = {
    "perplexity-lengths": [512, 1024], "tokens-per-document": 2048, "passkey-lengths": [512],
    "digits": 5, "thresholds": json.dumps(dict.fromkeys(thresholds.NEEDS)),
}  # fmt: skip


def arguments(finished, **changes) -> list:
    made = finished.directory / "results" / "tests"
    words = ["--base", made / "base.json", "--tokens", made / "tokens.json"]
    words += ["--rope", made / "rope/yarn.json"]
    for name, value in (GOOD | {k.replace("_", "-"): v for k, v in changes.items()}).items():
        words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return words


def test_a_possible_evaluation_passes(finished):
    run(check_evaluation, *arguments(finished))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"perplexity_lengths": [10**6], "tokens_per_document": 10**6}, "no held-out document has"),
        ({"passkey_lengths": [512, 60]}, "evaluation.passkey.lengths has 60"),
        (
            {
                "perplexity_lengths": [1024],
                "thresholds": json.dumps(
                    dict.fromkeys(thresholds.NEEDS) | {"retention_ratio": 1.1}
                ),
            },
            "gate.retention_ratio needs evaluation.perplexity.lengths to have the model's original",
        ),
        ({"passkey_lengths": [256], "needles": 10}, "has 256, too short for 10 keys"),
        ({"haystack": "no/such.txt"}, "evaluation.passkey.haystack no/such.txt cannot be read"),
    ],
)
def test_an_impossible_one_is_refused(finished, changes, words):
    assert words in refusal(check_evaluation, *arguments(finished, **changes))


def test_training_checks_first(finished_copy):
    """Only the trained variant is evaluated, so nothing but the check can fail before training."""
    overrides = {
        "training": {"learning_rate": 5e-4},
        "evaluation": {"variants": ["trained"], "passkey": {"lengths": [60]}},
    }
    done = finished_copy.snakemake(overrides=overrides, check=False)
    assert done.returncode != 0
    error = next(line for line in done.stdout.splitlines() if line.startswith("error: "))
    assert "evaluation.passkey.lengths has 60" in one_sentence(error)
    assert "Traceback" not in done.stdout
    assert "train: step" not in done.stdout
