"""Perplexity: each protocol equals a direct computation over the tokens that it scores."""

import json
import math

import numpy as np
import pytest
import torch
from stages import run
from transformers import LlamaConfig, LlamaForCausalLM

import perplexity
from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.evaluation import perplexity_protocols
from longyarn.evaluation.window_losses import window_losses

LENGTHS = [64, 200, 512]
SETTINGS = {
    "lengths": LENGTHS,
    "tokens_per_document": 1300,
    "truncate": {"lengths": [32, 300, 512]},
    "by_position": {"buckets": 5},
    "sliding": {"lengths": [300, 512], "stride": 256},
}


@pytest.fixture(scope="module")
def model():
    """A Llama with YaRN whose losses vary widely from token to token."""
    torch.manual_seed(0)
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0}
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=64, max_position_embeddings=512, initializer_range=0.3,
        rope_parameters=yarn | {"original_max_position_embeddings": 64},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def documents():
    generator = np.random.default_rng(0)
    sizes = {"a": 1300, "b": 700, "c": 5000}
    return {name: generator.integers(0, 50, size, dtype=np.int32) for name, size in sizes.items()}


@pytest.fixture(scope="module")
def found(model, documents):
    """The facts of every protocol."""
    return perplexity_protocols.measure(
        lambda texts, length, stride=None: window_losses(model, texts, length, stride, "test"),
        documents,
        {"a": 1024, "b": 512, "c": 1024},
        SETTINGS,
    )


def one_pass(model, ids) -> np.ndarray:
    """Return the losses of all tokens of a window except the first, from all its logits."""
    tokens = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
    chances = torch.log_softmax(logits[:-1].double(), -1)
    return -chances.gather(1, tokens[1:, None])[:, 0].numpy()


def both(windows: list[np.ndarray]) -> tuple[float, float]:
    """Return perplexity weighted by tokens, and exp of the mean of the windows' means."""
    means = [losses.mean() for losses in windows]
    return math.exp(np.concatenate(windows).mean()), math.exp(sum(means) / len(means))


def agrees(figure: dict, windows: list[np.ndarray]) -> None:
    expected = both(windows)
    assert (figure["value"], figure["window_mean"]) == pytest.approx(expected, rel=1e-5)
    assert figure["low"] <= figure["value"] <= figure["high"]


@pytest.mark.parametrize("length", [300, 512])
def test_sliding_equals_the_direct_computation(model, documents, found, length):
    windows = []
    for ids in documents.values():
        text, scored = ids[:1300], 0
        for begin in range(0, len(text), 256):
            losses = one_pass(model, text[begin : begin + length])
            end = min(begin + length, len(text))
            windows.append(losses[-(end - scored) :] if scored else losses)
            scored = end
            if end == len(text):
                break
    agrees(found["sliding"][str(length)], windows)
    value, mean = both(windows)
    assert abs(value / mean - 1) > 1e-4, "the two averagings must differ for a test of both"


@pytest.mark.parametrize("length", [32, 300, 512])
def test_truncation_from_one_pass_equals_a_pass_for_each_length(model, documents, found, length):
    windows = [one_pass(model, ids[:length]) for ids in documents.values()]
    agrees(found["truncate"][str(length)], windows)


@pytest.mark.parametrize("length", LENGTHS)
def test_tiles_of_each_length_score_the_same_tokens(model, documents, found, length):
    first = {at for other in LENGTHS for at in range(0, 1024, other)}
    windows = []
    for ids, count in zip(documents.values(), (1024, 512, 1024), strict=True):
        for begin in range(0, count, length):
            losses = one_pass(model, ids[begin : min(begin + length, count)])
            places = [at - 1 for at in range(1, len(losses) + 1) if begin + at not in first]
            windows.append(losses[places])
    agrees(found["lengths"][str(length)], windows)
    scored = sum(map(len, windows))
    assert found["tokens_scored"] == scored == sum(found["documents"].values())


def test_positions_of_the_longest_window_in_parts(model, documents, found):
    tiles = [
        np.insert(one_pass(model, ids[begin : begin + 512]), 0, np.nan)
        for ids, count in zip(documents.values(), (1024, 512, 1024), strict=True)
        for begin in range(0, count, 512)
    ]
    assert list(found["by_position"]) == ["102", "204", "307", "409", "512"]
    for begin, end in ((0, 102), (102, 204), (204, 307), (307, 409), (409, 512)):
        parts = [tile[max(begin, 1) : end] for tile in tiles]
        agrees(found["by_position"][str(end)], parts)


def test_a_protocol_that_is_null_is_not_made(model, documents):
    none = dict.fromkeys(("truncate", "by_position", "sliding"))
    losses = lambda texts, length: window_losses(model, texts, length, None, "test")  # noqa: E731
    facts = perplexity_protocols.measure(losses, documents, {"b": 512}, SETTINGS | none)
    assert set(facts) == {"tokens_scored", "lengths", "documents"}


def test_the_same_tokens_are_scored_at_every_length():
    scored = perplexity_protocols.scored_everywhere(64, [8, 16, 32])
    assert np.flatnonzero(~scored).tolist() == [0, 8, 16, 24, 32, 40, 48, 56]


def test_documents_are_cut_to_whole_windows_and_the_short_are_named():
    kept, too_short = perplexity_protocols.whole_windows({"a": 100, "b": 31, "c": 64}, 32, 64)
    assert kept == {"a": 64, "c": 64}
    assert too_short == ["b"]
    with pytest.raises(UserError, match="no held-out document has 32 tokens"):
        perplexity_protocols.whole_windows({"b": 31}, 32, 64)


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
        assert set(facts["truncate"]) == {"512", "1024"} and set(facts["sliding"]) == {"512"}
        assert len(facts["by_position"]) == 4


def test_short_documents_are_counted_and_named_on_the_way(finished, tmp_path, capfd):
    made = finished.directory / "results/tests"
    counts = {
        document["id"]: document["tokens"]
        for document in manifest.read_facts(made / "tokens.json")["held_out"]
    }
    short, long = sorted(counts, key=counts.get)
    length = counts[short] + 1
    none = dict.fromkeys(("truncate", "by_position", "sliding"))
    run(
        perplexity, "--variant", "base", "--model", made / "base.json",
        "--rope", made / "rope/base.json", "--precision", "fp32", "--attention", "sdpa",
        "--threads", 2, "--tokens", made / "tokens.json", "--manifest", tmp_path / "base.json",
        "--settings", json.dumps({"lengths": [length], "tokens_per_document": length} | none),
    )  # fmt: skip
    facts = manifest.read_facts(tmp_path / "base.json")
    assert facts["too_short"] == [short] and list(facts["documents"]) == [long]
    said = f"1 of 2 held-out documents have fewer than {length} tokens and are left out: {short}"
    assert said in capfd.readouterr().err
