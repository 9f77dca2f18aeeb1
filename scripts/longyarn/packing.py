"""Mixing long and short, and packing to full length.

A *window* is ``sequence_length`` consecutive tokens of one document: it teaches long positions. A
*piece* is at most ``piece_length`` consecutive tokens of one document: pieces are packed end to end
to full length and keep the model good at what it was. Everything is counted: no token vanishes.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from longyarn.cli import UserError


@dataclass(frozen=True)
class Piece:
    """``length`` tokens of document number ``document``, from its token ``start``."""

    document: int
    start: int
    length: int


@dataclass(frozen=True)
class Plan:
    """Which pieces make each sequence, in training order, and what became of all other tokens."""

    sequences: list[list[Piece]]
    long_sequences: int
    tails_dropped: int
    unused: int
    short_tokens: dict[str, int]


def make_plan(
    lengths: list[int],
    *,
    sequence_length: int,
    piece_length: int,
    long_share: float,
    token_budget: int | None,
    seed: int,
) -> Plan:
    """Choose and order the training sequences of documents with these token ``lengths``.

    Short pieces come first from short documents and from the tails of long ones, then from long
    windows that were not chosen, cut to ``piece_length``. A piece that overruns its sequence goes on
    in the next one; what is left of the last is a dropped tail. So
    ``sum(lengths) == packed + tails_dropped + unused``, exactly.
    """
    if not 0 < piece_length <= sequence_length:
        raise ValueError("pieces are at least one token and at most a sequence long")
    generator = np.random.default_rng(seed)
    windows, pieces = cut(lengths, sequence_length, piece_length)
    if long_share > 0 and not windows:
        raise UserError(
            f"no document is as long as rope.target_length {sequence_length} tokens (the longest has "
            f"{max(lengths, default=0)}), so mix.long_share {long_share:g} cannot be met; bring longer "
            "documents or set it to 0"
        )
    available = sum(lengths) // sequence_length
    count = available if token_budget is None else token_budget // sequence_length
    if count == 0:
        raise UserError(
            f"the corpus or mix.token_budget holds less than one sequence of {sequence_length} tokens; "
            "raise it"
        )
    long_count = round(long_share * count)
    if token_budget is None:
        while not _feasible(count, long_count, windows, pieces, sequence_length):
            count -= 1
            long_count = round(long_share * count)
    elif not _feasible(count, long_count, windows, pieces, sequence_length):
        raise UserError(
            f"mix.token_budget {token_budget} at long_share {long_share:g} needs {long_count} long and "
            f"{count - long_count} short sequences, but the training documents hold {len(windows)} long "
            f"windows and {sum(lengths)} tokens in all; lower the budget or bring more documents"
        )

    order = generator.permutation(len(windows))
    chosen = [windows[i] for i in order[:long_count]]
    spare = [
        Piece(w.document, w.start + begin, min(piece_length, sequence_length - begin))
        for w in (windows[i] for i in order[long_count:])
        for begin in range(0, sequence_length, piece_length)
    ]
    natural = set(pieces)
    queue = deque(pieces[i] for i in generator.permutation(len(pieces)))
    queue.extend(spare[i] for i in generator.permutation(len(spare)))
    short, tail, short_tokens = fill(queue, count - long_count, sequence_length, natural)

    sequences = [[window] for window in chosen] + short
    sequences = [sequences[i] for i in generator.permutation(len(sequences))]
    return Plan(
        sequences=sequences,
        long_sequences=long_count,
        tails_dropped=tail,
        unused=sum(piece.length for piece in queue),
        short_tokens=short_tokens,
    )


def cut(lengths: list[int], window: int, piece: int) -> tuple[list[Piece], list[Piece]]:
    """Cut documents into all their windows, and the rest into pieces of at most ``piece`` tokens."""
    windows, pieces = [], []
    for document, length in enumerate(lengths):
        whole = length // window * window
        windows += [Piece(document, start, window) for start in range(0, whole, window)]
        pieces += [
            Piece(document, start, min(piece, length - start))
            for start in range(whole, length, piece)
        ]
    return windows, pieces


def _feasible(
    count: int, long_count: int, windows: list[Piece], pieces: list[Piece], sequence_length: int
) -> bool:
    pool = sum(piece.length for piece in pieces) + (len(windows) - long_count) * sequence_length
    return long_count <= len(windows) and (count - long_count) * sequence_length <= pool


def fill(
    queue: deque[Piece], count: int, sequence_length: int, natural: set[Piece]
) -> tuple[list[list[Piece]], int, dict[str, int]]:
    """Take pieces from ``queue`` to fill ``count`` sequences exactly; a piece may be cut at an end.

    Return the sequences, the tokens left of the last cut piece, and the tokens taken by their source.
    """
    sequences, taken = [], {"short documents and tails": 0, "cut from long documents": 0}
    rest: Piece | None = None
    rest_source = ""
    for _ in range(count):
        sequence, room = [], sequence_length
        while room:
            if rest is None:
                rest = queue.popleft()
                rest_source = list(taken)[0 if rest in natural else 1]
            used = min(rest.length, room)
            sequence.append(Piece(rest.document, rest.start, used))
            taken[rest_source] += used
            room -= used
            left = rest.length - used
            rest = Piece(rest.document, rest.start + used, left) if left else None
        sequences.append(sequence)
    return sequences, rest.length if rest else 0, taken


def positions(piece_lengths: np.ndarray, document_masks: bool) -> np.ndarray:
    """Return the position ids of a sequence, int64 (sequence_length,).

    With masks they restart at each piece, from which transformers derives the mask; without, they
    run on.
    """
    if not document_masks:
        return np.arange(int(piece_lengths.sum()), dtype=np.int64)
    return np.concatenate([np.arange(length, dtype=np.int64) for length in piece_lengths])


def share_past(plan: Plan, original_length: int, document_masks: bool) -> float:
    """Return the share of packed tokens whose position is ``original_length`` or more.

    That share is what teaches the new positions; with masks, short pieces add nothing to it.
    """
    past = total = 0
    for sequence in plan.sequences:
        runs = [piece.length for piece in sequence]
        runs = runs if document_masks else [sum(runs)]
        past += sum(max(0, run - original_length) for run in runs)
        total += sum(runs)
    return past / total if total else math.nan
