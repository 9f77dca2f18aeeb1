"""Passkey: prompts are as described, and success equals that of greedy decoding."""

from argparse import Namespace

import pytest
import torch
from conftest import ROOT
from stages import bring, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.evaluation import intervals, passkey_prompts, shared_prefixes, variant_model

BASE = ROOT / "resources" / "micro-base"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def filler(tokenizer):
    return passkey_prompts.read_haystack(tokenizer, None)


@pytest.mark.parametrize("length", [256, 512, 2048])
@pytest.mark.parametrize("depth", [0, 0.1, 0.5, 1])
def test_prompt_fills_the_length_and_hides_the_key_at_its_depth(tokenizer, filler, length, depth):
    tokens, answer = passkey_prompts.prompt(tokenizer, {"": "40917"}, length, depth, filler)
    line = len(tokenizer(passkey_prompts.FILLER, add_special_tokens=False)["input_ids"])
    assert length - line < len(tokens) <= length
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert text.endswith("What is the pass key? The pass key is 40917")
    assert tokenizer.decode(tokens[-answer:]).strip() == "40917"
    before = text.split("The pass key is 40917. Remember it.")[0].count("The grass is green.")
    assert before == round(depth * text.count("The grass is green."))


TEXT = (
    'On Monday he rose. "Who is there?" she asked.\nNobody was. Then the rain began, and it did not end.\n'
    "\nIn spring they left. 他们走了。没有人回来。The house stood empty"
)


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


def test_a_text_is_cut_at_lines_and_sentences(tokenizer, text_file):
    lines = [tokenizer.decode(line) for line in passkey_prompts.read_haystack(tokenizer, text_file)]
    assert "".join(lines) == TEXT
    assert lines[:3] == ["On Monday he rose. ", '"Who is there?" ', "she asked.\n"]
    assert lines[-3:] == ["他们走了。", "没有人回来。", "The house stood empty"]


@pytest.mark.parametrize("length", [192, 1024])
@pytest.mark.parametrize("depth", [0, 0.3, 1])
def test_a_text_hides_the_key_and_begins_again(tokenizer, text_file, length, depth):
    haystack = passkey_prompts.read_haystack(tokenizer, text_file)
    tokens, _ = passkey_prompts.prompt(tokenizer, {"": "40917"}, length, depth, haystack)
    assert length - max(map(len, haystack)) < len(tokens) <= length

    text = tokenizer.decode(tokens, skip_special_tokens=True)
    line = passkey_prompts.KEY_LINE.format(key="40917")
    before, after = text.removeprefix(passkey_prompts.PREFIX).split(line)
    hidden = before + after.removesuffix("What is the pass key? The pass key is 40917")
    assert (TEXT * 20).startswith(hidden)
    assert (before == "") == (depth == 0)
    assert (TEXT * 2 in hidden) == (length == 1024)


def test_a_haystack_without_breaks_fills_the_prompt(tokenizer, tmp_path):
    """A single sentence with more tokens than the prompt."""
    (tmp_path / "text.txt").write_text("and so on and on " * 500)
    haystack = passkey_prompts.read_haystack(tokenizer, tmp_path / "text.txt")
    tokens, _ = passkey_prompts.prompt(tokenizer, {"": "40917"}, 1024, 0.5, haystack)
    assert 1024 - passkey_prompts.LONGEST_LINE < len(tokens) <= 1024


def test_several_needles_have_names_and_one_is_asked_for(tokenizer, filler):
    (needles,) = passkey_prompts.draw_needles(1, 5, 0, 4, 1024, 0.5)
    asked, key = next(iter(needles.items()))
    assert [key] == passkey_prompts.draw_keys(1, 5, 0, 1024, 0.5), "whatever the number of others"
    assert len(needles) == len(set(needles.values())) == 4
    tokens, answer = passkey_prompts.prompt(tokenizer, needles, 1024, 0.5, filler)
    assert 1024 - len(filler[0]) < len(tokens) <= 1024
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert text.endswith(f"What is the pass key of {asked}? The pass key of {asked} is {key}")
    assert tokenizer.decode(tokens[-answer:]).strip() == key
    places = {}
    for name, hidden in needles.items():
        (before, _) = text.split(passkey_prompts.NAMED_LINE.format(name=name, key=hidden))
        places[name] = before.count("The grass is green.") / text.count("The grass is green.")
    assert places.pop(asked) == pytest.approx(0.5, abs=0.03)
    assert list(places.values()) == pytest.approx([1 / 6, 3 / 6, 5 / 6], abs=0.03)


