"""Filling sequences from a pool of windows and pieces: end to end, or by best fit."""

from dataclasses import dataclass

import numpy as np

from longyarn.data.pieces import PADDING, Filled, Pieces


@dataclass(frozen=True)
class Pool:
    """The windows and pieces that the sequences of one share are made of.

    ``spare``, bool (windows,), marks the windows that may be cut into pieces if they are not chosen.
    """

    windows: Pieces
    spare: np.ndarray
    pieces: Pieces
    outside: int = 0  # tokens that must not be used

    def reserve(self, short: int, length: int) -> int:
        """Return how many windows must be cut to fill ``short`` sequences of ``length`` tokens."""
        return max(0, -(-(short * length - self.pieces.tokens) // length))

    def holds(self, long: int, short: int, length: int) -> bool:
        """Tell whether the pool has enough for this many long and short sequences."""
        if short < 0:  # the pool's share is less than the windows asked of it
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

    def sequences(
        self,
        long: int,
        short: int,
        length: int,
        piece_length: int,
        strategy: str,
        generator: np.random.Generator,
    ) -> tuple[Filled, Filled]:
        """Return the long and the short sequences; ``strategy`` is concat or best_fit.

        Short sequences take the pool's pieces first, then windows that were not chosen, cut to
        ``piece_length``.
        """
        chosen, left = self.divide(long, short, length, generator)
        spare = self.windows[left[self.spare[left]]].cut(piece_length)
        queue = Pieces.joined(
            [
                self.pieces[generator.permutation(len(self.pieces))],
                spare[generator.permutation(len(spare))],
            ]
        )
        idle = self.windows[left[~self.spare[left]]].tokens + self.outside
        fill = {"concat": concat, "best_fit": best_fit}[strategy]
        whole = Filled(self.windows[chosen], np.arange(long + 1), unused=idle)
        return whole, fill(queue, short, length)


def concat(queue: Pieces, count: int, length: int) -> Filled:
    """Fill ``count`` sequences with pieces end to end; a piece that overruns continues in the next one."""
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
    """Fill ``count`` sequences with uncut pieces, the longest first, each where least room is left.

    It takes from the start of ``queue`` as many pieces as could fill all sequences. If they need more
    sequences than ``count``, the emptiest sequences are dropped and their pieces are unused. What is left
    of a sequence is padding.
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
    """Return the bin of each item, int64 (items,): the bin with the least room that the item fits into.

    An integer has one bit set for each amount of room that some bin has, so the search is bit arithmetic.
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
