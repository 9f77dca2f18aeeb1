"""The exported model: transformers 4 and 5 run it alike, as its RoPE manifest says, and its card holds up."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers4_environment
import yaml
from conftest import ROOT
from stages import MICRO_BASE, bring, edit_json, one_sentence, refusal, run
from test_families import FULL, LLAMA_3_1, small

import export
import merge
import patch_rope
from longyarn.core import manifest
from longyarn.core.files import read_json, sha256, write_json
from longyarn.reporting import model_card
from longyarn.rope import transformers4
from longyarn.rope.record import RopeRecord

SETTINGS = {"name": None, "license": None, "language": None}
NONE = dict.fromkeys(("perplexity_ratio", "retention_ratio", "passkey_rate", "merge_error"))
TEXT = "Here we go, naïve as ever: <s> 12 345 tokens.\n\n\tThere and back again."


def arguments(made: Path, report: Path, asked=NONE, rope="rope.json", **settings) -> list:
    """Return the stage's arguments for a run's directory with merged.json and a RoPE manifest."""
    return [
        "--merge", made / "merged.json", "--rope", made / rope, "--report", report,
        "--thresholds", json.dumps(asked), "--settings", json.dumps(SETTINGS | settings),
        "--template", ROOT / "resources/card.md.jinja",
        "--manifest", made / "export.json", "--output", made / "export",
    ]  # fmt: skip


def merged(made: Path, weights: Path) -> Path:
    """Write what the stage merge does, for untrained weights and the RoPE of rope.json."""
    rope = RopeRecord.read(made / "rope.json")
    (made / "merged").mkdir()
    shutil.copy(weights / "model.safetensors", made / "merged")
    merge.copy_rest(weights, made / "merged", rope, None)
    manifest.write(
        made / "merged.json", script=ROOT / "scripts/merge.py", settings={},
        inputs={"rope": made / "rope.json"}, files=sorted((made / "merged").iterdir()),
        facts={
            "directory": "merged", "trust_remote_code": False, "merge_error": 0.25,
            "merge_error_tensor": "norm.weight",
        },
    )  # fmt: skip
    return made


def of_micro(made: Path, settings: dict, **base) -> Path:
    """Extend the micro base, untrained and with keys of its config changed, up to merged.json."""
    made.mkdir()
    shutil.copytree(MICRO_BASE, made / "model")
    edit_json(made / "model/config.json", **base)
    bring(made / "model", made)
    run(
        patch_rope, "--base", made / "base.json", "--manifest", made / "rope.json",
        "--settings", json.dumps({"write_config": True} | settings), "--output", made / "rope",
    )  # fmt: skip
    return merged(made, made / "base")


def of_family(made: Path, name: str, settings: dict, **sizes) -> Path:
    """Extend a small random model of a family, up to merged.json."""
    small(name, made, settings, **sizes)
    for part in ("rope.json", "rope"):
        (made / "run" / part).rename(made / part)
    return merged(made, made / "weights")


SHORT = {"max_position_embeddings": 128}
OWN_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "truncate": False,
    "original_max_position_embeddings": 512, "mscale": 0.7, "mscale_all_dim": 1.0,
}  # fmt: skip
MADE = {
    "linear": (of_micro, {"method": "linear", "target_length": 1024}),
    "ntk": (of_micro, {"method": "ntk", "target_length": 1024}),
    "none": (of_micro, {"method": "none"}),
    "yarn-stated": (
        of_micro,
        {"method": "yarn", "target_length": 1024, "beta_fast": 8, "attention_factor": 1.5},
    ),
    "yarn-of-its-own": (
        of_micro, {"method": "none"}, {"rope_parameters": OWN_YARN, "max_position_embeddings": 1024},
    ),
    "llama-2": (of_family, "llama-2-7b", {"method": "yarn", "target_length": 512}, SHORT),
    "llama-3.1": (of_family, "llama-3.1-8b", {"method": "yarn"} | LLAMA_3_1, {}),
    "llama-3.1-as-it-is": (of_family, "llama-3.1-8b", {"method": "none"}, {}),
    # Its head_dim is not stated, on which YaRN in transformers 4 fails.
    "mistral": (
        of_family, "mistral-7b-v0.1", {"method": "yarn", "target_length": 512} | FULL,
        SHORT | {"sliding_window": 64},
    ),
    "qwen-2.5": (of_family, "qwen2.5-7b", {"method": "yarn", "target_length": 512}, SHORT),
    "qwen-3": (of_family, "qwen3-8b", {"method": "yarn", "target_length": 512}, SHORT),
    "phi-3": (
        of_family, "phi-3-mini-4k", {"method": "ntk", "target_length": 512} | FULL,
        SHORT | {"pad_token_id": None},
    ),
    "pythia": (of_family, "pythia-1.4b", {"method": "yarn", "target_length": 512}, SHORT),
    "pythia-linear": (of_family, "pythia-1.4b", {"method": "linear", "target_length": 512}, SHORT),
    "smollm2": (of_family, "smollm2-135m", {"method": "yarn", "target_length": 512}, SHORT),
}  # fmt: skip


@pytest.fixture(scope="module")
def both(finished, tmp_path_factory):
    """Export all of these, load them with transformers 4 and 5, and return what each found, by name."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = tmp_path_factory.mktemp("exports")
    results = finished.directory / "results/tests"
    places = {"finished": (results / "export", results / "rope/yarn.json")}
    for name, (make, *given) in MADE.items():
        *given, sizes = given if isinstance(given[-1], dict) and len(given) > 1 else [*given, {}]
        made = make(root / name, *given, **sizes)
        run(export, *arguments(made, results / "report.json"))
        places[name] = (made / "export", made / "rope.json")
    asked, ours = {}, {}
    for name, (directory, _) in places.items():
        settings = read_json(directory / "config.json")
        count = 1000 if settings["max_position_embeddings"] == 1024 else 500
        seeded = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, settings["vocab_size"], (1, count), generator=seeded)
        asked[name] = {"model": str(directory), "tokens": tokens[0].tolist()}
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.inference_mode():
            ours[name] = model(input_ids=tokens, use_cache=False).logits[0]
        if (directory / "tokenizer.json").is_file():
            asked[name]["text"] = TEXT
    logits, facts = transformers4_environment.run(asked, root / "transformers4")
    ids = AutoTokenizer.from_pretrained(results / "merged")(TEXT).input_ids
    ropes = {name: manifest.read_facts(rope) for name, (_, rope) in places.items()}
    return {"ours": ours, "theirs": logits, "facts": facts, "ropes": ropes, "ids": ids}


