"""A model trained elsewhere takes the place of training, or is refused by the key that is wrong."""

import functools
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from stages import bring, edit_json, make_model, one_sentence, refusal, run
from test_config import DEFAULT
from test_config import refusal as config_refusal
from transformers import AutoModelForCausalLM, AutoTokenizer

import adopt
import merge
import patch_rope
from longyarn.core import manifest
from longyarn.core.files import sha256
from longyarn.models.source_files import ADAPTER_CONFIG as ADAPTER
from longyarn.models.source_files import ADAPTER_WEIGHTS as TENSORS

# Where this run's own adapter of q_proj in the first layer lies.
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_an_adapter_of_another_place_gives_the_same_model_and_report(finished_copy):
    """The chain goes on from it byte by byte as from training, and the report says what is not known."""
    made = finished_copy.directory / "results/tests"
    own = sha256(made / "merged/model.safetensors")
    elsewhere = shutil.copytree(made / "trained", finished_copy.directory / "elsewhere")
    overrides = {"training": {"source": "elsewhere"}}
    assert finished_copy.planned(overrides) == {
        "adopt": 1, "merge": 1, "perplexity": 1, "passkey": 1, "report": 1, "gate": 1, "export": 1,
        "provenance": 1,
    }  # fmt: skip
    finished_copy.snakemake(overrides=overrides)
    assert sha256(made / "merged/model.safetensors") == own
    report = json.loads((made / "report.json").read_text())
    assert report["training"]["source"] == "elsewhere"
    assert report["training"]["steps"] is report["training"]["epochs"] is None
    assert report["training"]["adapter"]["rank"] == 4
    # Its seal holds, and its figures are computed again as those of a trained run.
    done = finished_copy.run([sys.executable, "scripts/verify.py", "results/tests"])
    assert "is whole" in done.stdout and "not computed again" not in done.stdout
    assert sum("trained elsewhere" in warning for warning in report["warnings"]) == 1
    assert sum("No config.json came" in warning for warning in report["warnings"]) == 1
    assert report["chain"]["broken"] == 0 and "train" not in report["timings"]
    page = (made / "report.html").read_text()
    assert "provided a LoRA adapter of rank 4" in page and "Training loss" in page
    assert not (made / "figures/loss.png").exists()
    text = (made / "export/README.md").read_text()
    assert "and trained elsewhere." in text and "came from elsewhere" in text
    assert "nothing here shows what it read" in text and "at that length" not in text
    # A changed file of the source is noticed, as of a local base; training's own settings say nothing,
    # but the seal has the configuration.
    overrides["training"]["learning_rate"] = 0.5
    assert finished_copy.planned(overrides) == {"provenance": 1}
    edit_json(elsewhere / ADAPTER, lora_alpha=16)
    assert "adopt" in finished_copy.planned(overrides)


def test_a_missing_source_is_said_before_the_first_job(workspace):
    done = workspace.snakemake(overrides={"training": {"source": "./nowhere"}}, check=False)
    assert done.returncode == 1 and not list(workspace.directory.rglob("results/**/*.json"))
    error = next(line for line in done.stdout.splitlines() if line.startswith("error: "))
    assert "training.source ./nowhere is not a directory" in one_sentence(error)


@pytest.mark.parametrize("source", ["trained", "merged", "export", "mine/deep", "."])
def test_a_source_in_the_runs_own_directory_is_refused(source):
    """Its rule would remove it first."""
    said = config_refusal(DEFAULT, {"training.source": f"results/{DEFAULT['run']}/{source}"})
    assert f"lies in results/{DEFAULT['run']}, which this run writes" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training.source": "x", "phases": [{"rope": {"target_length": 2048}}]}, "phases to []"),
        ({"phases": [{"training": {"source": "x"}}]}, "phases to []"),
        ({"training.source": "x", "sweep.factors": {"mix.seed": [1]}}, "sweep.factors to {}"),
        ({"training.revision": "main"}, "training.source, which is null"),
        (
            {"training.source": "a/b", "training.revision": "main", "model.locked": True},
            "training.revision main is a branch or a tag",
        ),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(changes, words):
    assert words in config_refusal(DEFAULT, changes)


