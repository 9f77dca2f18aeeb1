"""Passkey: the prompt is what it says, and success is what greedy decoding would give."""

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import passkey
from longyarn import manifest, statistics
from longyarn.cli import UserError

BASE = ROOT / "resources" / "micro-base"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.mark.parametrize("length", [256, 512, 2048])
@pytest.mark.parametrize("depth", [0, 0.1, 0.5, 1])
def test_prompt_fills_the_length_and_hides_the_key_at_its_depth(tokenizer, length, depth):
    tokens, answer = passkey.prompt(tokenizer, "40917", length, depth)
    line = len(tokenizer(passkey.FILLER, add_special_tokens=False)["input_ids"])
    assert length - line < len(tokens) <= length
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert text.endswith("What is the pass key? The pass key is 40917")
    assert tokenizer.decode(tokens[-answer:]).strip() == "40917"
    before = text.split("The pass key is 40917. Remember it.")[0].count("The grass is green.")
    assert before == round(depth * text.count("The grass is green."))


def test_keys_depend_on_the_cell_and_the_seed_alone():
    first = passkey.draw_keys(5, 5, 0, 512, 0.5)
    assert first == passkey.draw_keys(5, 5, 0, 512, 0.5)
    assert len(set(first)) == 5
    assert first != passkey.draw_keys(5, 5, 0, 512, 0.6)
    assert first != passkey.draw_keys(5, 5, 1, 512, 0.5)
    assert all(len(key) == 5 and key[0] != "0" for key in first)


def test_success_is_what_generate_gives(tokenizer):
    """Greedy decoding, token by token, against one teacher-forced pass; both outcomes occur."""
    model = AutoModelForCausalLM.from_pretrained(BASE).eval()
    prompts = [
        passkey.prompt(tokenizer, key, length, depth)
        for length in (128, 256, 512, 1536)
        for depth in (0.1, 0.9)
        for key in passkey.draw_keys(3, 5, 7, length, depth)
    ]
    ours, theirs = [], []
    for batch in passkey.batches(prompts):
        ours += passkey.retrieved(model, batch)
        for tokens, answer in batch:
            asked = torch.tensor([tokens[:-answer]])
            with torch.no_grad():
                written = model.generate(
                    asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=answer,
                    min_new_tokens=answer, pad_token_id=0,
                )  # fmt: skip
            theirs.append(written[0, -answer:].tolist() == tokens[-answer:])
    assert ours == theirs
    assert 0 < sum(ours) < len(ours)


def test_batches_group_equal_lengths_and_bound_memory(monkeypatch):
    monkeypatch.setattr(passkey, "TOKENS_AT_ONCE", 25)
    prompts = [([0] * 10, 6), ([0] * 12, 6), ([1] * 10, 6), ([2] * 10, 6)]
    groups = passkey.batches(prompts)
    assert [[len(item[0]) for item in group] for group in groups] == [[10, 10], [10], [12]]


def test_too_short_a_length_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"evaluation\.passkey\.lengths has 40"):
        passkey.prompt(tokenizer, "12345", 40, 0.5)


def test_wilson_interval():
    """Values as in Newcombe 1998 (Statistics in Medicine 17), table I, method 3."""
    assert statistics.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert statistics.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert statistics.wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert statistics.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_the_stage_fills_the_grid(finished):
    for name in ("base", "yarn", "trained"):
        grid = manifest.read(finished.directory / f"results/tests/passkey/{name}.json")["facts"][
            "grid"
        ]
        assert set(grid) == {"512", "1024"}
        for row in grid.values():
            assert set(row) == {"0.5"}
            cell = row["0.5"]
            assert cell["trials"] == 2
            assert 0 <= cell["low"] <= cell["successes"] / 2 <= cell["high"] <= 1