def test_all_needles_must_fit(tokenizer, filler):
    (needles,) = passkey_prompts.draw_needles(1, 5, 0, 10, 256, 0.5)
    with pytest.raises(UserError, match="has 256, too short for 10 keys, the question and a line"):
        passkey_prompts.prompt(tokenizer, needles, 256, 0.5, filler)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00 no text", b" \n\n"])
def test_a_haystack_that_is_no_text_is_refused(tokenizer, tmp_path, content):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(
        UserError, match=r"evaluation\.passkey\.haystack .*text\.txt (cannot be|is em)"
    ):
        passkey_prompts.read_haystack(tokenizer, tmp_path / "text.txt")


def test_keys_depend_on_the_cell_and_the_seed_alone():
    first = passkey_prompts.draw_keys(5, 5, 0, 512, 0.5)
    assert first == passkey_prompts.draw_keys(5, 5, 0, 512, 0.5)
    assert len(set(first)) == 5
    assert first != passkey_prompts.draw_keys(5, 5, 0, 512, 0.6)
    assert first != passkey_prompts.draw_keys(5, 5, 1, 512, 0.5)
    assert all(len(key) == 5 and key[0] != "0" for key in first)


@pytest.mark.parametrize("needles", [1, 2])
def test_success_is_what_generate_gives(tokenizer, filler, needles):
    """One teacher-forced pass agrees with greedy decoding, token by token; both outcomes occur."""
    model = AutoModelForCausalLM.from_pretrained(BASE).eval()
    reader = shared_prefixes.Reader(model)
    cells = [(length, depth) for length in (160, 256, 512, 1536) for depth in (0.1, 0.9)]
    prompts = {
        cell: [
            passkey_prompts.prompt(tokenizer, hidden, *cell, filler)
            for hidden in passkey_prompts.draw_needles(3, 5, 7, needles, *cell)
        ]
        for cell in cells
    }
    ours, theirs = [], []
    for _, batch in passkey_prompts.in_order(prompts):
        ours += passkey_prompts.retrieved(reader, batch)
        for tokens, answer in batch:
            asked = torch.tensor([tokens[:-answer]])
            with torch.no_grad():
                written = model.generate(
                    asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=answer,
                    min_new_tokens=answer, pad_token_id=0,
                )  # fmt: skip
            theirs.append(written[0, -answer:].tolist() == tokens[-answer:])
    assert len(ours) == 3 * len(cells)
    assert ours == theirs
    assert 0 < sum(ours) < len(ours) or needles > 1  # the micro base was trained with one key only


def test_batches_group_equal_lengths_and_bound_memory(monkeypatch):
    monkeypatch.setattr(passkey_prompts, "TOKENS_AT_ONCE", 35)
    prompts = [([0] * 10, 6), ([0] * 12, 6), ([1] * 10, 6), ([2] * 10, 6)]
    groups = passkey_prompts.batches(prompts)
    assert [[len(item[0]) for item in group] for group in groups] == [[10, 10], [10], [12]]


def test_too_short_a_length_is_refused(tokenizer, filler):
    with pytest.raises(UserError, match=r"evaluation\.passkey\.lengths has 40"):
        passkey_prompts.prompt(tokenizer, {"": "12345"}, 40, 0.5, filler)


def test_wilson_interval():
    """Values as in Newcombe 1998 (Statistics in Medicine 17), table I, method 3."""
    assert intervals.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert intervals.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert intervals.wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert intervals.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


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


def test_lengths_that_are_not_stated_follow_from_the_base(tmp_path):
    base = bring(make_model(tmp_path / "model"), tmp_path)
    arguments = Namespace(base=base, target=2048, original=None)
    assert variant_model.lengths(arguments, None) == [512, 1024, 2048]
    assert variant_model.lengths(arguments, None, least=1024) == [1024, 2048]
    assert variant_model.lengths(arguments, [600]) == [600]
    arguments.original = 1024
    assert variant_model.lengths(arguments, None) == [1024, 2048]
    arguments.target = None
    with pytest.raises(UserError, match="give --lengths, or --target and --base"):
        variant_model.lengths(arguments, None)
