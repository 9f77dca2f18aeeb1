"""Mixing long and short sequences and packing them to full length: a plan, from the lengths alone.

A *window* is ``sequence_length`` consecutive tokens of one document: it teaches long positions. A *piece*
is at most ``piece_length`` consecutive tokens of one document: pieces are packed to full length and keep
the model good at short context. A *whole* document is never cut: it is a conversation, whose answers need
their questions. Every token is accounted for.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from longyarn.core.errors import UserError
from longyarn.data.filling import Pool
from longyarn.data.pieces import PADDING, Filled, Pieces, Plan, cut_documents


@dataclass(frozen=True)
class Sources:
    """The collections of the documents, and which of them the config's section `mix` asks for.

    ``of`` int (documents,) is each document's collection, an index into ``names``. ``shares`` maps a
    collection to its share of the tokens; None mixes all documents as they come. ``short_from`` names the
    collections that short pieces come from; None takes all.
    """

    of: np.ndarray
    names: list[str]
    shares: dict[str, float] | None = None
    short_from: list[str] | None = None

    def numbers(self, names: Iterable[str], key: str) -> list[int]:
        """Return the indices of collections; raise ``UserError`` for a name that the corpus lacks."""
        for name in names:
            if name not in self.names:
                raise UserError(
                    f"{key} names the collection {name!r}, which the corpus lacks; it has "
                    f"{', '.join(self.names)}"
                )
        return [self.names.index(name) for name in names]

    def gives_short(self) -> np.ndarray:
        """Return which documents short pieces may come from, bool (documents,)."""
        if self.short_from is None:
            return np.ones(len(self.of), bool)
        return np.isin(self.of, self.numbers(self.short_from, "mix.short_from"))


def make_plan(
    lengths: Sequence[int] | np.ndarray,
    *,
    sequence_length: int,
    piece_length: int,
    long_share: float,
    token_budget: int | None,
    seed: int,
    strategy: str = "concat",
    sources: Sources | None = None,
    whole: np.ndarray | None = None,
) -> Plan:
    """Choose and order the training sequences of documents with these ``lengths`` in tokens.

    ``whole``, bool (documents,), marks the documents that are packed as one piece or, if they are longer
    than a sequence, not at all. They need the strategy ``best_fit``.

    Short pieces come first from short documents and from the ends of long ones, then from windows that
    were not chosen, cut to ``piece_length``. With ``concat``, a piece that overruns its sequence continues
    in the next one, and the rest of the last piece is a dropped tail. With ``best_fit``, no piece is cut
    again, and padding fills what no piece fits into. So
    ``sum(lengths) == packed + tails_dropped + unused``, exactly.

    Raise ``UserError`` if the documents do not suffice for what is asked.
    """
    if not 0 < piece_length <= sequence_length:
        raise ValueError("a piece has at least one token and at most those of a sequence")
    lengths = np.asarray(lengths, np.int64)
    sources = sources or Sources(np.zeros(len(lengths), np.int64), ["documents"])
    whole = np.zeros(len(lengths), bool) if whole is None else np.asarray(whole)
    windows, pieces = cut_documents(lengths, sequence_length, piece_length, whole)
    _check_documents(lengths, whole, len(windows), sequence_length, long_share, strategy)
    pools = make_pools(windows, pieces, sources)
    counts = sequence_counts(pools, lengths, sources, sequence_length, long_share, token_budget)
    generator = np.random.default_rng(seed)
    filled = [
        pool.sequences(long, short, sequence_length, piece_length, strategy, generator)
        for pool, (long, short) in zip(pools, counts, strict=True)
    ]
    packed = Filled.joined([long for long, _ in filled] + [short for _, short in filled])
    packed = packed.reordered(generator.permutation(len(packed)))
    in_short = Filled.joined([short for _, short in filled]).pieces
    too_long = lengths[whole & (lengths > sequence_length)]
    return Plan(
        pieces=packed.pieces,
        offsets=packed.offsets,
        long_sequences=sum(number for number, _ in counts),
        long_documents=len(np.unique(windows.document)),
        long_windows=len(windows),
        too_long=len(too_long),
        tails_dropped=packed.tail,
        unused=packed.unused + int(too_long.sum()),
        short_tokens=tokens_by_origin(in_short[in_short.document != PADDING]),
    )


def _check_documents(
    lengths: np.ndarray,
    whole: np.ndarray,
    windows: int,
    sequence_length: int,
    long_share: float,
    strategy: str,
) -> None:
    """Raise ``UserError`` where documents must not be cut, or where none is long enough."""
    if strategy == "concat" and whole.any():
        raise UserError(
            "mix.packing concat would cut conversations and separate answers from their questions; set it "
            "to best_fit"
        )
    if long_share > 0 and not windows:
        raise UserError(
            f"no document is as long as rope.target_length {sequence_length} tokens (the longest has "
            f"{max(lengths[~whole], default=0)}), so mix.long_share {long_share:g} is impossible; add "
            "longer documents or set it to 0"
        )


def tokens_by_origin(pieces: Pieces) -> dict[str, int]:
    """Return how many tokens of pieces come from where, as the report shows it."""
    return {
        "short documents and tails": pieces[pieces.natural].tokens,
        "cut from long documents": pieces[~pieces.natural].tokens,
    }


def make_pools(windows: Pieces, pieces: Pieces, sources: Sources) -> list[Pool]:
    """Return the pools of sequences: one for each collection that has a share, or one for all.

    Tokens that no pool may use count as outside the first pool.
    """
    short = sources.gives_short()
    if sources.shares is None:
        allowed = short[pieces.document]
        outside = pieces[~allowed].tokens
        return [Pool(windows, short[windows.document], pieces[allowed], outside)]
    pools = []
    used = 0
    for number in sources.numbers(sources.shares, "mix.shares"):
        own = windows[sources.of[windows.document] == number]
        allowed = (sources.of[pieces.document] == number) & short[pieces.document]
        pools.append(Pool(own, short[own.document], pieces[allowed]))
        used += own.tokens + pieces[allowed].tokens
    first = pools[0]
    outside = windows.tokens + pieces.tokens - used
    return [Pool(first.windows, first.spare, first.pieces, outside), *pools[1:]]


def sequence_counts(
    pools: list[Pool],
    lengths: np.ndarray,
    sources: Sources,
    sequence_length: int,
    long_share: float,
    token_budget: int | None,
) -> list[tuple[int, int]]:
    """Return how many long and short sequences each pool gives, as many as possible without a budget.

    Raise ``UserError`` if the pools do not suffice for the budget or for one sequence.
    """
    available = int(lengths.sum()) // sequence_length
    count = available if token_budget is None else token_budget // sequence_length
    if count == 0:
        raise UserError(
            f"the corpus or mix.token_budget holds less than one sequence of {sequence_length} tokens; "
            "raise it"
        )
    counts = apportioned(count, long_share, sources, pools)
    if token_budget is None:
        while count and not _feasible(pools, counts, sequence_length):
            count -= 1
            counts = apportioned(count, long_share, sources, pools)
        if not count:
            raise UserError(
                f"the corpus has no whole sequence of {sequence_length} tokens at mix.long_share "
                f"{long_share:g}, mix.shares and mix.short_from; add documents or change these keys"
            )
    elif not _feasible(pools, counts, sequence_length):
        raise UserError(
            _too_little(token_budget, long_share, counts, pools, lengths, sources, sequence_length)
        )
    return counts


def apportioned(
    count: int, long_share: float, sources: Sources, pools: list[Pool]
) -> list[tuple[int, int]]:
    """Return how many long and short sequences each pool gives, of ``count`` in all.

    Collections give windows in proportion to their shares, as far as they have windows. Collections that
    give no short pieces give only windows.
    """
    long = round(long_share * count)
    if sources.shares is None:
        return [(long, count - long)]
    of_each = whole_parts(list(sources.shares.values()), count)
    if sources.short_from is not None:
        share = sum(sources.shares.get(name, 0) for name in sources.short_from)
        if share < 1 - long_share - 1e-9:
            raise UserError(
                f"mix.long_share {long_share:g} leaves {1 - long_share:g} of the tokens to the short "
                f"part, but by mix.shares the collections of mix.short_from have {share:g}; raise their "
                "shares or mix.long_share"
            )
    mixed = [sources.short_from is None or name in sources.short_from for name in sources.shares]
    longs = [0 if both else number for both, number in zip(mixed, of_each, strict=True)]
    shared = whole_parts_up_to(
        [number if both else 0 for both, number in zip(mixed, of_each, strict=True)],
        # Rounding can take one sequence from the short part's share.
        max(0, long - sum(longs)),
        [min(number, len(pool.windows)) for number, pool in zip(of_each, pools, strict=True)],
    )
    longs = [own + more for own, more in zip(longs, shared, strict=True)]
    return [(own, number - own) for own, number in zip(longs, of_each, strict=True)]


def whole_parts_up_to(weights: Sequence[float], total: int, most: Sequence[int]) -> list[int]:
    """Divide as ``whole_parts`` does, with no part above its limit while others are below theirs.

    What exceeds all limits goes to the part with the largest weight.
    """
    parts = [0] * len(weights)
    open_ = [i for i, weight in enumerate(weights) if weight]
    while open_:
        left = total - sum(parts)
        more = dict(zip(open_, whole_parts([weights[i] for i in open_], left), strict=True))
        full = [i for i in open_ if more[i] > most[i]]
        for i in full or open_:
            parts[i] = min(more[i], most[i])
        open_ = [i for i in open_ if i not in full] if full else []
    if total > sum(parts):
        parts[max(range(len(parts)), key=weights.__getitem__)] += total - sum(parts)
    return parts


def whole_parts(weights: Sequence[float], total: int) -> list[int]:
    """Divide ``total`` by weights into whole numbers, each less than one from its exact part."""
    if not total:
        return [0] * len(weights)
    exact = [weight * total / sum(weights) for weight in weights]
    # The small term keeps a whole number whole after floating-point rounding.
    parts = [math.floor(part + 1e-9) for part in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_rest[: total - sum(parts)]:
        parts[i] += 1
    return parts


def _feasible(pools: list[Pool], counts: list[tuple[int, int]], length: int) -> bool:
    return all(
        pool.holds(long, short, length) for pool, (long, short) in zip(pools, counts, strict=True)
    )


def _too_little(
    budget: int,
    long_share: float,
    counts: list[tuple[int, int]],
    pools: list[Pool],
    lengths: np.ndarray,
    sources: Sources,
    sequence_length: int,
) -> str:
    """Return the error message for a budget: what it needs, what there is, and what is missing."""
    windows = sum(
        max(0, long + pool.reserve(short, sequence_length) - len(pool.windows))
        for pool, (long, short) in zip(pools, counts, strict=True)
    )
    missing = windows * sequence_length
    asked = f"mix.token_budget {budget} at long_share {long_share:g}"
    if sources.shares is None and sources.short_from is None:
        long, short = counts[0]
        return (
            f"{asked} needs {long} long and {short} short sequences, but the training documents hold "
            f"{len(pools[0].windows)} long windows and {lengths.sum()} tokens in all, so {missing} tokens "
            "are missing; lower the budget or add documents"
        )
    names = list(sources.shares) if sources.shares else ["the corpus"]
    needs = "; ".join(
        f"{name} {long} long and {max(0, short)} short sequences, and has "
        f"{len(pool.windows)} long windows and {pool.pieces.tokens} tokens in pieces"
        for name, pool, (long, short) in zip(names, pools, counts, strict=True)
    )
    return (
        f"{asked} needs of {needs}; lower the budget, change mix.shares or mix.short_from, or add "
        f"documents ({missing} tokens are missing)"
    )
