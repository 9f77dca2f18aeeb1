"""The micro base model that we ship: small, honest about its window, and good within it."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from longyarn.data.token_store import held_out_documents
from longyarn.evaluation import passkey_prompts, shared_prefixes
from longyarn.evaluation.window_losses import window_losses

BASE = ROOT / "resources" / "micro-base"
sys.path.insert(0, str(BASE / "training"))

import exercises  # noqa: E402
import micro_base  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def test_it_is_a_small_plain_llama_of_safetensors():
    files = list(BASE.iterdir())
    assert sum(file.stat().st_size for file in files) <= 10e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".py")]
    config = json.loads((BASE / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["max_position_embeddings"] == micro_base.WINDOW == 512
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_digits_are_single_tokens(tokenizer):
    tokens = tokenizer.tokenize(" 90210")
    assert [token for token in tokens if token.strip("Ġ")] == ["9", "0", "2", "1", "0"]


def test_it_was_trained_without_the_held_out_books():
    record = json.loads((BASE / "training.json").read_text())
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    assert sorted(record["held_out"]) == sorted(config["corpus"]["held_out"])
    card = (BASE / "README.md").read_text()
    for name in config["corpus"]["held_out"]:
        assert name in card


def test_it_retrieves_within_its_window(model, tokenizer):
    reader, found = shared_prefixes.Reader(model), []
    filler = passkey_prompts.read_haystack(tokenizer, None)
    for length in (128, 256, 512):
        for depth in (0.1, 0.5, 0.9):
            keys = passkey_prompts.draw_keys(8, 5, 1, length, depth)
            prompts = [
                passkey_prompts.prompt(tokenizer, {"": key}, length, depth, filler) for key in keys
            ]
            for batch in passkey_prompts.batches(prompts):
                found += passkey_prompts.retrieved(reader, batch)
    assert sum(found) >= 0.95 * len(found)


def test_its_perplexity_rises_past_its_window(model, finished):
    run = finished.directory / "results" / "tests"
    held_out = held_out_documents(run / "tokens.json")
    ids = held_out["shakespeare/tempest"][:8192]
    short, long = (
        math.exp(np.concatenate(window_losses(model, {"": ids}, length, None, "")[""]).mean())
        for length in (512, 4096)
    )
    assert short < 80
    assert long > 1.4 * short


def test_the_exercises_never_pass_the_window(tokenizer):
    assert max(length for stage in exercises.STAGES for length in stage.lengths) <= 512


def test_training_it_is_deterministic_in_its_start(tokenizer):
    torch.manual_seed(0)
    first = micro_base.build_model(tokenizer)
    torch.manual_seed(0)
    second = micro_base.build_model(tokenizer)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_its_card_has_the_numbers_of_its_training():
    record = json.loads((BASE / "training.json").read_text())
    assert micro_base.model_card(record) == (BASE / "README.md").read_text()


def test_its_workflow_takes_the_corpus_from_longyarn(workspace):
    snakefile = "resources/micro-base/training/Snakefile"
    done = workspace.run(["snakemake", "-n", "-s", snakefile, "--cores", "2"])
    assert set(re.findall(r"^(?:local)?rule (\w+):$", done.stdout, re.M)) == {
        "longyarn_download_corpus", "micro_base",
    }  # fmt: skip
