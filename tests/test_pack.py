"""Mixing and packing: every token is accounted for, and sequences hold what they should."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from longyarn import manifest, packing
from longyarn.cli import UserError


def plan(lengths, **settings):
    settings = {
        "sequence_length": 64, "piece_length": 8, "long_share": 0.5, "token_budget": None, "seed": 0,
    } | settings  # fmt: skip
    return packing.make_plan(lengths, **settings)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("long_share", [0, 0.3, 0.8, 1])
def test_no_token_vanishes_and_none_is_used_twice(seed, long_share):
    lengths = np.random.default_rng(seed).integers(1, 400, size=30).tolist()
    found = plan(lengths, long_share=long_share, seed=seed, piece_length=10)
    packed = sum(piece.length for sequence in found.sequences for piece in sequence)
    assert packed + found.tails_dropped + found.unused == sum(lengths)
    assert sum(found.short_tokens.values()) == packed - 64 * found.long_sequences
    used = [np.zeros(length, dtype=int) for length in lengths]
    for sequence in found.sequences:
        assert sum(piece.length for piece in sequence) == 64
        for piece in sequence:
            assert piece.start >= 0 and piece.start + piece.length <= lengths[piece.document]
            used[piece.document][piece.start : piece.start + piece.length] += 1
    assert max(part.max() for part in used) == 1


@pytest.mark.parametrize("long_share", [0, 0.25, 0.5, 0.75, 1])
def test_long_share_and_piece_length(long_share):
    found = plan([1000, 900, 50, 30, 20], long_share=long_share, token_budget=64 * 8)
    assert len(found.sequences) == 8
    assert found.long_sequences == 8 * long_share
    long = [sequence for sequence in found.sequences if len(sequence) == 1]
    assert len(long) == found.long_sequences
    short = [piece for sequence in found.sequences if len(sequence) > 1 for piece in sequence]
    assert all(piece.length <= 8 for piece in short)


def test_same_seed_same_plan_other_seed_other_plan():
    lengths = [500, 400, 300]
    assert plan(lengths) == plan(lengths)
    assert plan(lengths).sequences != plan(lengths, seed=1).sequences


def test_short_documents_come_before_cut_ones():
    found = plan([640, 30, 34], long_share=0.5, token_budget=128)
    assert found.short_tokens == {"short documents and tails": 64, "cut from long documents": 0}


def test_share_of_positions_past_the_original():
    found = plan([640], long_share=1, piece_length=16)
    assert packing.share_past(found, 16, True) == 48 / 64
    short = plan([640], long_share=0, piece_length=16)
    assert packing.share_past(short, 16, True) == 0
    assert packing.share_past(short, 16, False) == 48 / 64


def test_positions():
    lengths = np.array([3, 1, 2])
    assert packing.positions(lengths, True).tolist() == [0, 1, 2, 0, 0, 1]
    assert packing.positions(lengths, False).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("lengths", "settings", "words"),
    [
        ([63, 63], {}, "no document is as long as rope.target_length 64"),
        ([], {}, "no document is as long"),
        ([200], {"token_budget": 63}, "less than one sequence"),
        ([200], {"token_budget": 640}, "mix.token_budget 640"),
        ([30], {"long_share": 0}, "less than one sequence"),
    ],
)
def test_what_cannot_be_packed_is_refused(lengths, settings, words):
    with pytest.raises(UserError, match=words):
        plan(lengths, **settings)


def test_the_stage_balances_and_copies_exactly(finished):
    run = finished.directory / "results" / "tests"
    facts = manifest.read(run / "pack.json")["facts"]
    parts = ("tokens_packed", "tails_dropped", "unused_by_the_mix", "held_out")
    assert facts["tokens_in"] == sum(facts[part] for part in parts)
    assert facts["tokens_packed"] == facts["sequences"] * facts["sequence_length"] == 16384
    assert facts["share_past_original"] == pytest.approx(facts["long_sequences"] / 16 / 2)

    pack = load_file(run / "pack" / "pack.safetensors")
    tokens = load_file(run / "tokens" / "tokens.safetensors")
    assert facts["tokens_in"] == len(tokens["tokens"])
    documents = manifest.read(run / "tokens.json")["facts"]["documents"]
    training, held_out = "", ""
    for number, document in enumerate(documents):
        text = tokens["tokens"][tokens["offsets"][number] : tokens["offsets"][number + 1]]
        if document["held_out"]:
            held_out += text.tobytes().hex()
        else:
            training += text.tobytes().hex()
    for row in range(facts["sequences"]):
        lengths = pack["piece_lengths"][pack["piece_offsets"][row] : pack["piece_offsets"][row + 1]]
        assert lengths.sum() == 1024
        begin = 0
        for length in lengths:
            piece = pack["input_ids"][row, begin : begin + length].tobytes().hex()
            assert piece in training
            assert length < 64 or piece not in held_out
            begin += length