@pytest.mark.parametrize("name", ["finished", *MADE])
def test_transformers_4_computes_what_transformers_5_does(both, name):
    """Logits to 1e-4 in float32, beyond the original length, with the RoPE of the manifest."""
    ours, theirs = both["ours"][name], both["theirs"][name]
    assert ours.shape == theirs.shape and float(ours.std()) > 0.01
    np.testing.assert_allclose(theirs.numpy(), ours.numpy(), atol=1e-4, rtol=0)
    facts, rope = both["facts"][name], both["ropes"][name]
    np.testing.assert_allclose(facts["inverse_frequencies"], rope["inverse_frequencies"], rtol=1e-6)
    assert facts["attention_factor"] == pytest.approx(rope["attention_factor"])
    assert facts["dtype"] == "torch.float32"


def test_transformers_4_takes_the_tokenizer(both):
    facts = both["facts"]["finished"]
    assert facts["ids"] == both["ids"] and len(both["ids"]) > 20
    assert facts["longest"] == both["ropes"]["finished"]["max_position_embeddings"]


def test_a_rotation_is_told_from_the_bases_own(both):
    """So that equal frequencies mean something: each method's differ from those of the base."""
    for name in ("finished", "linear", "ntk", "pythia"):
        rope = both["ropes"][name]
        assert not np.allclose(rope["inverse_frequencies"], rope["base_inverse_frequencies"]), name


def test_the_run_exports_the_merged_model_without_a_second_copy(finished):
    made = finished.directory / "results/tests"
    record = manifest.read(made / "export.json")
    for name, entry in record["files"].items():
        assert sha256(made / name) == entry["sha256"]
    weights = [made / part / "model.safetensors" for part in ("merged", "export")]
    assert os.path.samefile(*weights)
    for small_file in ("tokenizer.json", "generation_config.json"):
        assert (made / "export" / small_file).read_bytes() == (
            made / "merged" / small_file
        ).read_bytes()
        assert not os.path.samefile(made / "export" / small_file, made / "merged" / small_file)
    config = read_json(made / "export/config.json")
    facts = manifest.read_facts(made / "rope/yarn.json")
    assert config["rope_parameters"] == facts["rope_parameters"]
    assert config["rope_scaling"] | {"rope_theta": config["rope_theta"]} == facts["rope_parameters"]
    assert config["max_position_embeddings"] == 1024
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert record["facts"]["name"] == "micro-base-1k"
    assert record["facts"]["old_rope_keys"] == ["rope_scaling", "rope_theta"]


