"""A user's mistakes, as the user meets them: one sentence, nothing expensive begun, nothing lost."""

import json
import re
import shutil
import sys

import pytest
from safetensors.numpy import load_file, save_file
from stages import MICRO_BASE, bring, edit_json, make_model, one_sentence, refusal, run
from transformers.utils import is_flash_attn_2_available

import pack
import passkey
import patch_rope
import perplexity
import tokenise
from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.models import loading

# RoPE: models and settings that the stage patch_rope refuses

SETTINGS = {
    "method": "yarn",
    "target_length": 4096,
    "factor": None,
    "original_max_position_embeddings": None,
    "original_reason": None,
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": None,
    "write_config": True,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random Llama of two layers, context 512; do not change it."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny model that a test may change."""
    return shutil.copytree(tiny, tmp_path / "model")


def patched(model, directory, **settings) -> dict:
    """Bring a model, run patch_rope on it, and return what it says the RoPE is."""
    base = bring(model, directory)
    run(
        patch_rope, "--base", base, "--settings", json.dumps(SETTINGS | settings),
        "--manifest", directory / "rope.json", "--output", directory / "rope",
    )  # fmt: skip
    return manifest.read(directory / "rope.json")["facts"]


def refused(model, directory, **settings) -> str:
    """Return the sentence with which patch_rope refuses a model or settings."""
    base = bring(model, directory)
    sentence = refusal(
        patch_rope, "--base", base, "--settings", json.dumps(SETTINGS | settings),
        "--manifest", directory / "rope.json", "--output", directory / "rope",
    )  # fmt: skip
    assert not (directory / "rope.json").exists()
    assert not (directory / "rope").exists()
    return sentence


def test_a_factor_that_contradicts_the_lengths(model, tmp_path):
    sentence = refused(model, tmp_path, factor=4)
    assert "rope.factor 4 contradicts rope.target_length 4096 / original length 512 = 8" in sentence
    assert "leave rope.factor null or correct the lengths" in sentence


def test_a_factor_that_agrees(model, tmp_path):
    assert patched(model, tmp_path, factor=8)["factor"] == 8


def test_an_original_length_that_contradicts_the_model(model, tmp_path):
    sentence = refused(model, tmp_path, original_max_position_embeddings=256)
    assert "rope.original_max_position_embeddings 256 contradicts the model's max_pos" in sentence
    assert "or explain in rope.original_reason why" in sentence


def test_an_original_length_with_a_reason(model, tmp_path):
    facts = patched(
        model,
        tmp_path,
        original_max_position_embeddings=256,
        original_reason="it was trained at 256",
    )
    assert facts["factor"] == 16
    assert facts["rope_parameters"]["original_max_position_embeddings"] == 256


def test_a_target_that_is_no_extension(model, tmp_path):
    sentence = refused(model, tmp_path, target_length=512)
    assert "rope.target_length 512 is not longer than the original length 512; raise it" in sentence


def test_a_model_without_rope(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)).save_pretrained(
        tmp_path / "model"
    )
    sentence = refused(tmp_path / "model", tmp_path)
    assert "(model_type 'gpt2') has no RoPE; only models with rotary position emb" in sentence


def test_a_rope_for_each_kind_of_layer(tmp_path):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads)).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert set(config["rope_parameters"]) == {"full_attention", "sliding_attention"}
    sentence = refused(tmp_path / "model", tmp_path)
    assert "gives each kind of layer its own RoPE" in sentence


def test_a_sliding_window(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    config = MistralConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, sliding_window=1024
    )
    config.max_position_embeddings = 512
    MistralForCausalLM(config).save_pretrained(tmp_path / "model")
    sentence = refused(tmp_path / "model", tmp_path)
    assert "within a sliding window of 1024 tokens, less than rope.target_length 4096" in sentence
    assert "set rope.sliding_window to full" in sentence
    facts = patched(tmp_path / "model", tmp_path, sliding_window="full")
    assert (facts["factor"], facts["full_attention"]) == (8, True)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("method", ["yarn", "none"])
