"""Reading what the stage tokenise wrote: the documents' tokens, in place, by the document's number."""

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np

from longyarn.core import manifest, tensorfile
from longyarn.core.errors import UserError

INDEX = "index.safetensors"
TRAINING, HELD_OUT, DUPLICATE = 0, 1, 2  # what a document is for
FILES_AT_ONCE = 256  # held open; systems allow 1024 or more


class Tokens:
    """The documents of a run, in the corpus's order.

    ``lengths`` int64 (documents,) are their tokens, ``roles`` uint8 (documents,) say whether a document
    is for ``TRAINING``, ``HELD_OUT`` or dropped as a ``DUPLICATE``, and ``collections`` int32 (documents,)
    are numbers into ``collection_names``. ``conversations`` bool (documents,) tells those that have tokens
    that are not scored. ``dtype`` is how tokens are stored: uint16 or int32.

    Tokens are read from the files when they are asked for, and not kept.
    """

    def __init__(self, manifest_path: Path) -> None:
        record = manifest.read(manifest_path)
        root = Path(manifest_path).parent
        files = [root / name for name in sorted(record["files"])]
        self.shards = [file for file in files if file.name != INDEX]
        index = next((tensorfile.read(file) for file in files if file.name == INDEX), {})
        if "conversations" not in index:
            raise UserError(
                f"{manifest_path} was written by an earlier version; delete it and run again"
            )
        self.lengths = np.asarray(index["lengths"])
        self.roles = np.asarray(index["roles"])
        self.collections = np.asarray(index["collections"])
        self.conversations = np.asarray(index["conversations"])
        self.first_of_shard = np.asarray(index["first_of_shard"])
        self.begins = np.concatenate([[0], np.cumsum(self.lengths)])
        self.collection_names: list[str] = record["facts"]["collection_names"]
        self.dtype = np.dtype(record["facts"]["dtype"])
        self._files: OrderedDict[int, tuple] = OrderedDict()

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Return a document's tokens, int32 (n,), or ``length`` of them from ``start`` on."""
        found = self._part("tokens", document, start, length)
        return found.astype(np.int32, copy=False)

    def scored(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray | None:
        """Return which of the same tokens count in the loss, bool (n,); None where all of them do."""
        shard, _ = self.places(document, start)
        if "scored" not in self._open(int(shard))[1]:
            return None
        return self._part("scored", document, start, length)

    def places(self, documents, starts) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards of tokens of documents, and the tokens' numbers in them.

        For one document and the number of a token in it, or for arrays of them.
        """
        shards = np.searchsorted(self.first_of_shard, documents, side="right") - 1
        return shards, self.begins[documents] - self.begins[self.first_of_shard[shards]] + starts

    def read(self, name: str, shard: int, begin: int, length: int) -> np.ndarray:
        """Return ``length`` of a shard's ``tokens`` as they are stored, or which are ``scored``."""
        # Not memory-mapped: pages that were looked at would count as this process's memory, and packing
        # looks at all of them.
        file, places = self._open(shard)
        if name not in places:
            return np.ones(length, bool)
        place = places[name]
        width = place.dtype.itemsize
        found = os.pread(file.fileno(), length * width, place.begin + begin * width)
        return np.frombuffer(found, place.dtype)

    def id(self, document: int) -> str:
        """Return a document's id."""
        shard = int(self.places(document, 0)[0])
        stored = tensorfile.load(self.shards[shard], "ids", "id_lengths")
        number = document - self.first_of_shard[shard]
        begin = int(stored["id_lengths"][:number].sum())
        length = int(stored["id_lengths"][number])
        return bytes(stored["ids"][begin : begin + length]).decode()

    def held_out(self) -> dict[str, np.ndarray]:
        """Return the held-out documents' tokens by id, each int32 (n,)."""
        numbers = np.flatnonzero(self.roles == HELD_OUT)
        return {self.id(number): self.tokens(number) for number in numbers}

    def _part(self, name: str, document: int, start: int, length: int | None) -> np.ndarray:
        shard, begin = self.places(document, start)
        count = self.lengths[document] - start if length is None else length
        return self.read(name, int(shard), int(begin), int(count))

    def _open(self, shard: int) -> tuple:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            if len(self._files) == FILES_AT_ONCE:
                self._files.popitem(last=False)[1][0].close()
            path = self.shards[shard]
            self._files[shard] = open(path, "rb", buffering=0), tensorfile.header(path)  # noqa: SIM115
        return self._files[shard]


def held_out_documents(tokens_manifest: Path) -> dict[str, np.ndarray]:
    """Return the held-out documents' tokens by id, each int32 (n,)."""
    return Tokens(tokens_manifest).held_out()
