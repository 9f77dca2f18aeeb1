"""Axolotl gets exactly this run: the batches that its own code makes have the same losses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import exports
import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

import export_axolotl
from longyarn.core import manifest
from longyarn.training.document_attention import NAME

REQUIREMENTS = ROOT / "tests/axolotl/requirements.txt"
PLACE = ROOT / ".cache/axolotl"
# Our keys of section `training`, each with the name of the setting that expresses it there; None: nothing.
THEIRS = {
    "mode": "adapter", "steps": "max_steps", "epochs": "num_epochs",
    "learning_rate": "learning_rate", "scheduler": "lr_scheduler",
    "warmup_steps": "warmup_steps", "weight_decay": "weight_decay", "adam_beta2": "adam_beta2",
    "max_grad_norm": "max_grad_norm", "batch_size": "gradient_accumulation_steps",
    "micro_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_offload": "activation_offloading",
    "loss": "liger_fused_linear_cross_entropy", "precision": "bf16, fp16",
    "attention": "attn_implementation", "nodes": "--nnodes", "gpus": "--nproc-per-node",
    "zero_stage": "deepspeed", "offload": "deepspeed", "overlap_communication": "deepspeed",
    "sp_size": "context_parallel_size", "threads": None, "seed": "seed",
    "logging_steps": "logging_steps", "save_steps": "save_steps", "save_minutes": None,
    "save_total_limit": "save_total_limit", "held_out_steps": None, "early_stopping": None,
    "report_to": "use_tensorboard, wandb_project", "lora.rank": "lora_r", "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout", "lora.rslora": "peft_use_rslora",
    "lora.targets": "lora_target_modules", "lora.train_embeddings": "lora_modules_to_save",
    "lora.train_norms": "lora_modules_to_save", "lora.train_output_head": "lora_modules_to_save",
}  # fmt: skip


def axolotl() -> Path:
    """Return the directory of Axolotl's packages, installed if necessary; skip the test if that fails."""
    stamp = PLACE / "requirements.txt"
    if not (stamp.is_file() and stamp.read_bytes() == REQUIREMENTS.read_bytes()):
        shutil.rmtree(PLACE, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--target", PLACE, "-r", REQUIREMENTS]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no Axolotl: {done.stderr.strip().splitlines()[-1]}")
        shutil.copyfile(REQUIREMENTS, stamp)
    return PLACE


