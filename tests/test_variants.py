"""Variants that the configuration defines: each adds only its own jobs, and the report compares all."""

import json
import shutil

import pytest
from stages import bring, edit_json, make_model, refusal
from test_config import DEFAULT
from test_config import refusal as config_refusal
from test_report import FOUND, GOOD, shown

import perplexity
import verify
from longyarn.config import variants
from longyarn.core.errors import UserError
from longyarn.core.files import read_json, sha256, write_json
from longyarn.evaluation import intervals
from longyarn.provenance.verification import Run
from longyarn.reporting import comparisons, style


def test_newcombe_s_published_intervals():
    """Newcombe 1998, table II, the row for method 10."""
    published = {
        (56, 70, 48, 80): (0.0524, 0.3339),
        (9, 10, 3, 10): (0.1705, 0.8090),
        (6, 7, 2, 7): (0.0582, 0.8062),
        (5, 56, 0, 29): (-0.0381, 0.1926),
        (0, 10, 0, 20): (-0.1611, 0.2775),
        (0, 10, 0, 10): (-0.2775, 0.2775),
        (10, 10, 0, 20): (0.6791, 1.0),
        (10, 10, 0, 10): (0.6075, 1.0),
    }
    for (a, m, b, n), interval in published.items():
        value, low, high = intervals.newcombe((a, m), (b, n))
        assert value == pytest.approx(a / m - b / n)
        assert (low, high) == pytest.approx(interval, abs=6e-5)


def test_each_variant_is_compared_with_the_trained_one_in_words():
    found = comparisons.compare(shown())
    assert [(one["variant"], one["reference"], one["length"]) for one in found] == [
        ("base", "trained", 512),
        ("base", "trained", 4096),
    ]
    near, far = found
    assert far["perplexity"]["value"] == pytest.approx(900 / 28, rel=0.01)
    assert far["perplexity"]["significant"] and far["passkey"]["significant"]
    assert far["passkey"]["value"] == -1
    assert "finds 100 percentage points fewer of the passkeys than trained" in far["sentence"]
    assert "times that of trained" in far["sentence"]
    assert not near["passkey"]["significant"]
    assert "finds 0 percentage points more" in near["sentence"]
    assert near["sentence"].endswith("which is not significant.")


def test_without_a_trained_model_the_base_is_the_reference():
    figures_of = {"base": GOOD["base"], "yarn": GOOD["trained"]}
    found = comparisons.compare(shown(figures_of, {"base": FOUND["base"]}))
    assert {(one["variant"], one["reference"]) for one in found} == {("yarn", "base")}
    assert all(one["passkey"] is None for one in found)


def test_every_variant_has_a_colour_and_a_marker_of_its_own():
    own = ["yarn-4", "other", "published"]
    every = ["base", *own, "yarn"]
    seen = {(style.tone(v, every), style.marker(v, every)) for v in [*every, "trained"]}
    assert len(seen) == 6
    assert all(style.LIGHT[tone] and style.DARK[tone] for tone, _ in seen)


ROPE = DEFAULT["rope"]


