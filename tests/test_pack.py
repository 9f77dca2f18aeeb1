"""Mixing and packing: every token is accounted for, and sequences hold the right pieces."""

import json

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from stages import MICRO_BASE, bring, refusal, rope_facts, run
from test_tokenise import TALK, arguments, corpus_of_many, inputs, write_corpus  # noqa: F401
from transformers import AutoModelForCausalLM

import pack
import tokenise
from longyarn.config import derived
from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.core.files import write_json
from longyarn.data import filling, packing
from longyarn.data.packed_dataset import IGNORED, Packed
from longyarn.data.pieces import PADDING, Pieces, Plan, positions, share_past
from longyarn.data.token_store import TRAINING, Tokens

LENGTH = 64


def plan(lengths, **settings):
    settings = {
        "sequence_length": LENGTH, "piece_length": 8, "long_share": 0.5, "token_budget": None,
        "seed": 0,
    } | settings  # fmt: skip
    return packing.make_plan(lengths, **settings)


def sequences(found: Plan) -> list[list[tuple[int, int, int]]]:
    """Return each sequence's pieces as (document, start, length)."""
    pieces = found.pieces
    rows = list(
        zip(pieces.document.tolist(), pieces.start.tolist(), pieces.length.tolist(), strict=True)
    )
    return [
        rows[begin:end] for begin, end in zip(found.offsets[:-1], found.offsets[1:], strict=True)
    ]


def check(
    found: Plan, lengths: list[int], piece_length: int, whole: frozenset[int] = frozenset()
) -> list[np.ndarray]:
    """Check the properties of every plan; return how often each token is used, by document.

    ``whole``: the documents that are never cut.
    """
    assert found.real.tokens + found.tails_dropped + found.unused == sum(lengths)
    assert found.real.tokens + found.padding == len(found) * LENGTH
    assert sum(found.short_tokens.values()) == found.real.tokens - LENGTH * found.long_sequences
    counted = [np.zeros(length, dtype=int) for length in lengths]
    long = 0
    for sequence in sequences(found):
        assert sum(length for _, _, length in sequence) == LENGTH
        long += len(sequence) == 1 and sequence[0][0] != PADDING
        for document, start, length in sequence:
            if document == PADDING:
                assert (document, start, length) == sequence[-1]
                continue
            assert start >= 0 and start + length <= lengths[document]
            if document in whole:
                assert (start, length) == (0, lengths[document])
            else:
                assert length <= piece_length or (length == LENGTH and start % LENGTH == 0)
            counted[document][start : start + length] += 1
    assert max(part.max() for part in counted) <= 1
    if piece_length < LENGTH and not whole:
        assert long == found.long_sequences
    return counted


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100) | st.integers(1, 400), min_size=1, max_size=30)
    | st.lists(st.integers(30, 400), min_size=20, max_size=30),
    long_share=st.sampled_from([0, 0.3, 0.5, 0.8, 1]),
    piece_length=st.integers(1, LENGTH),
    budget=st.none() | st.integers(LENGTH, 9 * LENGTH) | st.integers(1, 40 * LENGTH),
    strategy=st.sampled_from(["concat", "best_fit"]),
    collections=st.lists(st.integers(0, 2), min_size=30, max_size=30),
    shares=st.none() | st.tuples(*[st.integers(1, 4)] * 2, st.integers(0, 4)),
    short_from=st.none() | st.sets(st.sampled_from("abc"), min_size=2),
    whole=st.just(frozenset()) | st.frozensets(st.integers(0, 29)),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_token_is_accounted_for(
    lengths,
    long_share,
    piece_length,
    budget,
    strategy,
    collections,
    shares,
    short_from,
    whole,
    seed,
):
    whole = frozenset(number for number in whole if number < len(lengths))
    of = np.asarray(collections[: len(lengths)])
    if shares:
        shares = {
            name: part / sum(shares) for name, part in zip("abc", shares, strict=True) if part
        }
        short_from = short_from and (set(shares) & short_from or None)
    sources = packing.Sources(of, list("abc"), shares, short_from and sorted(short_from))
    asked = {
        "long_share": long_share, "piece_length": piece_length, "token_budget": budget,
        "strategy": strategy, "sources": sources, "seed": seed,
        "whole": np.isin(np.arange(len(lengths)), list(whole)),
    }  # fmt: skip
    try:
        found = plan(lengths, **asked)
    except UserError:
        event("refused")  # it is impossible; the tests below show that possible mixes are packed
        return
    event(f"packed by {strategy}, {'with' if shares else 'without'} shares")
    assert strategy == "best_fit" or not whole
    counted = check(found, lengths, piece_length, whole)
    assert found.too_long == sum(lengths[number] > LENGTH for number in whole)
    count = len(found)
    assert budget is None or count == budget // LENGTH
    assert abs(found.long_sequences - long_share * count) <= 0.5 + len(short_from or "") * bool(
        shares
    )
    if strategy == "concat":
        assert found.padding == 0
    else:
        assert found.tails_dropped == 0
        for number, _, _ in zip_pieces(found):
            if number >= 0 and lengths[number] <= piece_length:
                assert counted[number].all(), "a document that fits is not cut"
        uncut = {
            (number, *part)
            for number, length in enumerate(lengths)
            for part in parts_of(length, length if number in whole else piece_length)
        }
        assert {piece for piece in zip_pieces(found) if piece[0] >= 0} <= uncut
    if shares:
        of_sequence = np.zeros(3)
        for sequence in sequences(found):
            owners = {of[document] for document, _, _ in sequence if document != PADDING}
            assert len(owners) == 1
            of_sequence[owners.pop()] += 1
        for name, part in shares.items():
            assert abs(of_sequence["abc".index(name)] - part * count) < 1
    if short_from:
        allowed = ["abc".index(name) for name in short_from]
        for sequence in sequences(found):
            if len(sequence) > 1 or sequence[0][2] != LENGTH:
                assert all(of[d] in allowed for d, _, _ in sequence if d != PADDING)
    again = plan(lengths, **asked)
    assert sequences(again) == sequences(found)


