"""The packed sequences in a file: writing them, and reading them as a dataset for training.

The file is safetensors. ``input_ids`` (sequences, sequence_length) is uint16 or int32, like the tokens.
``piece_lengths`` and ``piece_documents``, int32 (pieces,), are the length of each piece and the number of
its document, -1 for padding. ``piece_offsets``, int64 (sequences + 1,), says where the pieces of each
sequence begin. With conversations there is also ``scored``, bool like ``input_ids``: the tokens that count
in the loss.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longyarn.core import tensorfile
from longyarn.core.console import token_progress
from longyarn.data.pieces import PADDING, Plan, positions
from longyarn.data.token_store import Tokens

IGNORED = -100  # the label of a position that counts in no loss, as in torch and transformers


def write(path: Path, plan: Plan, tokens: Tokens, training: np.ndarray) -> int:
    """Write the sequences of a plan, one at a time; return how many of their tokens are scored.

    ``training``, int (documents,), are the numbers in ``tokens`` of the plan's documents.
    """
    pieces = plan.pieces
    documents = np.append(training, PADDING)[pieces.document]  # padding's -1 takes the last entry
    shape = (len(plan), plan.sequence_length)
    rows = _Rows(plan, tokens, documents)
    kind = tensorfile.KINDS[tokens.dtype]
    tensors = {
        "piece_lengths": pieces.length.astype(np.int32),
        "piece_documents": documents.astype(np.int32),
        "piece_offsets": plan.offsets.astype(np.int64),
        "input_ids": tensorfile.Stream(kind, shape, rows.of("tokens", tokens.dtype, "pack")),
    }
    scored = plan.real.tokens
    if tokens.conversations.any():
        scored = 0

        def counted(masks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
            nonlocal scored
            for mask in masks:
                scored += int(mask.sum())
                yield mask

        masks = counted(rows.of("scored", np.dtype(bool), "pack: which tokens are scored"))
        tensors["scored"] = tensorfile.Stream("BOOL", shape, masks)
    tensorfile.write(path, tensors)
    return scored


class _Rows:
    """The rows of a plan's sequences, read from the tokens piece by piece."""

    def __init__(self, plan: Plan, tokens: Tokens, documents: np.ndarray) -> None:
        self.plan, self.tokens, self.documents = plan, tokens, documents
        self.shards, self.begins = tokens.places(documents, plan.pieces.start)

    def of(self, name: str, dtype: np.dtype, label: str) -> Iterator[np.ndarray]:
        """Yield each sequence's ``tokens`` or ``scored``, (length,); padding is 0."""
        count, length = len(self.plan), self.plan.sequence_length
        steps = ((length, length) for _ in range(count))
        progress = token_progress(steps, count * length, label)
        for _, row in zip(progress, range(count), strict=False):
            these = slice(*self.plan.offsets[row : row + 2])
            parts = zip(
                self.documents[these].tolist(),
                self.shards[these].tolist(),
                self.begins[these].tolist(),
                self.plan.pieces.length[these].tolist(),
                strict=True,
            )
            yield np.concatenate(
                [
                    np.zeros(size, dtype)
                    if document == PADDING
                    else self.tokens.read(name, shard, begin, size)
                    for document, shard, begin, size in parts
                ]
            )


class Packed:
    """The packed sequences as a dataset; an item has the token, position and label ids of a sequence.

    There is no attention_mask: transformers derives the document mask from positions that restart at each
    piece, but only if no mask is passed. Three kinds of tokens are no labels: the first token of a piece,
    because the token before it belongs to another document; padding; and the tokens of a conversation
    outside its answers. Items are read from the file when they are asked for.
    """

    def __init__(self, path: Path, document_masks: bool) -> None:
        tensors = tensorfile.read(path)
        self.input_ids = tensors["input_ids"]
        self.scored = tensors.get("scored")
        self.piece_lengths = tensors["piece_lengths"]
        self.piece_documents = tensors["piece_documents"]
        self.piece_offsets = tensors["piece_offsets"]
        self.document_masks = document_masks

    def __len__(self) -> int:
        return len(self.piece_offsets) - 1

    def __getitem__(self, index: int) -> dict:
        import torch

        pieces = slice(self.piece_offsets[index], self.piece_offsets[index + 1])
        lengths = self.piece_lengths[pieces]
        input_ids = torch.from_numpy(self.input_ids[index].astype("int64"))
        position_ids = torch.from_numpy(positions(lengths, self.document_masks))
        padding = np.repeat(self.piece_documents[pieces] == PADDING, lengths)
        ignored = (position_ids == 0) | torch.from_numpy(padding)
        if self.scored is not None:
            ignored |= ~torch.from_numpy(np.array(self.scored[index]))
        labels = input_ids.masked_fill(ignored, IGNORED)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}

    def rows(self, step: int, batch_size: int) -> range:
        """Return the sequences of a step; steps count from 1, and an epoch's last may have fewer."""
        begin = (step - 1) % math.ceil(len(self) / batch_size) * batch_size
        return range(begin, min(begin + batch_size, len(self)))

    def documents(self, rows) -> list[int]:
        """Return the numbers, as in the tokens' index, of the documents in these sequences."""
        ranges = ((self.piece_offsets[row], self.piece_offsets[row + 1]) for row in rows)
        found = {int(one) for begin, end in ranges for one in self.piece_documents[begin:end]}
        return sorted(found - {PADDING})
