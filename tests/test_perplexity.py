"""Perplexity: the same tokens at every length, each with the loss that a direct computation gives."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import perplexity
from longyarn import manifest, statistics
from longyarn.cli import UserError


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def naive(model, ids, length, stride):
    """One forward pass for each scored token, with just the context that its window gives it."""
    losses = np.full(len(ids), np.nan)
    begin = 0
    while begin < len(ids):
        end = min(begin + length, len(ids))
        for at in range(begin + 1, end):
            if np.isnan(losses[at]):
                with torch.no_grad():
                    logits = model(torch.tensor([ids[begin:at].tolist()])).logits[0, -1]
                losses[at] = -torch.log_softmax(logits.double(), -1)[ids[at]]
        if end == len(ids):
            break
        begin += stride or length
    return losses


@pytest.mark.parametrize(("length", "stride"), [(8, None), (16, None), (32, None), (16, 4), (8, 3)])
def test_token_losses_equal_the_direct_computation(model, length, stride, monkeypatch):
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 5)
    ids = np.random.default_rng(0).integers(0, 50, size=64).astype(np.int32)
    ours, expected = (
        perplexity.token_losses(model, ids, length, stride),
        naive(model, ids, length, stride),
    )
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert np.isnan(ours).sum() == (1 if stride else 64 // length)


def test_the_same_tokens_are_scored_at_every_length():
    scored = perplexity.scored_everywhere(64, [8, 16, 32], None)
    assert np.flatnonzero(~scored).tolist() == [0, 8, 16, 24, 32, 40, 48, 56]
    assert np.flatnonzero(~perplexity.scored_everywhere(64, [8, 16], 4)).tolist() == [0]


def test_documents_are_cut_to_whole_windows_and_the_short_are_named():
    kept, too_short = perplexity.whole_windows({"a": 100, "b": 31, "c": 64}, 32, 64)
    assert kept == {"a": 64, "c": 64}
    assert too_short == ["b"]
    with pytest.raises(UserError, match="no held-out document has 32 tokens"):
        perplexity.whole_windows({"b": 31}, 32, 64)


def test_perplexity_is_token_weighted_and_its_interval_spans_documents():
    losses, tokens = np.array([10.0, 300.0]), np.array([10, 100])
    value, low, high = statistics.bootstrap_perplexity(losses, tokens)
    assert value == pytest.approx(math.exp(310 / 110))
    assert low == pytest.approx(math.exp(1.0))
    assert high == pytest.approx(math.exp(3.0))
    assert statistics.bootstrap_perplexity(losses[:1], tokens[:1]) == (math.e, math.e, math.e)


def test_the_stage_scores_identical_tokens_for_all_variants(finished):
    found = {
        name: manifest.read(finished.directory / f"results/tests/perplexity/{name}.json")["facts"]
        for name in ("base", "yarn", "trained")
    }
    assert len({str(facts["documents"]) for facts in found.values()}) == 1
    for facts in found.values():
        assert facts["tokens_scored"] == sum(facts["documents"].values()) == 2 * (2048 - 4)
        for entry in facts["lengths"].values():
            total = sum(entry["losses"].values())
            assert entry["value"] == pytest.approx(math.exp(total / facts["tokens_scored"]))
            assert entry["low"] <= entry["value"] <= entry["high"]
