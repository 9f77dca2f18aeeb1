"""LLaMA-Factory gets exactly this run: its sequences with their labels, its settings and its RoPE."""

import json
import shutil
import subprocess
import sys

import datasets
import exports
import numpy as np
import pytest
import yaml
from conftest import ROOT
from transformers import AutoConfig

import export_llamafactory

sys.path.insert(0, str(ROOT / "benchmarks"))
import llamafactory

from longyarn.core import manifest
from longyarn.core.files import read_json
from longyarn.rope import transformers4

# Our keys of section `training`, each with the name of the setting that expresses it there; None: nothing.
THEIRS = {
    "mode": "finetuning_type", "steps": "max_steps", "epochs": "num_train_epochs",
    "learning_rate": "learning_rate", "scheduler": "lr_scheduler_type",
    "warmup_steps": "warmup_steps", "weight_decay": "weight_decay", "adam_beta2": "adam_beta2",
    "max_grad_norm": "max_grad_norm", "batch_size": "gradient_accumulation_steps",
    "micro_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "disable_gradient_checkpointing", "activation_offload": None,
    "loss": "enable_liger_kernel", "precision": "bf16, fp16", "attention": "flash_attn",
    "nodes": "NNODES", "gpus": "NPROC_PER_NODE", "zero_stage": "deepspeed", "offload": "deepspeed",
    "overlap_communication": "deepspeed", "sp_size": None, "threads": "OMP_NUM_THREADS",
    "seed": "seed", "logging_steps": "logging_steps", "save_steps": "save_steps",
    "save_minutes": None, "save_total_limit": "save_total_limit", "held_out_steps": None,
    "early_stopping": None, "report_to": "report_to", "lora.rank": "lora_rank",
    "lora.alpha": "lora_alpha", "lora.dropout": "lora_dropout", "lora.rslora": "use_rslora",
    "lora.targets": "lora_target", "lora.train_embeddings": "additional_target",
    "lora.train_norms": "additional_target", "lora.train_output_head": "additional_target",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return exports.make(tmp_path_factory.mktemp("made"))


def test_the_data_set_is_the_pack(made):
    """datasets can read it, and each row is a packed sequence with its documents numbered."""
    output = exports.export(export_llamafactory, made)
    rows = datasets.load_from_disk(str(output / "dataset"))["train"].with_format("numpy")
    data, more = exports.packed(made), -exports.LENGTH % 8
    assert len(rows) == len(data) == 4
    for row, item in zip(rows, data, strict=True):
        assert len(row["input_ids"]) == exports.LENGTH + more
        for key in ("input_ids", "labels", "position_ids"):
            assert (row[key][: exports.LENGTH] == item[key].numpy()).all(), key
        assert (row["labels"][exports.LENGTH :] == -100).all()
        assert (row["attention_mask"][exports.LENGTH :] == 0).all()
    assert rows[1]["attention_mask"][:60].tolist() == [1] * 30 + [2] + [3] * 29
    assert rows[2]["attention_mask"].tolist() == [1] * 20 + [2] * 25 + [0] * (15 + more)
    assert (rows[2]["labels"][:10] == -100).all() and rows[2]["labels"][10] != -100


def test_without_document_masks_nothing_says_where_they_are(tmp_path):
    made = exports.make(tmp_path, masks=False)
    output = exports.export(export_llamafactory, made, masks=False)
    rows = datasets.load_from_disk(str(output / "dataset"))["train"]
    assert "position_ids" not in rows.column_names
    assert set(rows[1]["attention_mask"][:60]) == {1}
    assert exports.said(output)["neat_packing"] is False


def test_the_model_is_the_base_with_its_new_rope(made):
    output = exports.export(export_llamafactory, made)
    rope = manifest.read_facts(made / "rope.json")
    config = AutoConfig.from_pretrained(output / "model")
    assert config.rope_parameters == rope["rope_parameters"]
    assert config.max_position_embeddings == rope["max_position_embeddings"]
    # What LLaMA-Factory on transformers 4 reads.
    old = read_json(output / "model/config.json")
    assert old["rope_scaling"] | {"rope_theta": old["rope_theta"]} == rope["rope_parameters"]
    own, base = output / "model/model.safetensors", made / "base/model.safetensors"
    assert own.samefile(base)  # linked, not copied
    assert "rope_scaling" not in exports.said(output)
    small, base = output / "model/tokenizer.json", made / "base/tokenizer.json"
    assert small.read_bytes() == base.read_bytes() and not small.samefile(base)


def test_a_family_without_an_older_form_is_warned_of(made, monkeypatch, capsys):
    monkeypatch.setattr(transformers4, "UNSCALED", ("llama",))
    output = exports.export(export_llamafactory, made)
    assert "rope_scaling" not in read_json(output / "model/config.json")
    said = "has no scaled RoPE for models of type llama"
    assert said in capsys.readouterr().err
    assert (
        said in (output / "train.yaml").read_text() and said in (output / "README.md").read_text()
    )


def test_the_result_lies_outside_the_run_and_no_absolute_path_is_written(made):
    output = exports.export(export_llamafactory, made)
    place = exports.said(output)["output_dir"]
    assert not (output / place).resolve().is_relative_to(made.resolve())
    text = (output / "README.md").read_text()
    assert str(made.parent) not in text
    assert f"source: <paths.results>/{made.name}-export_llamafactory/trained" in text


def test_the_same_export_twice_is_the_same_bytes(made):
    first = manifest.read(made / f"{exports.export(export_llamafactory, made).name}.json")
    second = manifest.read(made / f"{exports.export(export_llamafactory, made).name}.json")
    assert first == second and "dataset/train" in " ".join(first["files"])
    assert first["files"].keys() >= {f"export_llamafactory/{name}" for name in (
        "README.md", "train.yaml", "model/config.json", "model/tokenizer.json",
    )}  # fmt: skip


def test_every_key_of_training_is_said_or_warned_of(made, capsys):
    assert THEIRS.keys() == exports.our_keys()
    assert {key for key, name in THEIRS.items() if not name} == export_llamafactory.LACKING.keys()
    exports.documented(THEIRS)
    changes = {"save_minutes": 5, "held_out_steps": 2, "early_stopping": 3}
    output = exports.export(export_llamafactory, made, **changes)
    said, text = capsys.readouterr().err, (output / "train.yaml").read_text()
    for key, value in (changes | {"loss": "chunked"}).items():
        assert f"warning: training.{key} {value} cannot be expressed" in said
        assert f"# Not the same: training.{key} {value} cannot be expressed" in text


def test_settings_are_those_of_the_run(made):
    values = exports.said(exports.export(export_llamafactory, made, **{
        "learning_rate": 1.0e-4, "batch_size": 2, "seed": 7, "scheduler": "cosine", "warmup_steps": 1,
        "gradient_checkpointing": True, "adam_beta2": 0.9, "weight_decay": 0.1, "max_grad_norm": 0.5,
        "lora": {
            "rank": 16, "alpha": 32, "dropout": 0.1, "rslora": True, "targets": "attention",
            "train_embeddings": True, "train_norms": True, "train_output_head": True,
        },
    }))  # fmt: skip
    assert values | {
        "finetuning_type": "lora", "learning_rate": 1.0e-4, "seed": 7, "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "max_steps": 2,
        "adam_beta2": 0.9, "weight_decay": 0.1, "max_grad_norm": 0.5, "use_rslora": True,
        "disable_gradient_checkpointing": False, "lora_rank": 16, "lora_alpha": 32,
        "lora_dropout": 0.1, "lora_target": "k_proj,o_proj,q_proj,v_proj", "use_cpu": True,
        "disable_shuffling": True, "warmup_steps": 1, "neat_packing": True,
    } == values  # fmt: skip
    whole = set(values["additional_target"].split(","))
    assert whole == {
        "embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip


def test_full_training_on_gpus_has_deepspeed_and_a_launcher(made):
    output = exports.export(
        export_llamafactory, made, mode="full", steps=None, epochs=1.5, gpus=2, precision="bf16",
        zero_stage=3, offload="optimizer", attention="flash_attention_2", loss="liger",
    )  # fmt: skip
    values = exports.said(output)
    assert values["finetuning_type"] == "full" and "lora_rank" not in values
    assert values["bf16"] and values["flash_attn"] == "fa2" and values["enable_liger_kernel"]
    assert values["num_train_epochs"] == 1.5 and "max_steps" not in values
    zero = json.loads((output / values["deepspeed"]).read_text())["zero_optimization"]
    assert zero["stage"] == 3 and zero["offload_optimizer"]["device"] == "cpu"
    assert "FORCE_TORCHRUN=1 NPROC_PER_NODE=2" in (output / "README.md").read_text()


def test_without_shared_sequences_the_batch_stays_the_same(made, capsys):
    shared = {"gpus": 2, "sp_size": 2, "zero_stage": 3, "attention": "flash_attention_2"}
    output = exports.export(export_llamafactory, made, batch_size=4, precision="bf16", **shared)
    assert "training.sp_size 2 cannot be expressed" in capsys.readouterr().err
    assert exports.said(output)["gradient_accumulation_steps"] == 2  # of each of two
    assert json.loads((output / "deepspeed.json").read_text())["gradient_accumulation_steps"] == 2


def test_a_batch_that_divides_only_among_shared_sequences_is_refused(made):
    shared = {"gpus": 8, "sp_size": 8, "zero_stage": 3, "attention": "flash_attention_2"}
    with pytest.raises(SystemExit, match=r"training\.sp_size 8 cannot be expressed, because"):
        exports.export(export_llamafactory, made, batch_size=2, precision="bf16", **shared)


def test_a_tied_embedding_trained_apart_is_warned_of(tmp_path, capsys):
    made = exports.make(tmp_path, tie_word_embeddings=True)
    exports.export(export_llamafactory, made, lora={"rank": 4, "train_embeddings": True})
    assert "its result cannot be used as training.source" in capsys.readouterr().err


def test_it_is_no_part_of_a_run(finished):
    assert finished.planned({}, "export_llamafactory") == {"export_llamafactory": 1}
    assert finished.planned() == {}


TRAIN = """
import torch, yaml
torch.set_num_threads(1)
from llamafactory.train.tuner import run_exp
run_exp(yaml.safe_load(open("train.yaml")))
"""


def test_its_own_trainer_learns_the_same_and_comes_back(finished_copy):
    """Its losses equal those of Longyarn's training at every step, and so does the adapter it returns."""
    if not (llamafactory.ENVIRONMENT / "whole").is_file():
        pytest.skip("no LLaMA-Factory: `python benchmarks/llamafactory.py` makes its environment")
    made = finished_copy.directory / "results/tests"
    finished_copy.snakemake("export_llamafactory")
    python = llamafactory.environment()
    done = subprocess.run(
        [python, "-P", "-c", TRAIN], cwd=made / "llamafactory", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trained = made.parent / "tests-llamafactory/trained"
    log = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    losses = [[entry["step"], entry["loss"]] for entry in log if "loss" in entry]
    assert np.allclose(losses, manifest.read_facts(made / "trained.json")["loss"], atol=1e-3)
    own = shutil.copyfile(made / "merged/model.safetensors", made.parent / "own.safetensors")
    overrides = {"training": {"source": "results/tests-llamafactory/trained"}}
    readme = (made / "llamafactory/README.md").read_text()
    assert yaml.safe_load(readme.split("```yaml")[1].split("```")[0]) == overrides
    finished_copy.snakemake("results/tests/merged.json", overrides=overrides)
    from safetensors.numpy import load_file

    theirs, ours = load_file(made / "merged/model.safetensors"), load_file(own)
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert np.allclose(theirs[name], tensor, atol=1e-4), name