def test_a_scaling_that_longyarn_does_not_take(model, tmp_path, method):
    edit_json(model / "config.json", rope_parameters=DYNAMIC)
    sentence = refused(model, tmp_path / "dynamic", method=method)
    assert "of type 'dynamic', whose frequencies change with the length of the input" in sentence
    edit_json(model / "config.json", rope_parameters=PROPORTIONAL)
    sentence = refused(model, tmp_path / "proportional", method=method)
    assert (
        "rope_type 'proportional' is not one that Longyarn knows (default, linear, ya" in sentence
    )
    assert "choose a model" in sentence


@pytest.mark.parametrize(
    ("kind", "misspelt"),
    [("default", "attn_factor"), ("yarn", "attn_factor"), ("yarn", "beta_fst")],
)
def test_a_misspelt_key_in_the_models_rope(model, tmp_path, kind, misspelt):
    parameters = {"rope_type": kind, "rope_theta": 10000.0, misspelt: 1.2}
    if kind == "yarn":
        parameters |= {"factor": 2.0, "original_max_position_embeddings": 256}
    edit_json(model / "config.json", rope_parameters=parameters)
    sentence = refused(model, tmp_path)
    assert f"rope_parameters of type '{kind}' has the unknown key '{misspelt}'; known" in sentence


def legacy(model) -> None:
    """Write a model's RoPE as transformers did before version 5, scaled from 128 to 512."""
    edit_json(
        model / "config.json",
        rope_parameters=...,
        rope_theta=10000.0,
        rope_scaling={"type": "linear", "factor": 4.0},
    )


def test_a_model_that_is_scaled_already(model, tmp_path):
    legacy(model)
    sentence = refused(model, tmp_path)
    assert "already has RoPE scaling of type 'linear'; to replace it, set" in sentence
    assert "rope.original_max_position_embeddings" in sentence
    assert "rope.original_reason" in sentence


def test_a_legacy_scaling_is_read_and_written_in_todays_form(model, tmp_path):
    legacy(model)
    reason = "linear scaling came later; it was trained at 128"
    facts = patched(model, tmp_path, original_max_position_embeddings=128, original_reason=reason)
    assert (facts["factor"], facts["max_position_embeddings"]) == (32, 4096)
    written = json.loads((tmp_path / "rope" / "config.json").read_text())
    assert "rope_scaling" not in written
    assert "rope_theta" not in written
    assert written["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    assert written["max_position_embeddings"] == 4096


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no_such_type"},
        {"hidden_size": "wide"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0}},
        {"max_position_embeddings": None},
    ],
    ids=str,
)
def test_a_config_that_is_no_models(model, tmp_path, changes):
    edit_json(model / "config.json", **changes)
    assert "config.json" in refused(model, tmp_path)


# Evaluation and packing: what needs the tokenizer or the tokens


@pytest.fixture
def evaluated(tmp_path):
    """A brought model with its RoPE and a tokenised corpus: 3,000 and 300 tokens, about."""
    shutil.copytree(MICRO_BASE, tmp_path / "model")
    patched(tmp_path / "model", tmp_path, target_length=1024)
    lines = [
        json.dumps({"id": f"books/{name}", "text": f"The sun is {colour}. Here we go.\n" * 30})
        for name, colour in (("held", "yellow"), ("train", "orange"))
    ]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "documents.jsonl").write_text("\n".join(lines) + "\n")
    manifest.write(
        tmp_path / "corpus.json",
        script=tokenise.__file__,
        settings={},
        inputs={},
        files=[tmp_path / "corpus" / "documents.jsonl"],
        facts={"documents": 2},
    )
    run(
        tokenise, "--base", tmp_path / "base.json", "--corpus", tmp_path / "corpus.json",
        "--held-out", "books/held", "--work", tmp_path / "work",
        "--manifest", tmp_path / "tokens.json", "--output", tmp_path / "tokens",
    )  # fmt: skip
    return tmp_path


