"""Training against a plain PyTorch loop: every ZeRO stage, world size and mode learns the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stages import one_sentence
from training_runs import BATCH, STEPS, make_inputs, metrics, settings, train
from transformers import GPTNeoXConfig

from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.core.files import read_json
from longyarn.data.packed_dataset import Packed
from longyarn.models import loading, lora
from longyarn.training import deepspeed_setup, model_setup

EMBEDDINGS_AND_NORMS = {"rank": 4, "train_embeddings": True, "train_norms": True}
MODES = {
    "lora": {"lora": {"rank": 4}},
    "lora-embeddings-norms": {"lora": EMBEDDINGS_AND_NORMS},
    "full": {"mode": "full"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Inputs of training, with and without document masks."""
    return {masks: make_inputs(tmp_path_factory.mktemp("inputs"), masks) for masks in (True, False)}


def plain_loop(inputs: Path, training: dict, masks: bool = True) -> tuple[list, list]:
    """Return losses and gradient norms of a loop that uses only PyTorch."""
    torch.manual_seed(training["seed"])
    model = loading.load_model(
        inputs / "base", inputs / "rope.json", dtype="fp32", attention="sdpa"
    )
    if training["mode"] == "lora":
        model = lora.attach(model, training["lora"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=training["learning_rate"], betas=(0.9, training["adam_beta2"]), weight_decay=0
    )
    data = Packed(inputs / "pack" / "pack.safetensors", masks)
    losses, norms = [], []
    model.train()
    for step in range(STEPS):
        rows = [data[row] for row in range(step * BATCH, (step + 1) * BATCH)]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, training["max_grad_norm"])))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [2, 3])
def test_the_first_losses_are_those_of_a_plain_loop(runs, tmp_path, stage, ranks, mode):
    training = settings(zero_stage=stage, nodes=ranks, **MODES[mode])
    train(runs[True], tmp_path, training)
    losses, norms = plain_loop(runs[True], training)
    seen = metrics(tmp_path)
    assert [record["loss"] for record in seen] == pytest.approx(losses, rel=1e-4)
    assert [record["grad_norm"] for record in seen] == pytest.approx(norms, rel=1e-3)
    facts = manifest.read(tmp_path / "trained.json")["facts"]
    assert facts["world_size"] == ranks
    saved = load_file(next((tmp_path / "trained").glob("*.safetensors")))
    assert all(tensor.norm() > 0 for tensor in saved.values())
    assert any("norm" in name for name in saved) == (mode != "lora")


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "stock"},
        {"offload": "optimizer"},
        {"offload": "all", "zero_stage": 3},
        {"gradient_checkpointing": True, "activation_offload": True},
        {"zero_stage": 1},
        {"zero_stage": 0},
    ],
    ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items()),
)
def test_what_saves_memory_changes_no_loss(runs, tmp_path, changes):
    training = settings(**MODES["lora"], **changes)
    train(runs[True], tmp_path, training)
    losses, _ = plain_loop(runs[True], training)
    assert [record["loss"] for record in metrics(tmp_path)] == pytest.approx(losses, rel=1e-4)


def test_two_processes_that_share_each_sequence_learn_what_one_learns(runs, tmp_path):
    one = settings(masks=False, zero_stage=3, **MODES["lora"])
    two = settings(masks=False, zero_stage=3, nodes=2, sp_size=2, **MODES["lora"])
    for name, training in (("one", one), ("two", two)):
        train(runs[False], tmp_path / name, training)
    alone, shared = (metrics(tmp_path / name) for name in ("one", "two"))
    for key in ("loss", "grad_norm"):
        expected = [record[key] for record in alone]
        assert len(expected) == STEPS
        assert [record[key] for record in shared] == pytest.approx(expected, rel=1e-4)


def test_rslora_scales_by_the_root_of_the_rank(runs, tmp_path):
    training = settings(lora={"rank": 4, "rslora": True})
    train(runs[True], tmp_path, training)
    assert read_json(tmp_path / "trained" / "adapter_config.json")["use_rslora"] is True
    losses, _ = plain_loop(runs[True], training)
    assert [record["loss"] for record in metrics(tmp_path)] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize(
    ("masks", "changes", "words"),
    [
        (True, {"sp_size": 2, "nodes": 2}, "needs training.attention flash_attention_2"),
        (False, {"sp_size": 2}, "does not divide the 1 processes"),
        (False, {"sp_size": 2, "nodes": 2, "attention": "eager"}, "cannot share sequences"),
        (False, {"sp_size": 2, "nodes": 2}, "needs training.zero_stage 3"),
        (
            False,
            {"sp_size": 3, "nodes": 3, "batch_size": 3, "zero_stage": 3},
            "sequences of 128 tokens cannot be shared",
        ),
        (True, {"loss": "liger"}, "liger needs a GPU"),
        (True, {"offload": "all"}, "set training.zero_stage to 3"),
        (True, {"offload": "optimizer", "zero_stage": 0}, "set training.zero_stage to 1, 2 or 3"),
        (True, {"activation_offload": True}, "set gradient_checkpointing"),
        (True, {"early_stopping": 3}, "set training.held_out_steps"),
        (True, {"nodes": 3}, "choose a multiple of 3"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_runs(masks, changes, words):
    with pytest.raises(UserError, match=words):
        settings(masks=masks, **changes)


def test_heads_that_cannot_be_shared_are_refused(runs):
    training = settings(masks=False, nodes=4, sp_size=4, zero_stage=3)
    made = loading.load_config(runs[False] / "base", runs[False] / "rope.json")
    with pytest.raises(UserError, match="sp_size 4 cannot share 2 attention heads"):
        model_setup.check_heads(training, made)


def test_a_model_without_grouped_keys_has_one_for_each_head():
    made = GPTNeoXConfig(num_attention_heads=4)
    assert not hasattr(made, "num_key_value_heads")
    model_setup.check_heads(settings(masks=False), made)
    four = settings(masks=False, nodes=4, sp_size=4, zero_stage=3)
    model_setup.check_heads(four, made)
    with pytest.raises(UserError, match="cannot share 6 attention heads with 6"):
        model_setup.check_heads(four, GPTNeoXConfig(num_attention_heads=6))


def test_the_sequences_of_a_step_begin_anew_with_each_epoch(runs):
    data = Packed(runs[True] / "pack" / "pack.safetensors", True)
    assert len(data) == 20
    assert data.rows(1, 8) == range(8)
    assert data.rows(3, 8) == range(16, 20)  # what is left of an epoch is a step of its own
    assert data.rows(4, 8) == range(8)


@pytest.mark.parametrize(
    ("key", "value", "package"),
    [
        ("attention", "flash_attention_2", "flash_attn"),
        ("loss", "liger", "liger_kernel"),
        ("report_to", "tensorboard", "tensorboard"),
        ("report_to", "wandb", "wandb"),
    ],
)
def test_a_package_that_is_not_there_is_named(runs, tmp_path, key, value, package):
    if key == "loss":
        with pytest.raises(UserError, match=package):
            model_setup.require_packages(settings() | {key: value})
        return
    done = train(runs[True], tmp_path, settings() | {key: value}, check=False)
    assert done.returncode == 1
    assert package in one_sentence(done.stderr)
    assert not (tmp_path / "work").exists()


def test_deepspeed_s_configuration_follows_the_settings():
    made = deepspeed_setup.configuration(
        settings(zero_stage=3, offload="all", precision="bf16", max_grad_norm=0.5)
    )
    assert made["gradient_accumulation_steps"] == BATCH
    assert made["bf16"]["enabled"] and not made["fp16"]["enabled"]
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert json.loads(json.dumps(made)) == made
