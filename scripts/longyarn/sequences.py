"""The packed sequences as a dataset for training."""

import math
from pathlib import Path

from longyarn import packing


class Packed:
    """The packed sequences as a dataset; each item is one sequence of token, position and label ids.

    No attention_mask is given: with positions that restart at each piece, transformers derives the
    document mask, but only where no mask is passed. The first token of a piece is no label, because
    what precedes it belongs to another document.
    """

    def __init__(self, path: Path, document_masks: bool) -> None:
        from safetensors import safe_open

        self.file = safe_open(path, framework="numpy")
        self.input_ids = self.file.get_slice("input_ids")
        self.piece_lengths = self.file.get_tensor("piece_lengths")
        self.piece_offsets = self.file.get_tensor("piece_offsets")
        self.document_masks = document_masks

    def __len__(self) -> int:
        return len(self.piece_offsets) - 1

    def __getitem__(self, index: int) -> dict:
        import torch

        lengths = self.piece_lengths[self.piece_offsets[index] : self.piece_offsets[index + 1]]
        input_ids = torch.from_numpy(self.input_ids[index : index + 1][0].astype("int64"))
        position_ids = torch.from_numpy(packing.positions(lengths, self.document_masks))
        labels = input_ids.masked_fill(position_ids == 0, -100)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}

    def rows(self, step: int, batch_size: int) -> range:
        """Return the sequences of a step, which counts from 1; the last of an epoch may have fewer."""
        begin = (step - 1) % math.ceil(len(self) / batch_size) * batch_size
        return range(begin, min(begin + batch_size, len(self)))

    def documents(self, rows) -> list[int]:
        """Return the numbers of the documents, as in the tokens' manifest, in these sequences."""
        found = self.file.get_tensor("piece_documents")
        ranges = ((self.piece_offsets[row], self.piece_offsets[row + 1]) for row in rows)
        return sorted({int(number) for begin, end in ranges for number in found[begin:end]})