def test_generation_settings_are_written_where_there_are_none(finished, tmp_path):
    made = of_micro(tmp_path / "made", {"method": "none"}, pad_token_id=7)
    (made / "merged/generation_config.json").unlink()
    record = read_json(made / "merged.json")
    del record["files"]["merged/generation_config.json"]
    write_json(made / "merged.json", record)
    run(export, *arguments(made, finished.directory / "results/tests/report.json"))
    written = read_json(made / "export/generation_config.json")
    assert written == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 7}


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """The micro base with YaRN, up to merged.json."""
    settings = {"method": "yarn", "target_length": 1024}
    return of_micro(tmp_path_factory.mktemp("extended") / "made", settings)


def test_another_rope_than_the_models_is_refused(finished, extended, tmp_path):
    report = finished.directory / "results/tests/report.json"
    other = finished.directory / "results/tests/rope/base.json"
    sentence = refusal(export, *arguments(extended, report, rope=other))
    assert "has RoPE" in sentence
    assert "1024 positions, but the run's manifest says" in sentence
    assert not (extended / "export").exists() and not (extended / "export.json").exists()


def test_old_keys_that_would_win_and_are_wrong_stop_the_stage(finished, extended, monkeypatch):
    """A fault planted in what is written: transformers 5 prefers the old form, so the check must see it."""
    right = transformers4.rope_keys
    monkeypatch.setattr(
        transformers4, "rope_keys", lambda *given: right(*given) | {"rope_theta": 20000.0}
    )
    report = finished.directory / "results/tests/report.json"
    sentence = refusal(export, *arguments(extended, report))
    assert "a llama model would not run as it was trained" in sentence and "20000.0" in sentence
    assert not (extended / "export").exists()


def test_a_family_that_transformers_4_runs_unscaled_gets_no_old_keys():
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert transformers4.rope_keys("nemotron", scaled) == {}
    assert transformers4.rope_keys("nemotron", {"rope_type": "default", "rope_theta": 2e4}) == {
        "rope_theta": 2e4
    }


def test_a_size_of_heads_that_a_config_computes_is_not_written():
    """Falcon's cannot be set, so a config.json that states it does not load."""
    from transformers import FalconConfig

    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    loaded = FalconConfig(alibi=False)
    found = transformers4.with_old_keys({"model_type": "falcon"}, rope, loaded)
    assert "head_dim" not in found and found["rope_scaling"]["factor"] == 2.0
    assert FalconConfig.from_dict(found).rope_parameters == rope


def test_a_tokenizers_own_tokens_have_the_old_name():
    found = transformers4.tokenizer_keys({"tokenizer_class": "T", "extra_special_tokens": ["<a>"]})
    assert found == {"tokenizer_class": "T", "additional_special_tokens": ["<a>"]}
    by_name = {"extra_special_tokens": {"image_token": "<i>"}}
    assert transformers4.tokenizer_keys(by_name) == by_name


# The card.


def front(text: str) -> dict:
    """Return the front matter of a card, as the hub reads it."""
    from huggingface_hub import ModelCard

    found = ModelCard(text)
    assert found.data.to_dict() == yaml.safe_load(text.split("---\n")[1])
    return found.data.to_dict()