# Every setting that can be expressed.
EVERYTHING = {
    "learning_rate": 1.0e-4, "seed": 7, "scheduler": "cosine", "warmup_steps": 1,
    "gradient_checkpointing": True, "activation_offload": True, "adam_beta2": 0.9,
    "weight_decay": 0.1, "max_grad_norm": 0.5, "gpus": 2, "precision": "bf16", "zero_stage": 3,
    "loss": "liger", "attention": "flash_attention_2", "report_to": "tensorboard",
    "lora": {
        "rank": 16, "alpha": 32, "dropout": 0.1, "rslora": True, "targets": "attention",
        "train_embeddings": True, "train_norms": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict:
    """Directories of runs with exports: with masks, without, and with every setting on a tied model."""
    found = {}
    for name, masks, model, changes in (
        ("masks", True, {}, {}),
        ("none", False, {}, {}),
        ("everything", True, {"tie_word_embeddings": True}, EVERYTHING),
    ):
        found[name] = exports.make(tmp_path_factory.mktemp(name), masks, **model)
        exports.export(export_axolotl, found[name], masks, **changes)
    return found


@pytest.fixture(scope="module")
def read(exported) -> dict:
    """What Axolotl's own code makes of each export, in one process, because its imports take long."""
    environment = os.environ | {
        "PYTHONPATH": str(axolotl()), "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, ROOT / "tests/axolotl/read.py"]
    command += [made / "export_axolotl" for made in exported.values()]
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(exported, json.loads(done.stdout.splitlines()[-1]), strict=True))


def loss(model, item: dict) -> tuple[float, int]:
    """Return the sum of the losses of a sequence, and how many labels are scored."""
    batch = {key: torch.as_tensor(item[key])[None] for key in ("input_ids", "position_ids")}
    labels = torch.as_tensor(item["labels"])[None]
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return float(losses), int((labels[:, 1:] != -100).sum())


@pytest.mark.parametrize("name", ["masks", "none"])
def test_its_batches_have_the_losses_of_training_here(exported, read, name):
    """Through its schema, loader, packing and collator, each batch is a packed sequence."""
    masks, inputs, found = name == "masks", exported[name], read[name]
    assert found["unknown"] == [] and found["steps"] == 2
    model = AutoModelForCausalLM.from_pretrained(
        inputs / "export_axolotl/model", attn_implementation=NAME
    ).eval()
    data = exports.packed(inputs, masks)
    assert len(found["batches"]) == len(data) == 4
    for batch, item in zip(found["batches"], data, strict=True):
        theirs = {key: rows[0] for key, rows in batch.items()}
        if not masks:  # as the model numbers them itself
            theirs["position_ids"] = list(range(len(theirs["input_ids"])))
        sums, counts = zip(loss(model, theirs), loss(model, item), strict=True)
        assert counts[0] == counts[1] > 0
        assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_a_row_is_a_piece_and_what_is_not_scored_is_at_its_end(exported):
    made = exported["masks"]
    rows = datasets.load_from_disk(str(made / "export_axolotl/dataset"))["train"]
    assert [len(ids) for ids in rows["input_ids"]] == [60, 30, 30, 20, 40, 40, 20]
    third, fifth = rows[2], rows[4]
    assert third["labels"][-1] == fifth["labels"][-1] == -100
    data = exports.packed(made)
    moved = [*data[1]["input_ids"][31:].tolist(), int(data[1]["input_ids"][30])]
    assert third["input_ids"] == moved
    assert all(row["labels"][0] == -100 for row in rows)
    for row in rows:
        assert set(row["attention_mask"]) == {1} and any(label != -100 for label in row["labels"])


def test_the_model_is_the_base_with_its_new_rope(exported):
    made = exported["masks"]
    output = made / "export_axolotl"
    rope = manifest.read_facts(made / "rope.json")
    assert AutoConfig.from_pretrained(output / "model").rope_parameters == rope["rope_parameters"]
    assert (
        not {"rope_parameters", "rope_scaling", "overrides_of_model_config"}
        & exports.said(output).keys()
    )


def test_every_key_of_training_is_said_or_warned_of(tmp_path, capsys):
    made = exports.make(tmp_path)
    assert THEIRS.keys() == exports.our_keys()
    unsaid = {key for key, name in THEIRS.items() if not name}
    assert unsaid - {"threads"} == export_axolotl.LACKING.keys()
    exports.documented(THEIRS)
    changes = {"save_minutes": 5, "held_out_steps": 2, "early_stopping": 3}
    output = exports.export(export_axolotl, made, **changes)
    said, text = capsys.readouterr().err, (output / "train.yaml").read_text()
    for key, value in (changes | {"loss": "chunked", "gpus": 0}).items():
        assert f"warning: training.{key} {value} cannot be expressed" in said
        assert f"# Not the same: training.{key} {value} cannot be expressed" in text


def test_settings_are_those_of_the_run_and_known_to_it(exported, read):
    """Its own schema accepts them; a tied embedding stays tied."""
    output = exported["everything"] / "export_axolotl"
    values = exports.said(output)
    assert values | {
        "adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.1,
        "peft_use_rslora": True, "peft_ensure_weight_tying": True,
        "lora_target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"], "learning_rate": 1.0e-4,
        "lr_scheduler": "cosine", "warmup_steps": 1, "weight_decay": 0.1, "adam_beta2": 0.9,
        "max_grad_norm": 0.5, "bf16": True, "attn_implementation": "flash_attention_2",
        "gradient_checkpointing": True, "activation_offloading": True, "seed": 7, "max_steps": 2,
        "gradient_accumulation_steps": 1, "micro_batch_size": 1, "use_tensorboard": True,
        "liger_fused_linear_cross_entropy": True, "deepspeed": "deepspeed.json",
    } == values  # fmt: skip
    assert "embed_tokens" in values["lora_modules_to_save"]
    assert json.loads((output / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 3
    assert "--nproc-per-node=2" in (output / "README.md").read_text()
    assert read["everything"]["unknown"] == []


def test_it_is_no_part_of_a_run(finished):
    assert finished.planned({}, "export_axolotl") == {"export_axolotl": 1}