def parts_of(length: int, piece_length: int) -> set[tuple[int, int]]:
    """Return the windows and pieces, (start, length), that a document may be cut into."""
    whole = length // LENGTH * LENGTH
    windows = {(start, LENGTH) for start in range(0, whole, LENGTH)}
    return windows | {
        (start, min(piece_length, end - start))
        for begin, end in [*((b, b + size) for b, size in windows), (whole, length)]
        for start in range(begin, end, piece_length)
    }


def zip_pieces(found: Plan) -> list[tuple[int, int, int]]:
    return [piece for sequence in sequences(found) for piece in sequence]


@pytest.mark.parametrize("strategy", ["concat", "best_fit"])
@pytest.mark.parametrize("long_share", [0, 0.25, 0.5, 0.75, 1])
def test_long_share_and_piece_length(long_share, strategy):
    lengths = [1000, 900, 50, 30, 20]
    found = plan(lengths, long_share=long_share, token_budget=LENGTH * 8, strategy=strategy)
    assert len(found) == 8
    assert found.long_sequences == 8 * long_share
    assert (found.long_documents, found.long_windows) == (2, 15 + 14)
    check(found, lengths, 8)


def test_concat_by_hand():
    """Pieces of 3, 5 and 4 in sequences of 4: the second piece continues in the next sequence."""
    queue = Pieces(
        np.array([0, 1, 2]), np.array([10, 20, 30]), np.array([3, 5, 4]), np.ones(3, bool)
    )
    found = filling.concat(queue, 2, 4)
    assert found.offsets.tolist() == [0, 2, 3]
    assert found.pieces.document.tolist() == [0, 1, 1]
    assert found.pieces.start.tolist() == [10, 20, 21]
    assert found.pieces.length.tolist() == [3, 1, 4]
    assert (found.tail, found.unused) == (0, 4)
    assert filling.concat(queue, 1, 4).tail == 4