def instrument(directory, attention="sdpa") -> list:
    return [
        "--variant", "yarn", "--model", directory / "base.json", "--rope", directory / "rope.json",
        "--precision", "fp32", "--attention", attention, "--threads", 1,
        "--manifest", directory / "result.json",
    ]  # fmt: skip


PASSKEY = ["--depths", 0.5, "--trials", 1, "--digits", 5, "--seed", 0]


def test_a_tokenizer_with_more_tokens_than_the_model(tiny, tmp_path):
    """A token added without an embedding would stop training at the first document that has it."""
    model = shutil.copytree(tiny, tmp_path / "model")
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    added = dict(tokenizer["added_tokens"][0]) | {"id": size, "content": "<one more>"}
    tokenizer["added_tokens"].append(added)
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError) as error:
        loading.load_tokenizer(model, False)
    assert f"has the token '<one more>' with the number {size}" in str(error.value)
    assert f"the model's vocabulary ends at {size - 1} (vocab_size {size} in config.json)" in str(
        error.value
    )
    # Embeddings are often padded, so fewer tokens are no mistake.
    edit_json(model / "config.json", vocab_size=size + 64)
    assert len(loading.load_tokenizer(model, False)) == size + 1


def test_a_passkey_length_that_is_too_short(evaluated):
    sentence = refusal(passkey, *instrument(evaluated), *PASSKEY, "--lengths", 512, 64)
    assert "evaluation.passkey.lengths has 64, too short for the question and a line" in sentence
    assert re.search(r"use at least \d+", sentence)
    assert not (evaluated / "result.json").exists()


def test_no_held_out_document_is_long_enough(evaluated):
    sentence = refusal(
        perplexity, *instrument(evaluated), "--tokens", evaluated / "tokens.json",
        "--settings", json.dumps({"lengths": [512, 1024], "tokens_per_document": 2048}),
    )  # fmt: skip
    assert (
        "no held-out document has 1024 tokens; hold out longer documents (corpus.held_" in sentence
    )
    assert "or lower evaluation.perplexity.lengths" in sentence


def test_no_document_is_long_enough_to_train_on(evaluated):
    arguments = [
        "--tokens", evaluated / "tokens.json", "--rope", evaluated / "rope.json",
        "--document-masks", "--seed", 0, "--manifest", evaluated / "pack.json",
        "--output", evaluated / "pack",
    ]  # fmt: skip
    sentence = refusal(pack, *arguments, "--long-share", 0.8)
    assert "no document is as long as rope.target_length 1024 tokens (the longest has" in sentence
    assert "add longer documents or set it to 0" in sentence
    sentence = refusal(pack, *arguments, "--long-share", 0)
    assert "less than one sequence of 1024 tokens" in sentence
    assert not (evaluated / "pack.json").exists()


def test_an_attention_that_is_not_installed(evaluated):
    if is_flash_attn_2_available():
        pytest.skip("flash_attn is installed here")
    arguments = instrument(evaluated, "flash_attention_2")
    sentence = refusal(passkey, *arguments, *PASSKEY, "--lengths", 512)
    assert "evaluation.attention flash_attention_2 cannot be used here" in sentence
    assert "install it or set sdpa" in sentence


def change_tensor(directory, name, change) -> None:
    """Bring the model again with one tensor changed, or left out where ``change`` gives None."""
    file = directory / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    file.unlink()
    save_file(kept, file, metadata={"format": "pt"})
    bring(directory / "model", directory)


def test_a_tensor_is_missing(evaluated):
    """transformers alone would fill it with random numbers and go on."""
    change_tensor(evaluated, "model.layers.1.mlp.up_proj.weight", lambda tensor: None)
    sentence = refusal(passkey, *instrument(evaluated), *PASSKEY, "--lengths", 512)
    assert "lacks the tensor model.layers.1.mlp.up_proj.weight; restore" in sentence


