"""Mixing long and short, and packing to full length: a plan, worked out on lengths alone.

A *window* is ``sequence_length`` consecutive tokens of one document: it teaches long positions. A
*piece* is at most ``piece_length`` consecutive tokens of one document: pieces are packed to full length
and keep the model good at what it was. A *whole* document is never cut: a conversation, whose answer
would lose its question. Everything is counted: no token vanishes.

Documents can be millions, so pieces are arrays, not objects.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from longyarn.core.errors import UserError

PADDING = -1  # the document of what fills a sequence that no piece fits into


@dataclass(frozen=True)
class Pieces:
    """Parts of documents: each ``length`` tokens of a ``document`` from its token ``start``, int64 (n,).

    ``natural`` bool (n,) tells pieces of short documents and tails from those cut out of a window.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    natural: np.ndarray

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, index: np.ndarray | slice) -> "Pieces":
        return Pieces(*(column[index] for column in self._columns()))

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.document, self.start, self.length, self.natural

    @classmethod
    def joined(cls, parts: Iterable["Pieces"]) -> "Pieces":
        """Return pieces end to end."""
        columns = zip(*(part._columns() for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    @property
    def tokens(self) -> int:
        """The tokens of all pieces."""
        return int(self.length.sum())

    def cut(self, size: int) -> "Pieces":
        """Return these pieces cut into such of at most ``size`` tokens, in order."""
        counts = -(-self.length // size)
        place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        whole = self[np.repeat(np.arange(len(self)), counts)]
        return Pieces(
            whole.document,
            whole.start + place * size,
            np.minimum(whole.length - place * size, size),
            whole.natural,
        )


@dataclass(frozen=True)
class Filled:
    """Sequences filled with ``pieces``, those of a sequence from ``offsets`` int64 (sequences + 1,) on.

    ``tail``: tokens left of the last piece that was cut; ``unused``: tokens of pieces left over.
    """

    pieces: Pieces
    offsets: np.ndarray
    tail: int = 0
    unused: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def reordered(self, order: np.ndarray) -> "Filled":
        """Return the sequences in another order."""
        counts = np.diff(self.offsets)[order]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        index = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][order] - offsets[:-1], counts)
        return Filled(self.pieces[index], offsets, self.tail, self.unused)

    @classmethod
    def joined(cls, parts: Sequence["Filled"]) -> "Filled":
        """Return the sequences of several, end to end."""
        counts = np.concatenate([np.diff(part.offsets) for part in parts])
        return cls(
            Pieces.joined(part.pieces for part in parts),
            np.concatenate([[0], np.cumsum(counts)]),
            sum(part.tail for part in parts),
            sum(part.unused for part in parts),
        )


@dataclass(frozen=True)
class Plan:
    """Which pieces make each sequence, in training order, and what became of all other tokens."""

    pieces: Pieces
    offsets: np.ndarray  # int64 (sequences + 1,), where each sequence's pieces begin
    long_sequences: int
    long_documents: int  # that fill a window
    long_windows: int  # that there are
    too_long: int  # whole documents longer than a sequence
    tails_dropped: int
    unused: int
    short_tokens: dict[str, int]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def real(self) -> Pieces:
        """The pieces without padding."""
        return self.pieces[self.pieces.document != PADDING]

    @property
    def padding(self) -> int:
        """The positions that hold no token."""
        return int(self.pieces.length[self.pieces.document == PADDING].sum())


@dataclass(frozen=True)
class Pool:
    """What the sequences of one share are made from.

    ``spare``: whether windows that are not chosen may be cut into pieces, bool (windows,).
    """

    windows: Pieces
    spare: np.ndarray
    pieces: Pieces
    outside: int = 0  # tokens that may not be used

    def reserve(self, short: int, length: int) -> int:
        """Return how many windows must be cut to fill so many short sequences."""
        return max(0, -(-(short * length - self.pieces.tokens) // length))

    def holds(self, long: int, short: int, length: int) -> bool:
        """Tell whether there is enough for so many long and short sequences."""
        if short < 0:  # more windows are asked of it than its share has room for
            return False
        reserve = self.reserve(short, length)
        return reserve <= self.spare.sum() and long + reserve <= len(self.windows)

    def divide(
        self, long: int, short: int, length: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the windows of the long part, chosen at random, and the others in random order."""
        order = generator.permutation(len(self.windows))
        may_be_cut = order[self.spare[order]]
        reserved = may_be_cut[len(may_be_cut) - self.reserve(short, length) :]
        chosen = order[~np.isin(order, reserved)][:long]
        return chosen, order[~np.isin(order, chosen)]


@dataclass(frozen=True)
class Sources:
    """The collections of documents and what is asked of them, in the config's words.

    ``of`` int (documents,): each document's collection, a number into ``names``. ``shares``: collection
    to its share of the tokens; None mixes all as they come. ``short_from``: the collections that short
    pieces come from; None takes all.
    """

    of: np.ndarray
    names: list[str]
    shares: dict[str, float] | None = None
    short_from: list[str] | None = None

    def numbers(self, names: Iterable[str], key: str) -> list[int]:
        """Return collections' numbers; stop at a name that the corpus lacks."""
        for name in names:
            if name not in self.names:
                raise UserError(
                    f"{key} names the collection {name!r}, which the corpus lacks; it has "
                    f"{', '.join(self.names)}"
                )
        return [self.names.index(name) for name in names]

    def gives_short(self) -> np.ndarray:
        """Return which documents the short part may take, bool (documents,)."""
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
    """Choose and order the training sequences of documents with these token ``lengths``.

    ``whole`` bool (documents,) tells those that are packed as one piece or, where they are longer than
    a sequence, not at all; they need ``best_fit``.

    Short pieces come first from short documents and from the tails of long ones, then from long
    windows that were not chosen, cut to ``piece_length``. By ``concat`` a piece that overruns its sequence
    goes on in the next one; what is left of the last is a dropped tail. By ``best_fit`` no piece is cut
    again, and what no piece fits into is padding. So
    ``sum(lengths) == packed + tails_dropped + unused``, exactly.
    """
    if not 0 < piece_length <= sequence_length:
        raise ValueError("pieces are at least one token and at most a sequence long")
    lengths = np.asarray(lengths, np.int64)
    sources = sources or Sources(np.zeros(len(lengths), np.int64), ["documents"])
    generator = np.random.default_rng(seed)
    whole = np.zeros(len(lengths), bool) if whole is None else np.asarray(whole)
    if strategy == "concat" and whole.any():
        raise UserError(
            "mix.packing concat would cut conversations, so that answers lose their questions; set it to "
            "best_fit"
        )
    windows, pieces = cut(lengths, sequence_length, piece_length, whole)
    too_long = lengths[whole & (lengths > sequence_length)]
    if long_share > 0 and not len(windows):
        raise UserError(
            f"no document is as long as rope.target_length {sequence_length} tokens (the longest has "
            f"{max(lengths[~whole], default=0)}), so mix.long_share {long_share:g} cannot be met; bring "
            "longer documents or set it to 0"
        )
    pools = make_pools(windows, pieces, sources)
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
                f"{long_share:g}, mix.shares and mix.short_from; bring more documents or change them"
            )
    elif not _feasible(pools, counts, sequence_length):
        raise UserError(
            _too_little(token_budget, long_share, counts, pools, lengths, sources, sequence_length)
        )

    fill = {"concat": concat, "best_fit": best_fit}[strategy]
    long, short = [], []
    for pool, (long_count, short_count) in zip(pools, counts, strict=True):
        chosen, left = pool.divide(long_count, short_count, sequence_length, generator)
        spare = pool.windows[left[pool.spare[left]]].cut(piece_length)
        queue = Pieces.joined(
            [
                pool.pieces[generator.permutation(len(pool.pieces))],
                spare[generator.permutation(len(spare))],
            ]
        )
        idle = pool.windows[left[~pool.spare[left]]].tokens + pool.outside
        long.append(Filled(pool.windows[chosen], np.arange(long_count + 1), unused=idle))
        short.append(fill(queue, short_count, sequence_length))
    packed = Filled.joined([*long, *short])
    in_short = Filled.joined(short).pieces
    real = in_short[in_short.document != PADDING]
    packed = packed.reordered(generator.permutation(len(packed)))
    return Plan(
        pieces=packed.pieces,
        offsets=packed.offsets,
        long_sequences=sum(number for number, _ in counts),
        long_documents=len(np.unique(windows.document)),
        long_windows=len(windows),
        too_long=len(too_long),
        tails_dropped=packed.tail,
        unused=packed.unused + int(too_long.sum()),
        short_tokens={
            "short documents and tails": real[real.natural].tokens,
            "cut from long documents": real[~real.natural].tokens,
        },
    )


def cut(lengths: np.ndarray, window: int, piece: int, whole: np.ndarray) -> tuple[Pieces, Pieces]:
    """Cut documents into all their windows, and the rest into pieces of at most ``piece`` tokens.

    Those that are ``whole``, bool (documents,), are one piece each if it is no longer than a window.
    """
    documents, zeros = np.arange(len(lengths)), np.zeros_like(lengths)
    ones = np.ones(len(lengths), bool)
    rest = lengths // window * window
    uncut = Pieces(documents, zeros, lengths, ones)[whole & (lengths <= window)]
    windows = Pieces(documents, zeros, rest, ~ones)[~whole].cut(window)
    pieces = Pieces(documents, rest, lengths - rest, ones)[~whole].cut(piece)
    return windows, Pieces.joined([pieces, uncut])


def make_pools(windows: Pieces, pieces: Pieces, sources: Sources) -> list[Pool]:
    """Return what sequences are made from: one pool, or one for each collection that has a share.

    What no pool may use counts as outside the first.
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


def apportioned(
    count: int, long_share: float, sources: Sources, pools: list[Pool]
) -> list[tuple[int, int]]:
    """Return how many long and short sequences each pool gives, of ``count`` in all.

    Collections give windows in proportion to their shares, as far as they have any; those that give
    no short pieces give nothing else.
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
        # Rounded, the short part may have less than its share by a sequence.
        max(0, long - sum(longs)),
        [min(number, len(pool.windows)) for number, pool in zip(of_each, pools, strict=True)],
    )
    longs = [own + more for own, more in zip(longs, shared, strict=True)]
    return [(own, number - own) for own, number in zip(longs, of_each, strict=True)]


def whole_parts_up_to(weights: Sequence[float], total: int, most: Sequence[int]) -> list[int]:
    """Divide as ``whole_parts``, no part above its limit where there is room below the others'.

    What has no room anywhere goes to the part of most weight.
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
    # What floating point makes of a whole number is that number.
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
    """Say what a budget needs, what there is, and how many tokens are missing."""
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
            "are missing; lower the budget or bring more documents"
        )
    names = list(sources.shares) if sources.shares else ["the corpus"]
    needs = "; ".join(
        f"{name} {long} long and {max(0, short)} short sequences, and has "
        f"{len(pool.windows)} long windows and {pool.pieces.tokens} tokens in pieces"
        for name, pool, (long, short) in zip(names, pools, counts, strict=True)
    )
    return (
        f"{asked} needs of {needs}; lower the budget, change mix.shares or mix.short_from, or bring "
        f"more documents ({missing} tokens are missing)"
    )


def concat(queue: Pieces, count: int, length: int) -> Filled:
    """Fill ``count`` sequences with pieces end to end; one that overruns goes on in the next."""
    need = count * length
    ends = np.cumsum(queue.length)
    taken = int(np.searchsorted(ends, need)) + 1 if need else 0
    ends = ends[:taken]
    cuts = np.union1d(np.minimum(ends, need), np.arange(1, count + 1) * length)
    begins = np.concatenate([[0], cuts[:-1]]) if need else cuts
    item = np.searchsorted(ends, begins, side="right")
    whole = queue[item]
    into = begins - (ends[item] - queue.length[item])
    return Filled(
        Pieces(whole.document, whole.start + into, cuts - begins, whole.natural),
        np.searchsorted(begins, np.arange(count + 1) * length),
        tail=int(ends[-1]) - need if taken else 0,
        unused=queue[taken:].tokens,
    )


def best_fit(queue: Pieces, count: int, length: int) -> Filled:
    """Fill ``count`` sequences with whole pieces: the longest first, each where least room is left.

    The pieces are the first ones of ``queue`` that could fill all sequences. Those that would need more
    sequences go unused, the emptiest sequences first. What is left of a sequence is padding.
    """
    need = count * length
    taken = int(np.searchsorted(np.cumsum(queue.length), need)) + 1 if need else 0
    order = np.argsort(-queue.length[:taken], kind="stable")
    bins = fit(queue.length[order].tolist(), length)
    filled = np.bincount(bins, weights=queue.length[order]).astype(np.int64)
    kept = np.sort(np.argsort(-filled, kind="stable")[:count])
    place = np.full(len(filled), -1)
    place[kept] = np.arange(len(kept))
    used = place[bins] >= 0
    room = length - filled[kept]
    padded = np.flatnonzero(room)
    zeros = np.zeros(len(padded), np.int64)
    pieces = Pieces.joined(
        [
            queue[order[used]],
            Pieces(zeros + PADDING, zeros, room[padded], zeros.astype(bool)),
        ]
    )
    sequence = np.concatenate([place[bins[used]], padded])
    by_sequence = np.argsort(sequence, kind="stable")
    offsets = np.searchsorted(sequence[by_sequence], np.arange(count + 1))
    return Filled(pieces[by_sequence], offsets, unused=queue.tokens - int(filled[kept].sum()))


def fit(lengths: list[int], capacity: int) -> np.ndarray:
    """Return the bin of each item, int64 (items,): the one with least room that it fits into.

    Which rooms there are is a number with one bit for each, so the search is arithmetic.
    """
    rooms = 0
    bins_of_room: dict[int, list[int]] = {}
    found = np.empty(len(lengths), np.int64)
    count = 0
    for item, length in enumerate(lengths):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            bins = bins_of_room[room]
            number = bins.pop()
            if not bins:
                rooms ^= 1 << room
        else:
            room, number, count = capacity, count, count + 1
        found[item] = number
        left = room - length
        if left:
            bins_of_room.setdefault(left, []).append(number)
            rooms |= 1 << left
    return found


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
    real = np.where(plan.pieces.document == PADDING, 0, plan.pieces.length)
    # Padding comes last in its sequence.
    runs = real if document_masks else np.add.reduceat(real, plan.offsets[:-1])
    total = int(real.sum())
    return int(np.maximum(runs - original_length, 0).sum()) / total if total else math.nan