def test_best_fit_by_hand():
    """The longest first, each where least room is left: 7 | 6 + 2 | 5 + 3 in bins of 8."""
    assert filling.fit([7, 6, 5, 3, 2], 8).tolist() == [0, 1, 2, 2, 1]
    queue = Pieces(np.arange(5), np.zeros(5, int), np.array([2, 7, 3, 6, 5]), np.ones(5, bool))
    # 2, 7, 3 and 6 could fill two sequences; 3 would need a third.
    found = filling.best_fit(queue, 2, 8)
    assert found.pieces.document.tolist() == [1, PADDING, 3, 0]
    assert found.pieces.length.tolist() == [7, 1, 6, 2]
    assert found.offsets.tolist() == [0, 2, 4]
    assert found.unused == 3 + 5


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    capacity=st.integers(50, 80),
)
@settings(deadline=None)
def test_best_fit_is_what_a_search_of_all_bins_finds(lengths, capacity):
    rooms: list[int] = []
    for length, number in zip(lengths, filling.fit(lengths, capacity).tolist(), strict=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            assert rooms[number] == min(fitting)
        else:
            assert number == len(rooms)
            rooms.append(capacity)
        rooms[number] -= length


def test_best_fit_wastes_little():
    lengths = np.random.default_rng(0).integers(1, 65, size=3000)
    found = plan(lengths, long_share=0, piece_length=LENGTH, strategy="best_fit")
    assert len(found) == lengths.sum() // LENGTH
    assert found.padding < 0.02 * lengths.sum()


def test_a_collection_without_long_documents_gives_short_pieces():
    lengths, of = [64 * 9, 64 * 9] + [8] * 40, [0, 1] + [2] * 40
    shares = {"a": 0.25, "b": 0.25, "c": 0.5}
    found = plan(
        lengths, long_share=0.5, token_budget=64 * 8, sources=sources(of, "abc", shares=shares)
    )
    assert found.long_sequences == 4
    assert {d for d, _, length in zip_pieces(found) if length < LENGTH} == set(range(2, 42)) & {
        d for d, _, _ in zip_pieces(found)
    }


def test_whole_parts_up_to_a_limit():
    assert packing.whole_parts_up_to([1, 1, 2], 8, [9, 9, 9]) == [2, 2, 4]
    assert packing.whole_parts_up_to([1, 1, 2], 8, [9, 9, 0]) == [4, 4, 0]
    assert packing.whole_parts_up_to([1, 1, 2], 8, [1, 9, 3]) == [1, 4, 3]
    assert packing.whole_parts_up_to([1, 1, 2], 8, [1, 1, 1]) == [1, 1, 6]


@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=6), total=st.integers(0, 1000))
def test_whole_parts(weights, total):
    parts = packing.whole_parts(weights, total)
    assert sum(parts) == total
    exact = [weight / sum(weights) * total for weight in weights]
    assert all(abs(part - one) < 1 for part, one in zip(parts, exact, strict=True))


def test_same_seed_same_plan_other_seed_other_plan():
    lengths = [500, 400, 300]
    assert sequences(plan(lengths)) == sequences(plan(lengths))
    assert sequences(plan(lengths)) != sequences(plan(lengths, seed=1))


def test_short_documents_come_before_cut_ones():
    found = plan([640, 30, 34], long_share=0.5, token_budget=128)
    assert found.short_tokens == {"short documents and tails": 64, "cut from long documents": 0}


def sources(of: list[int], names="ab", **asked) -> packing.Sources:
    return packing.Sources(np.asarray(of), list(names), **asked)


def test_a_conversation_is_packed_whole_or_not_at_all():
    lengths, whole = [40, 64, 65, 20, 200], np.asarray([True, True, True, False, False])
    found = plan(lengths, long_share=0, strategy="best_fit", whole=whole)
    pieces = zip_pieces(found)
    assert {piece for piece in pieces if piece[0] < 2} == {(0, 0, 40), (1, 0, 64)}
    assert not any(piece[0] == 2 for piece in pieces)
    assert (found.too_long, found.long_documents) == (1, 1)
    with pytest.raises(UserError, match=r"mix\.packing concat would cut conversations"):
        plan(lengths, long_share=0, whole=whole)