def test_the_card_of_the_run(finished):
    made = finished.directory / "results/tests"
    text = (made / "export/README.md").read_text()
    report = read_json(made / "report.json")
    data = front(text)
    assert data["license"] == "other" and data["pipeline_tag"] == "text-generation"
    assert "base_model" not in data  # a directory is nothing to link to
    (index,) = data["model-index"]
    found = {
        metric["name"]: metric["value"]
        for result in index["results"]
        for metric in result["metrics"]
    }
    for length, one in report["perplexity"]["trained"].items():
        assert found.pop(f"perplexity at {int(length):,} tokens") == pytest.approx(
            one["value"], abs=1e-4
        )
    for length, one in report["passkey_by_length"]["trained"].items():
        share = one["successes"] / one["trials"]
        assert found.pop(f"passkeys found at {int(length):,} tokens") == share
    assert not found
    for sentence in (report["verdict"]["sentence"], *report["warnings"]):
        assert sentence in text
    assert report["model"]["disclosure"] in text
    assert model_card.figure(report["perplexity"]["base"]["1024"]) in text
    assert "No threshold was set" in text
    assert '"seed": 0' in text and report["code"]["train"] in text
    assert str(finished.directory) not in text and "202" not in text.split("## How to reproduce")[0]


def test_the_card_is_the_same_for_equal_figures(finished, extended, tmp_path):
    """All but the timings of a report, which differ from run to run, can be in it."""
    report = read_json(finished.directory / "results/tests/report.json")
    cards = []
    for seconds in (1.0, 2.0):
        report["timings"] = {"train": {"seconds": seconds, "peak_memory_mb": None}}
        write_json(tmp_path / "report.json", report)
        run(export, *arguments(extended, tmp_path / "report.json"))
        cards.append((extended / "export/README.md").read_bytes())
    assert cards[0] == cards[1]


def test_what_comes_from_the_hub_is_linked(finished, tmp_path):
    report = read_json(finished.directory / "results/tests/report.json")
    report["model"] |= {"source": "an/Owl-7b", "revision": "0" * 40}
    for collection in report["corpus"]["collections"].values():
        collection |= {"source": f"books/pg | {'1' * 40}", "licence": "by | sa"}
    report["corpus"]["collections"]["pg"] = {"source": f"books/pg at {'1' * 40}"}
    settings = {"name": model_card.default_name(report), "license": "llama2", "language": ["en"]}
    text = model_card.text(ROOT / "resources/card.md.jinja", report, [], settings)
    data = front(text)
    assert data["base_model"] == "an/Owl-7b" and data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["books/pg"] and data["language"] == ["en"]
    assert data["license"] == "llama2" and settings["name"] == "Owl-7b-1k"
    assert "| by \\| sa |" in text


def test_the_card_says_on_what_length_and_counts_what_was_scored(finished):
    """Not that it trained at the target where the sequences are shorter."""
    report = read_json(finished.directory / "results/tests/report.json")
    settings = SETTINGS | {"name": "owl"}

    def text() -> str:
        return model_card.text(ROOT / "resources/card.md.jinja", report, [], settings)

    assert "and trained at that length." in text()
    scored = len([one for one in report["held_out"] if one["scored"]])
    assert f"Perplexity on {scored} held-out documents" in text()
    report["mix"]["sequence_length"] = 768
    report["held_out"].append({"id": "short/one", "tokens": 3, "scored": 0})
    assert "and trained on sequences of 768 tokens." in text()
    assert f"Perplexity on {scored} held-out documents" in text()
    report["rope"]["variants"][report["rope"]["trained"]]["method"] = "none"
    assert "and trained further on sequences of 768 tokens." in text()


def test_the_gates_reasons_are_on_the_card(finished, extended):
    """Both states, from the same figures: a threshold missed, and one met."""
    report = finished.directory / "results/tests/report.json"
    for limit, words in (
        (0.1, "**This model is not verified**, because rounding"),
        (0.5, "It met"),
    ):
        run(export, *arguments(extended, report, asked=NONE | {"merge_error": limit}))
        text = (extended / "export/README.md").read_text()
        assert words in text and "25 % of what training changed in norm.weight" in text


def test_a_name_of_ones_own(extended, finished):
    report = finished.directory / "results/tests/report.json"
    run(export, *arguments(extended, report, name="owl"))
    assert (extended / "export/README.md").read_text().count("# owl\n") == 1
    assert manifest.read_facts(extended / "export.json")["name"] == "owl"


def test_a_template_that_does_not_fit_is_one_sentence(finished, extended, tmp_path):
    (tmp_path / "card").write_text("{{ report.nothing.of_the_kind }}")
    given = arguments(extended, finished.directory / "results/tests/report.json")
    given[given.index("--template") + 1] = tmp_path / "card"
    assert "cannot be filled" in one_sentence(refusal(export, *given))