def test_a_tensor_has_another_shape(evaluated):
    change_tensor(evaluated, "model.norm.weight", lambda tensor: tensor[:5].copy())
    sentence = refusal(passkey, *instrument(evaluated), *PASSKEY, "--lengths", 512)
    assert "do not have the shapes of its config.json; model.source mixes" in sentence


# Through Snakemake: what the terminal shows


def told(done) -> str:
    """Return the one sentence in what Snakemake printed; a traceback fails the test."""
    assert done.returncode != 0
    assert "Traceback" not in done.stdout, done.stdout
    sentences = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, done.stdout
    return one_sentence(sentences[0])


def with_configfile(workspace, name: str):
    """Start Snakemake with one config file of the user's."""
    return workspace.run(
        [sys.executable, "-m", "snakemake", "--cores", "1", "--configfile", name], check=False
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"rope": {"beta_fst": 32}}, "config key 'rope.beta_fst' is unknown; did you mean"),
        ({"training": {"learning_rate": "1e-4"}}, "so write 1.0e-4"),
        ({"evaluation": {"passkey": {"lengths": [9999]}}}, "beyond rope.target_length 1024"),
    ],
    ids=["unknown key", "text for a number", "contradiction"],
)
def test_a_bad_config_stops_before_the_first_job(workspace, overrides, expected):
    done = workspace.snakemake(overrides=overrides, check=False)
    assert expected in told(done)
    assert done.stdout.rstrip().splitlines()[-1].startswith("error: "), "it is the last line"
    assert 'File "' not in done.stdout
    assert not (workspace.directory / "results").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("rope: [4096\n", "not valid JSON or YAML"),
        ("rope: a: b\n", "not valid JSON or YAML"),
        ("- rope\n", "with keys at top level"),
        ("", "with keys at top level"),
    ],
    ids=["bracket", "colons", "list", "empty"],
)
def test_a_config_file_that_is_no_mapping(workspace, content, expected):
    """Snakemake reads --configfile before anything of ours; its own words have no traceback."""
    (workspace.directory / "mine.yaml").write_text(content)
    done = with_configfile(workspace, "mine.yaml")
    assert done.returncode != 0
    assert expected in done.stdout
    assert "Traceback" not in done.stdout
    assert not (workspace.directory / "results").exists()


def test_a_missing_config_file_starts_nothing(workspace):
    done = with_configfile(workspace, "mien.yaml")
    assert done.returncode != 0
    assert "mien.yaml" in done.stdout
    assert not (workspace.directory / "results").exists()


def test_a_model_without_weights_is_told_and_logged(workspace):
    (workspace.directory / "empty").mkdir()
    (workspace.directory / "empty" / "config.json").write_text("{}")
    done = workspace.snakemake(
        "results/tests/base.json", overrides={"model": {"source": "./empty"}}, check=False
    )
    sentence = told(done)
    assert "empty has no model.safetensors; Longyarn loads safetensors only" in sentence
    log = workspace.directory / "results" / "tests" / "logs" / "download_model.log"
    assert log.read_text().strip() == sentence


def test_a_mistake_loses_no_finished_stage(workspace):
    target = "results/tests/tokens.json"
    mistake = {"corpus": {"held_out": ["shakespeare/hamlt"]}}
    done = workspace.snakemake(target, overrides=mistake, check=False)
    assert "names 'shakespeare/hamlt', which the corpus lacks; did you mean" in told(done)
    for name in ("base.json", "corpus.json"):
        manifest.read(workspace.directory / "results" / "tests" / name)
    assert not (workspace.directory / "results" / "tests" / "tokens").exists()
    mended = workspace.snakemake("-n", target).stdout
    assert re.findall(r"^(?:local)?rule (\w+):", mended, re.M) == ["tokenise"], mended