def test_where_short_pieces_come_from_is_stated():
    lengths, of = [640, 640, 64, 60, 60], [0, 0, 1, 1, 1]
    asked = {"long_share": 0.5, "token_budget": 256}
    found = plan(lengths, sources=sources(of, short_from=["b"]), **asked)
    assert {document for document, _, length in zip_pieces(found) if length < LENGTH} <= {2, 3, 4}
    # From a corpus of long documents only: their windows, cut to the original length.
    found = plan(lengths, sources=sources(of, short_from=["a"]), **asked)
    assert found.short_tokens == {"short documents and tails": 0, "cut from long documents": 128}
    assert {document for document, _, length in zip_pieces(found) if length < LENGTH} <= {0, 1}


def test_positions():
    lengths = np.array([3, 1, 2])
    assert positions(lengths, True).tolist() == [0, 1, 2, 0, 0, 1]
    assert positions(lengths, False).tolist() == [0, 1, 2, 3, 4, 5]


def test_share_of_positions_past_the_original():
    found = plan([640], long_share=1, piece_length=16)
    assert share_past(found, 16, True) == 48 / 64
    short = plan([640], long_share=0, piece_length=16)
    assert share_past(short, 16, True) == 0
    assert share_past(short, 16, False) == 48 / 64
    padded = plan([40, 40], long_share=0, piece_length=LENGTH, strategy="best_fit")
    assert share_past(padded, 16, False) == share_past(padded, 16, True) == 24 / 40


SHARED = {"shares": {"a": 0.5, "b": 0.5}}


