"""The packed sequences as a dataset for training."""

import math
from pathlib import Path

from longyarn.core import tensorfile
from longyarn.data import packing

IGNORED = -100  # the label of a position that is not scored, as in transformers


class Packed:
    """The packed sequences as a dataset; each item is one sequence of token, position and label ids.

    No attention_mask is given: with positions that restart at each piece, transformers derives the
    document mask, but only where no mask is passed. The first token of a piece is no label, because
    what precedes it belongs to another document. Nor is padding, nor a token of a conversation that is
    no answer's. The file stays where it is: an item is read when it is asked for.
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
        import numpy as np
        import torch

        pieces = slice(self.piece_offsets[index], self.piece_offsets[index + 1])
        lengths = self.piece_lengths[pieces]
        input_ids = torch.from_numpy(self.input_ids[index].astype("int64"))
        position_ids = torch.from_numpy(packing.positions(lengths, self.document_masks))
        padding = np.repeat(self.piece_documents[pieces] == packing.PADDING, lengths)
        ignored = (position_ids == 0) | torch.from_numpy(padding)
        if self.scored is not None:
            ignored |= ~torch.from_numpy(np.array(self.scored[index]))
        labels = input_ids.masked_fill(ignored, IGNORED)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}

    def rows(self, step: int, batch_size: int) -> range:
        """Return the sequences of a step, which counts from 1; the last of an epoch may have fewer."""
        begin = (step - 1) % math.ceil(len(self) / batch_size) * batch_size
        return range(begin, min(begin + batch_size, len(self)))

    def documents(self, rows) -> list[int]:
        """Return the numbers of the documents, as in the tokens' index, in these sequences."""
        ranges = ((self.piece_offsets[row], self.piece_offsets[row + 1]) for row in rows)
        found = {int(one) for begin, end in ranges for one in self.piece_documents[begin:end]}
        return sorted(found - {packing.PADDING})