# Single stages, on a small random base.


def make_run(directory, **settings):
    """Make a base and YaRN's RoPE from 128 to 512 tokens below a directory, and return it."""
    torch.manual_seed(0)
    bring(make_model(directory / "model", max_position_embeddings=128, **settings), directory)
    rope = {"method": "yarn", "target_length": 512, "write_config": True}
    run(
        patch_rope, "--base", directory / "base.json", "--settings", json.dumps(rope),
        "--manifest", directory / "rope.json", "--output", directory / "rope",
    )  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base with its RoPE, a whole model and an adapter that were trained from it; do not change them."""
    directory = make_run(tmp_path_factory.mktemp("made"))
    whole, adapter = directory / "whole", directory / "adapter"
    model = AutoModelForCausalLM.from_pretrained(directory / "base")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(whole)
    shutil.copy(directory / "rope/config.json", whole)
    shutil.copy(directory / "base/tokenizer.json", whole)
    shutil.copy(directory / "base/tokenizer_config.json", whole)
    save_adapter(directory / "base", adapter)
    return directory


def save_adapter(base, directory, **settings):
    """Save an adapter of a model, as PEFT does, with random weights."""
    from peft import LoraConfig, get_peft_model

    wanted = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**wanted))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)


def arguments(directory, source, output):
    return [
        "--base", directory / "base.json", "--rope", directory / "rope.json", "--source", source,
        "--cache", output / "cache", "--manifest", output / "trained.json",
        "--output", output / "trained",
    ]  # fmt: skip


def merged(directory, output):
    """Merge what was adopted, and return the tensors."""
    run(
        merge, "--base", directory / "base.json", "--rope", directory / "rope.json",
        "--train", output / "trained.json", "--threads", 1, "--work", output / "work",
        "--manifest", output / "merged.json", "--output", output / "merged",
    )  # fmt: skip
    return load_file(output / "merged/model.safetensors")


def test_a_whole_model_is_merged_as_it_is(made, tmp_path):
    run(adopt, *arguments(made, made / "whole", tmp_path))
    facts = manifest.read_facts(tmp_path / "trained.json")
    assert facts["mode"] == "full" and facts["rope_is_known"] and facts["adapter"] is None
    tensors, own = merged(made, tmp_path), load_file(made / "whole/model.safetensors")
    assert all(tensors[name].equal(tensor) for name, tensor in own.items())
    assert tensors.keys() == own.keys()


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"modules_to_save": ["norm"]}])
def test_an_adapter_is_merged_as_peft_merges_it(made, tmp_path, settings):
    from peft import PeftModel

    save_adapter(made / "base", tmp_path / "adapter", **settings)
    run(adopt, *arguments(made, tmp_path / "adapter", tmp_path))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(made / "base"), tmp_path / "adapter"
    ).merge_and_unload()
    expected = model.state_dict()
    for name, tensor in merged(made, tmp_path).items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name


def test_what_a_model_computes_anew_may_be_there_or_not(tmp_path):
    """Llama 2 came with frequencies in its weights, and some tied models with a copy of the embedding."""
    directory = make_run(tmp_path / "run", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(directory / "base")
    model.model.norm.weight.data += 1
    model.save_pretrained(tmp_path / "whole")
    shutil.copy(directory / "rope/config.json", tmp_path / "whole")
    head = load_file(directory / "base/model.safetensors")["model.embed_tokens.weight"]
    more = {"model/layers/0/self_attn/rotary_emb/inv_freq": torch.ones(4), "lm_head/weight": head}
    edit_tensors(directory / "model/model.safetensors", **more)
    bring(directory / "model", directory)
    run(adopt, *arguments(directory, tmp_path / "whole", tmp_path))
    assert (
        merged(directory, tmp_path).keys() == load_file(tmp_path / "whole/model.safetensors").keys()
    )
    edit_tensors(directory / "model/model.safetensors", **dict.fromkeys(more))
    bring(directory / "model", directory)
    edit_tensors(tmp_path / "whole/model.safetensors", **more)
    run(adopt, *arguments(directory, tmp_path / "whole", tmp_path))


def test_a_rope_that_transformers_4_kept_and_did_not_read_is_refused(made, tmp_path):
    source = shutil.copytree(made / "whole", tmp_path / "whole")
    edit_json(source / "config.json", transformers_version="4.57.6")
    said = refusal(adopt, *arguments(made, source, tmp_path))
    assert "by transformers 4.57.6 and has no rope_scaling" in said


def test_a_tokenizer_that_cannot_be_read_is_one_sentence(made, tmp_path):
    source = shutil.copytree(made / "adapter", tmp_path / "adapter")
    (source / "tokenizer.model").write_bytes(b"broken")
    said = refusal(adopt, *arguments(made, source, tmp_path))
    assert "which training.source names, cannot be loaded" in said


LEGACY = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def test_a_config_in_the_older_form_is_read(made, tmp_path):
    source = shutil.copytree(made / "whole", tmp_path / "whole")
    edit_json(source / "config.json", rope_parameters=..., rope_theta=10000.0, rope_scaling=LEGACY)
    run(adopt, *arguments(made, source, tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factor": 2.0}, "(factor 2, not 4)"),
        ({"rope_theta": 500000.0}, "(rope_theta 500000, not 10000)"),
        ({"original_max_position_embeddings": 64}, "(original_max_position_embeddings 64, not 128)"),
        ({"beta_fast": 16.0}, "(beta_fast 16, not 32)"),
        ({"attention_factor": 1.0}, "(attention_factor 1, not 1.138629436)"),
        ({"factor": 2.0, "rope_theta": 500000.0}, "(factor 2, not 4, rope_theta 500000, not 10000)"),
        # What the base came with: the framework never saw the patched config.json.
        ({"rope_type": "default"}, "(rope_type default, not yarn)"),
        # The trap: without it, the original length is the new one.
        ({"original_max_position_embeddings": ...}, "original_max_position_embeddings"),
    ],
)  # fmt: skip
def test_another_rope_is_refused_by_key(made, tmp_path, changes, words):
    source = shutil.copytree(made / "whole", tmp_path / "whole")
    rope = json.loads((source / "config.json").read_text())["rope_parameters"] | changes
    rope = {key: value for key, value in rope.items() if value is not ...}
    if rope["rope_type"] == "default":
        rope = {"rope_type": "default", "rope_theta": 10000.0}
    edit_json(source / "config.json", rope_parameters=rope)
    assert words in refusal(adopt, *arguments(made, source, tmp_path))
    assert not (tmp_path / "trained.json").exists()


def test_a_wrong_length_and_another_model_are_refused(made, tmp_path):
    source = shutil.copytree(made / "whole", tmp_path / "whole")
    edit_json(source / "config.json", max_position_embeddings=1024)
    said = refusal(adopt, *arguments(made, source, tmp_path))
    assert "(max_position_embeddings 1024, not 512)" in said
    edit_json(source / "config.json", max_position_embeddings=512, model_type="mistral")
    said = refusal(adopt, *arguments(made, source, tmp_path))
    assert "model_type mistral, but the base has llama" in said


def edit_tensors(file, **changes):
    """Change tensors of a file by name; one that becomes None is taken out."""
    tensors = load_file(file) | {name.replace("/", "."): value for name, value in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, file, {"format": "pt"})


NORM = "model/norm/weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ({NORM: None}, "lacks model.norm.weight, which the base has"),
        ({"odd/weight": torch.ones(2)}, "has odd.weight, which the base lacks"),
        ({NORM: torch.ones(33)}, "of shape (33,), but the base has (32,)"),
        ({NORM: torch.full((32,), torch.nan)}, "not finite"),
        ({NORM: torch.ones(32, dtype=torch.int8)}, "without quantization"),
    ],
)
def test_a_whole_model_that_does_not_fit_is_refused(made, tmp_path, spoil, words):
    source = shutil.copytree(made / "whole", tmp_path / "whole")
    edit_tensors(source / "model.safetensors", **spoil)
    assert words in refusal(adopt, *arguments(made, source, tmp_path))


def test_the_base_itself_and_pickled_weights_are_refused(made, tmp_path):
    source = shutil.copytree(made / "whole", tmp_path / "whole")
    shutil.copy(made / "base/model.safetensors", source / "model.safetensors")
    assert "is the base itself" in refusal(adopt, *arguments(made, source, tmp_path))
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "loads safetensors only" in refusal(adopt, *arguments(made, source, tmp_path))
    source = shutil.copytree(made / "adapter", tmp_path / "adapter")
    (source / TENSORS).rename(source / "adapter_model.bin")
    assert f"no {TENSORS}; Longyarn reads" in refusal(adopt, *arguments(made, source, tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "uses use_dora"),
        ({"alpha_pattern": {"q_proj": 2}}, "uses alpha_pattern"),
        ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changed the base"),
        ({"peft_type": "OFT"}, "an adapter of type OFT"),
        ({"r": 8}, "does not have the rank 8"),
        ({"lora_alpha": None}, "has lora_alpha None"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(made, tmp_path, changes, words):
    source = shutil.copytree(made / "adapter", tmp_path / "adapter")
    edit_json(source / ADAPTER, **changes)
    assert words in refusal(adopt, *arguments(made, source, tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensor: None, "but not base_model"),
        (lambda tensor: tensor * 0, "of norm 0"),
        (lambda tensor: tensor / 0, "of norm "),
        (lambda tensor: tensor[:, :5].contiguous(), "trained on another model"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(made, tmp_path, change, words):
    source = shutil.copytree(made / "adapter", tmp_path / "adapter")
    tensors = load_file(source / TENSORS)
    edit_tensors(source / TENSORS, **{A: change(tensors[A])})
    assert words in refusal(adopt, *arguments(made, source, tmp_path))


def test_a_config_beside_an_adapter_is_compared_too(made, tmp_path):
    source = shutil.copytree(made / "adapter", tmp_path / "adapter")
    shutil.copy(made / "base/config.json", source)
    assert "rope_type default, not yarn" in refusal(adopt, *arguments(made, source, tmp_path))
    shutil.copy(made / "rope/config.json", source)
    run(adopt, *arguments(made, source, tmp_path))
    assert manifest.read_facts(tmp_path / "trained.json")["rope_is_known"]


def test_another_vocabulary_is_refused(made, tmp_path):
    source = shutil.copytree(made / "whole", tmp_path / "whole")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(source)
    assert "has another vocabulary than the base" in refusal(
        adopt, *arguments(made, source, tmp_path)
    )


def test_an_embedding_trained_apart_from_its_tied_head_is_refused(tmp_path):
    """The merge would change the head with it, which was not what was trained."""
    directory = make_run(tmp_path / "tied", tie_word_embeddings=True)
    save_adapter(directory / "base", tmp_path / "adapter", modules_to_save=["embed_tokens"])
    said = refusal(adopt, *arguments(directory, tmp_path / "adapter", tmp_path))
    assert "embed_tokens.weight apart from the output head" in said


def test_an_adapter_comes_from_the_hub(hub, made, tmp_path):
    repository = hub.model("an/adapter", made / "adapter")
    command = [sys.executable, ROOT / "scripts/adopt.py"]
    command += arguments(made, "an/adapter", tmp_path)
    stage = functools.partial(
        subprocess.run, env=hub.environment(tmp_path / "home"), capture_output=True, text=True
    )
    done = stage(list(map(str, command)))
    assert "training.revision is needed" in one_sentence(done.stderr)
    done = stage([*map(str, command), "--revision", "main"])
    assert done.returncode == 0, done.stderr
    found = manifest.read_facts(tmp_path / "trained.json")
    assert (found["source"], found["revision"]) == ("an/adapter", repository.commit)
    assert not hub.asked("README.md")