@pytest.mark.parametrize(
    ("lengths", "settings", "words"),
    [
        ([63, 63], {}, "no document is as long as rope.target_length 64"),
        ([], {}, "no document is as long"),
        ([200], {"token_budget": 63}, "less than one sequence"),
        ([200], {"token_budget": 640}, "mix.token_budget 640"),
        ([30], {"long_share": 0}, "less than one sequence"),
        ([64, 64], {"sources": sources([0, 1], shares={"c": 1})}, "mix.shares names the collecti"),
        ([64, 64], {"sources": sources([0, 1], short_from=["c"])}, "it has a, b"),
        (
            [640, 640],
            {"sources": sources([0, 1], short_from=["b"], **SHARED), "long_share": 0.25},
            "leaves 0.75 of the tokens to the short part, but by mix.shares .* have 0.5; raise",
        ),
        (
            [640, 64],
            {"sources": sources([0, 1], **SHARED), "token_budget": 320},
            "b 1 long and 1 short sequences, and has 1 long windows and 0 tokens in pieces",
        ),
        (
            [640, 30],
            {"sources": sources([0, 1], shares={"b": 1}), "long_share": 0},
            "has no whole sequence of 64 tokens",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(lengths, settings, words):
    with pytest.raises(UserError, match=words):
        plan(lengths, **settings)


def test_too_little_for_the_steps_says_how_much_is_missing():
    with pytest.raises(
        UserError, match="reads 640 tokens, but the pack holds 576: 64 tokens are m"
    ):
        derived.require_enough(9, 64, 640, False)
    derived.require_enough(9, 64, 640, True)
    derived.require_enough(10, 64, 640, False)


# The stage itself.


def packed(directory, *more) -> list:
    """Write RoPE settings and return the arguments of the stage."""
    rope = rope_facts(original_max_position_embeddings=128, max_position_embeddings=512)
    write_json(directory / "rope.json", {"facts": rope, "files": {}})
    return [
        "--tokens", directory / "tokens.json", "--rope", directory / "rope.json", "--seed", 0,
        "--document-masks", "--manifest", directory / "pack.json", "--output", directory / "pack",
        *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tokenised(tmp_path_factory):
    """A corpus of two collections, tokenised by four processes."""
    directory = tmp_path_factory.mktemp("tokenised")
    bring(MICRO_BASE, directory)
    corpus_of_many(directory)
    run(tokenise, *arguments(directory, "a/0", workers=4))
    return directory


def test_workers_and_seeds(tokenised):
    """The bytes depend on the seed, not on the number of processes that tokenised."""

    def made(seed: int) -> bytes:
        run(
            pack, *packed(tokenised, "--long-share", 0.6, "--token-budget", 100_000, "--seed", seed)
        )
        return (tokenised / "pack/pack.safetensors").read_bytes()

    by_four = made(3)
    run(tokenise, *arguments(tokenised, "a/0", workers=1))
    assert made(3) == by_four
    assert made(4) != by_four


def test_shares_and_sources_reach_the_stage_through_snakemake(finished_copy):
    mix = {"shares": {"shakespeare": 1}, "short_from": ["shakespeare"], "packing": "best_fit"}
    overrides = {"mix": mix | {"token_budget": 8192}}
    finished_copy.snakemake("results/tests/pack.json", overrides=overrides)
    record = manifest.read(finished_copy.directory / "results/tests/pack.json")
    assert {key: record["settings"][key] for key in mix} == mix


@pytest.mark.parametrize("strategy", ["concat", "best_fit"])
def test_the_stage_copies_exactly_and_reports(tokenised, strategy):
    mix = ["--shares", '{"a": 0.25, "b": 0.75}', "--packing", strategy, "--long-share", 0.6]
    run(pack, *packed(tokenised, *mix))
    record = manifest.read(tokenised / "pack.json")
    facts, tokens = record["facts"], Tokens(tokenised / "tokens.json")
    parts = ("tokens_packed", "tails_dropped", "unused_by_the_mix", "held_out", "duplicates")
    assert facts["tokens_in"] == sum(facts[part] for part in parts) == tokens.lengths.sum()
    assert facts["tokens_packed"] + facts["padding"] == facts["sequences"] * 512
    assert facts["tokens_scored"] == facts["tokens_packed"]
    stored = load_file(tokenised / "pack/pack.safetensors")
    assert stored["input_ids"].dtype == np.uint16
    assert stored["input_ids"].shape == (facts["sequences"], 512)
    whole, owners = {number: tokens.tokens(number) for number in range(len(tokens))}, []
    for row in range(0, facts["sequences"], 7):
        begin, (first, last) = 0, stored["piece_offsets"][row : row + 2]
        for number, length in zip(
            stored["piece_documents"][first:last], stored["piece_lengths"][first:last], strict=True
        ):
            piece = stored["input_ids"][row, begin : begin + length].astype(np.int32)
            begin += length
            if number == PADDING:
                assert not piece.any()
                continue
            assert tokens.roles[number] == TRAINING
            windows = np.lib.stride_tricks.sliding_window_view(whole[number], length)
            assert (windows == piece).all(axis=1).any()
        assert begin == 512
    owners = tokens.collections[stored["piece_documents"]]
    owners[stored["piece_documents"] == PADDING] = -1
    for number, name in enumerate(tokens.collection_names):
        source = facts["collections"][name]
        assert source["tokens_packed"] == stored["piece_lengths"][owners == number].sum()
        assert source["share"] == source["tokens_packed"] / facts["tokens_packed"]
        # Exact except for rounding to a sequence, and for padding.
        wrong = source["tokens_packed"] - facts["sequences"] * 512 * {"a": 0.25, "b": 0.75}[name]
        assert abs(wrong) < 512 + facts["padding"]
    pieces = sum(entry["pieces"] for entry in facts["piece_lengths"])
    assert pieces == (stored["piece_documents"] != PADDING).sum()
    assert sum(entry["tokens"] for entry in facts["piece_lengths"]) == facts["tokens_packed"]
    assert facts["documents_used"] == len(set(stored["piece_documents"]) - {PADDING})


def test_too_few_tokens_for_the_steps_are_refused_by_the_stage(tokenised):
    mix = ["--long-share", 0.6, "--token-budget", 5120]
    sentence = refusal(pack, *packed(tokenised, *mix, "--read", 6000))
    assert "the pack holds 5120: 880 tokens are missing" in sentence
    run(pack, *packed(tokenised, *mix, "--read", 6000, "--allow-repeats"))


@pytest.mark.parametrize("masks", [True, False])
def test_padding_and_questions_are_not_learnt(inputs, masks):  # noqa: F811
    """The loss of a padded sequence with conversations counts only its answers and texts."""
    asked = [
        {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Just so many."},
    ]  # fmt: skip
    texts = [{"id": f"a/{n}", "text": "The sun is yellow. " * (n + 9)} for n in range(4)]
    talks = [{"id": "t/0", "messages": TALK}, {"id": "t/1", "messages": asked}]
    write_corpus(inputs, [*texts, *talks, {"id": "h/0", "text": "Held out."}])
    run(tokenise, *arguments(inputs, "h/0", chat_template="llama-2"))
    mix = ["--long-share", 0, "--packing", "best_fit"]
    if not masks:
        mix.append("--no-document-masks")
    run(pack, *packed(inputs, *mix, "--sequence-length", 200))
    record = manifest.read(inputs / "pack.json")["facts"]
    assert record["padding"] > 0
    assert (record["documents_cut"], record["conversations_too_long"]) == (0, 0)
    data, tokens = Packed(inputs / "pack/pack.safetensors", masks), Tokens(inputs / "tokens.json")
    stored = load_file(inputs / "pack/pack.safetensors")
    assert record["tokens_scored"] == stored["scored"].sum() < record["tokens_packed"]
    model = AutoModelForCausalLM.from_pretrained(MICRO_BASE, attn_implementation="sdpa").eval()
    conversations = 0
    for row in range(len(data)):
        item = data[row]
        scored, begin, total = 0, 0, 0.0
        first, last = stored["piece_offsets"][row : row + 2]
        for number, length in zip(
            stored["piece_documents"][first:last], stored["piece_lengths"][first:last], strict=True
        ):
            labels = item["labels"][begin : begin + length]
            if number == PADDING:
                assert (labels == IGNORED).all()
            elif (mask := tokens.scored(number)) is not None and "t/" in tokens.id(number):
                conversations += 1
                expected = torch.from_numpy(mask[:length].copy())
                assert ((labels != IGNORED) == expected).all()
            if masks and number != PADDING:
                alone = {"input_ids": item["input_ids"][None, begin : begin + length]}
                kept = int((labels[1:] != IGNORED).sum())
                with torch.no_grad():
                    loss = model(**alone, labels=labels[None], use_cache=False).loss
                scored, total = scored + kept, total + float(loss) * kept
            begin += length
        if masks:
            batch = {name: tensor[None] for name, tensor in item.items()}
            with torch.no_grad():
                loss = float(model(**batch, use_cache=False).loss)
            assert loss == pytest.approx(total / scored, abs=1e-5)
    assert conversations
    assert PADDING not in data.documents(range(len(data)))


def test_the_default_chain_balances(finished):
    run_directory = finished.directory / "results" / "tests"
    facts = manifest.read(run_directory / "pack.json")["facts"]
    parts = ("tokens_packed", "tails_dropped", "unused_by_the_mix", "held_out", "duplicates")
    assert facts["tokens_in"] == sum(facts[part] for part in parts)
    assert facts["tokens_packed"] == facts["sequences"] * facts["sequence_length"] == 16384
    assert facts["share_past_original"] == pytest.approx(facts["long_sequences"] / 16 / 2)
    settings = manifest.read(run_directory / "pack.json")["settings"]
    assert (settings["packing"], settings["shares"], settings["short_from"]) == (
        "concat", None, None,
    )  # fmt: skip
    report = json.loads((run_directory / "report.json").read_text())["mix"]
    assert report["checked"] and set(facts) <= set(report)
