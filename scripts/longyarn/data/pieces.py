"""Pieces of documents, and sequences made of pieces.

There can be millions of documents, so pieces are arrays, not objects.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

PADDING = -1  # the document number of padding, which fills a sequence where no piece fits


@dataclass(frozen=True)
class Pieces:
    """Parts of documents, as columns of shape (pieces,).

    A piece is ``length`` tokens of the ``document`` with this number, from its token ``start`` on; all
    three are int64. ``natural``, bool, is true for pieces of short documents and for the ends of long
    ones, and false for pieces of a window.
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
        """Return the pieces of all parts, one part after the other."""
        columns = zip(*(part._columns() for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    @property
    def tokens(self) -> int:
        """The number of tokens in all pieces."""
        return int(self.length.sum())

    def cut(self, size: int) -> "Pieces":
        """Return these pieces cut into pieces of at most ``size`` tokens, in order."""
        counts = -(-self.length // size)
        place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        whole = self[np.repeat(np.arange(len(self)), counts)]
        return Pieces(
            whole.document,
            whole.start + place * size,
            np.minimum(whole.length - place * size, size),
            whole.natural,
        )


def cut_documents(
    lengths: np.ndarray, window: int, piece: int, whole: np.ndarray
) -> tuple[Pieces, Pieces]:
    """Cut documents into all their windows, and the rest into pieces of at most ``piece`` tokens.

    ``lengths`` int64 (documents,) are in tokens. The documents marked in ``whole``, bool (documents,),
    give one piece each, or none if they are longer than a window.
    """
    documents, zeros = np.arange(len(lengths)), np.zeros_like(lengths)
    ones = np.ones(len(lengths), bool)
    rest = lengths // window * window
    uncut = Pieces(documents, zeros, lengths, ones)[whole & (lengths <= window)]
    windows = Pieces(documents, zeros, rest, ~ones)[~whole].cut(window)
    pieces = Pieces(documents, rest, lengths - rest, ones)[~whole].cut(piece)
    return windows, Pieces.joined([pieces, uncut])


@dataclass(frozen=True)
class Filled:
    """Sequences filled with ``pieces``.

    The pieces of sequence i are those from ``offsets[i]`` to ``offsets[i + 1]``; ``offsets`` is int64
    (sequences + 1,). ``tail`` counts the tokens left of the last piece that was cut, ``unused`` the tokens
    of pieces in no sequence.
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
        """Return the sequences of all parts, one part after the other."""
        counts = np.concatenate([np.diff(part.offsets) for part in parts])
        return cls(
            Pieces.joined(part.pieces for part in parts),
            np.concatenate([[0], np.cumsum(counts)]),
            sum(part.tail for part in parts),
            sum(part.unused for part in parts),
        )


@dataclass(frozen=True)
class Plan:
    """The pieces of each training sequence, in training order, and what became of all other tokens."""

    pieces: Pieces
    offsets: np.ndarray  # int64 (sequences + 1,), where the pieces of each sequence begin
    long_sequences: int
    long_documents: int  # documents that fill at least one window
    long_windows: int  # windows in all documents, used or not
    too_long: int  # uncut documents that are longer than a sequence
    tails_dropped: int
    unused: int
    short_tokens: dict[str, int]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sequence_length(self) -> int:
        """The number of positions in each sequence, with padding."""
        return int(self.pieces.length[: self.offsets[1]].sum())

    @property
    def real(self) -> Pieces:
        """The pieces without padding."""
        return self.pieces[self.pieces.document != PADDING]

    @property
    def padding(self) -> int:
        """The number of positions that hold no token."""
        return int(self.pieces.length[self.pieces.document == PADDING].sum())


def positions(piece_lengths: np.ndarray, document_masks: bool) -> np.ndarray:
    """Return the position ids of a sequence, int64 (sequence_length,).

    With document masks they restart at each piece, and transformers derives the mask from that. Without,
    they run from the first token to the last.
    """
    if not document_masks:
        return np.arange(int(piece_lengths.sum()), dtype=np.int64)
    return np.concatenate([np.arange(length, dtype=np.int64) for length in piece_lengths])


def share_past(plan: Plan, original_length: int, document_masks: bool) -> float:
    """Return the share of packed tokens whose position is ``original_length`` or more.

    Only these tokens teach the new positions. With document masks, short pieces add nothing to the share.
    """
    real = np.where(plan.pieces.document == PADDING, 0, plan.pieces.length)
    # Padding comes last in its sequence.
    runs = real if document_masks else np.add.reduceat(real, plan.offsets[:-1])
    total = int(real.sum())
    return int(np.maximum(runs - original_length, 0).sum()) / total if total else math.nan
