"""Training: the masks work, the losses are right, and checkpoints resume exactly."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.data.packed_dataset import Packed
from longyarn.training import guards

BASE = ROOT / "resources" / "micro-base"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE, attn_implementation="sdpa").eval()


def pack_of(finished) -> Packed:
    return Packed(finished.directory / "results/tests/pack/pack.safetensors", True)


def test_packed_loss_equals_the_loss_of_the_pieces_alone(finished, model):
    data = pack_of(finished)
    row = next(i for i in range(len(data)) if np.diff(data.piece_offsets)[i] > 2)
    item = data[row]
    batch = {name: tensor[None] for name, tensor in item.items()}
    with torch.no_grad():
        packed = model(**batch, use_cache=False).loss
        total, count = 0.0, 0
        starts = [*(item["position_ids"] == 0).nonzero().flatten().tolist(), 1024]
        for begin, end in itertools.pairwise(starts):
            piece = item["input_ids"][None, begin:end]
            if end - begin > 1:
                alone = model(input_ids=piece, labels=piece, use_cache=False).loss
                total += float(alone) * (end - begin - 1)
                count += end - begin - 1
        unmasked = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
    assert len(starts) > 3
    assert float(packed) == pytest.approx(total / count, abs=1e-5)
    assert abs(float(unmasked) - total / count) > 1e-3  # without masks the losses differ


def test_the_mask_guard_passes_with_masks_on(model):
    assert guards.check_masks(model) < 1e-5


def test_the_mask_guard_sees_masks_that_are_off(model):
    """One of the things that switch masks off silently: an attention_mask is passed along."""

    class WithMask(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config, self.device = inner, inner.config, inner.device

        def forward(self, input_ids, **more):
            return self.inner(input_ids, attention_mask=torch.ones_like(input_ids), **more)

    with pytest.raises(UserError, match="document masks have no effect"):
        guards.check_masks(WithMask(model))


def test_first_tokens_of_pieces_are_no_labels(finished):
    item = pack_of(finished)[0]
    assert (item["labels"] == -100).equal(item["position_ids"] == 0)
    assert set(item) == {
        "input_ids",
        "position_ids",
        "labels",
    }  # an attention_mask would undo masks


def test_the_engine_learns_what_a_plain_loop_learns(finished):
    """The first loss that training logs is the patched model's loss on the first batch."""
    run = finished.directory / "results" / "tests"
    facts = manifest.read(run / "trained.json")["facts"]
    from longyarn.models import loading

    model = loading.load_model(run / "base", run / "rope/yarn.json", dtype="fp32", attention="sdpa")
    data = pack_of(finished)
    total = count = 0
    for row in range(2):
        item = {name: tensor[None] for name, tensor in data[row].items()}
        labels = int((item["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(**item, use_cache=False).loss) * labels
        count += labels
    assert facts["loss"][0] == [1, pytest.approx(total / count, rel=1e-4)]
    assert facts["steps"] == 4
    assert facts["tokens_seen"] == 4 * 2 * 1024


def test_guards_ran_and_the_adapter_is_not_empty(finished):
    run = finished.directory / "results" / "tests"
    facts = manifest.read(run / "trained.json")["facts"]
    assert facts["guards"]["inverse_frequencies_float32"] is True
    assert facts["guards"]["document_mask_leak"] < 1e-5
    adapter = load_file(run / "trained" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in adapter.values()) == facts["trainable_parameters"]
    assert all(tensor.norm() > 0 for tensor in adapter.values())
    assert not list((run / "trained").glob("*.bin"))
    assert str(finished.directory) not in (run / "trained" / "adapter_config.json").read_text()


def test_held_out_losses_and_metrics_of_the_whole_chain(finished):
    run = finished.directory / "results" / "tests"
    measured = manifest.read(run / "trained.json")["facts"]["held_out"]
    assert [entry["step"] for entry in measured] == [0, 2, 4]
    assert all(entry["held_out_512"] > 0 and entry["held_out_1024"] > 0 for entry in measured)
    lines = [
        json.loads(line) for line in (run / "logs/train.metrics.jsonl").read_text().splitlines()
    ]
    losses = [[line["step"], line["loss"]] for line in lines if "loss" in line]
    assert losses == manifest.read(run / "trained.json")["facts"]["loss"]
    assert all(line["tokens_per_second"] > 0 for line in lines if "loss" in line)


def test_a_stopped_run_goes_on_and_ends_in_the_same_weights(finished_copy):
    run = finished_copy.directory / "results" / "tests"
    before = manifest.read(run / "trained.json")
    work = next((finished_copy.directory / "work").iterdir())
    first = work / "attempt-0001"
    assert {path.name for path in first.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    # As if it had stopped after step 2, while the next checkpoint was being written.
    (first / "checkpoint-4" / "whole.json").unlink()
    shutil.rmtree(first / "final")
    (run / "trained.json").unlink()
    done = finished_copy.snakemake("results/tests/trained.json")
    assert "resuming from attempt-0001/checkpoint-2" in done.stdout
    assert [path.name for path in work.glob("attempt-*")] == ["attempt-0002"]
    after = manifest.read(run / "trained.json")
    assert after["files"] == before["files"]
    assert after["facts"]["loss"] == before["facts"]["loss"]


def test_full_fine_tuning_by_one_key(finished_copy):
    overrides = {"training": {"mode": "full", "steps": 1, "warmup_steps": 0}}
    finished_copy.snakemake("results/tests/merged.json", overrides=overrides)
    run = finished_copy.directory / "results" / "tests"
    facts = manifest.read(run / "trained.json")["facts"]
    assert facts["mode"] == "full"
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    base = AutoModelForCausalLM.from_pretrained(run / "base")
    assert facts["trainable_parameters"] == sum(p.numel() for p in base.parameters())
    changed = [
        name
        for (name, new), old in zip(merged.named_parameters(), base.parameters(), strict=True)
        if not torch.equal(new, old)
    ]
    assert len(changed) == len(list(base.parameters()))
    assert merged.config.rope_parameters["rope_type"] == "yarn"


def test_embeddings_and_norms_are_trained_and_merged(finished_copy):
    lora = {"train_embeddings": True, "train_norms": True, "dropout": 0.1}
    overrides = {"training": {"steps": 1, "zero_stage": 3, "warmup_steps": 0, "lora": lora}}
    finished_copy.snakemake("results/tests/merged.json", overrides=overrides)
    run = finished_copy.directory / "results" / "tests"
    base, merged = (load_file(run / name / "model.safetensors") for name in ("base", "merged"))
    assert set(base) == set(merged)
    for name in base:
        trained = "embed" in name or "norm" in name or "proj.weight" in name
        assert torch.equal(base[name], merged[name]) != trained, name