def test_a_variant_of_the_base_takes_the_run_s_settings_but_for_its_own():
    assert variants.rope_settings(ROPE, "yarn", {}) == ROPE
    assert "beta_fast" not in variants.rope_settings(ROPE, "ntk", {})
    entry = {"method": "yarn", "factor": 4}
    assert variants.rope_settings(ROPE, "x", entry) == ROPE | entry | {"target_length": None}
    assert variants.rope_settings(ROPE, "x", {"method": "yarn", "factor": None}) == ROPE
    other = variants.rope_settings(ROPE | {"factor": 8}, "x", {"target_length": 2048})
    assert (other["factor"], other["target_length"]) == (None, 2048)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"base": {"method": "yarn"}}, "more_variants.base has the name of a built-in variant"),
        ({"step-10": {"method": "yarn"}}, "has the name of a built-in variant"),
        ({"a/b": {"method": "yarn"}}, "is not a name of lowercase letters, digits and hyphens"),
        ({"x": {}}, "x must be one thing: keys of section rope, or run alone"),
        ({"x": {"run": "other", "factor": 2}}, "x must be one thing"),
        (
            {"x": {"method": "none"}},
            "x has no RoPE of its own, so it is the base; state its method",
        ),
        ({"x": {"source": "owner/name", "run": "other"}}, "x must be one thing"),
        ({"x": {"revision": "main"}}, "x must be one thing"),
        ({"x": {"run": "micro"}}, "names this run itself"),
        ({"x": {"methd": "yarn"}}, "methd' is unknown; did you mean 'method'"),
        ({"x": {"factor": 0.5}}, "is 0.5, but must be more than 1"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(more, words):
    assert words in config_refusal(DEFAULT, {"evaluation.more_variants": more})


def test_a_variant_that_nobody_defined_is_refused():
    sentence = config_refusal(DEFAULT, {"evaluation.variants": ["base", "trained", "yarn-4"]})
    assert "evaluation.variants has 'yarn-4', which is not built in" in sentence


def test_a_run_that_is_not_there_is_one_sentence(finished_copy):
    overrides = {
        "evaluation": {"variants": ["trained", "x"], "more_variants": {"x": {"run": "no"}}}
    }
    done = finished_copy.snakemake("-n", overrides=overrides, check=False)
    assert done.returncode == 1
    assert "error: evaluation.more_variants.x needs results/no/merged.json" in done.stdout
    assert "Traceback" not in done.stdout


def test_the_rope_of_another_run_is_told_by_its_hash(tmp_path):
    for method in ("base", "yarn"):
        write_json(tmp_path / f"rope/{method}.json", {"method": method})
    yarn = sha256(tmp_path / "rope/yarn.json")
    write_json(tmp_path / "merged.json", {"inputs": {"rope": yarn}})
    assert variants.of_run(tmp_path, "x") == tmp_path / "rope/yarn.json"
    write_json(tmp_path / "rope/yarn.json", {"method": "changed"})
    with pytest.raises(UserError, match="update that run first"):
        variants.of_run(tmp_path, "x")


def test_all_three_kinds_stand_in_one_report(finished_copy):
    """The base with another factor, another run's model and a published one: each adds only its own jobs."""
    run = finished_copy.directory / "results" / "tests"
    shutil.copytree(run, run.with_name("other"))
    published = shutil.copytree(
        finished_copy.directory / "resources/micro-base", run / "../published"
    )
    edit_json(
        published / "config.json",
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0,
            "original_max_position_embeddings": 512,
        },
        max_position_embeddings=1024,
    )  # fmt: skip
    overrides = {
        "evaluation": {
            "variants": ["base", "yarn", "trained", "yarn-4", "other", "published"],
            "more_variants": {
                "other": {"run": "other"},
                "published": {"source": str(published.resolve())},
            },
        }
    }
    assert finished_copy.planned(overrides) == {
        "download_variant": 1, "patch_rope": 2, "perplexity": 3, "passkey": 3, "report": 1, "gate": 1,
        "export": 1, "provenance": 1,
    }  # fmt: skip
    assert finished_copy.planned(overrides, "prefetch") == {"download_variant": 1, "prefetch": 1}
    finished_copy.snakemake(overrides=overrides)
    assert finished_copy.planned(overrides) == {}
    report = read_json(run / "report.json")
    values = {name: found["1024"]["value"] for name, found in report["perplexity"].items()}
    assert values["other"] == values["trained"]
    assert values["yarn-4"] not in (values["yarn"], values["base"])
    ropes = report["rope"]["variants"]
    assert ropes["yarn-4"]["max_position_embeddings"] == 2048
    assert ropes["published"]["method"] == "none"
    assert ropes["published"]["rope_parameters"]["factor"] == 2.0
    assert report["chain"]["broken"] == 0 and report["warnings"] is not None
    compared = {one["variant"]: one for one in report["comparisons"] if one["length"] == 1024}
    assert set(compared) == {"base", "yarn", "yarn-4", "other", "published"}
    assert compared["other"]["perplexity"]["value"] == 1
    page = (run / "report.html").read_text()
    assert all(
        one["sentence"] in page.replace("\N{NO-BREAK SPACE}", " ") for one in compared.values()
    )
    assert verify.findings(Run(run)) == []
    assert "a variant is the model of another run" in "".join(verify.notes(Run(run)))


def test_another_tokenizer_is_refused(finished, tmp_path):
    run = finished.directory / "results" / "tests"
    model = make_model(tmp_path / "model")
    text = json.loads((model / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (model / "tokenizer.json").write_text(json.dumps(text))
    sentence = refusal(
        perplexity, "--variant", "published", "--base", run / "base.json",
        "--model", bring(model, tmp_path / "run"), "--rope", run / "rope/base.json",
        "--precision", "fp32", "--attention", "sdpa", "--threads", 1, "--tokens", run / "tokens.json",
        "--settings", json.dumps({"lengths": [512], "tokens_per_document": 512}),
        "--manifest", tmp_path / "found.json",
    )  # fmt: skip
    assert "the variant published has another vocabulary than the base" in sentence
