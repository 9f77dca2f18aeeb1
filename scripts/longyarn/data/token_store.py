"""The tokens of a run's documents: the index that tokenise writes, and reading tokens in place.

The files are safetensors. Each ``tokens-*.safetensors`` has the tokens of a part of the corpus
(longyarn/data/token_workers.py writes it); ``index.safetensors`` says what each document is for.
"""

import difflib
import os
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longyarn.core import manifest, tensorfile
from longyarn.core.errors import UserError

INDEX = "index.safetensors"
TRAINING, HELD_OUT, DUPLICATE = 0, 1, 2  # a document's role
FILES_AT_ONCE = 256  # files kept open; systems allow 1024 or more
SHOWN = 20  # dropped duplicates that the manifest names


class Tokens:
    """The documents of a run, in the corpus's order.

    ``lengths`` int64 (documents,) are in tokens. ``roles`` uint8 (documents,) are ``TRAINING``,
    ``HELD_OUT`` or, for documents that were dropped, ``DUPLICATE``. ``collections`` int32 (documents,) are
    indices into ``collection_names``. ``conversations`` bool (documents,) marks documents of which not all
    tokens are scored. ``dtype`` is the type of stored tokens: uint16 or int32.

    Tokens are read from the files when they are asked for, and are not kept.
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
        """Return a document's tokens from ``start`` on, at most ``length`` of them, int32 (n,)."""
        found = self._part("tokens", document, start, length)
        return found.astype(np.int32, copy=False)

    def scored(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray | None:
        """Return which of these tokens count in the loss, bool (n,), or None if all of them do."""
        shard, _ = self.places(document, start)
        if "scored" not in self._open(int(shard))[1]:
            return None
        return self._part("scored", document, start, length)

    def places(self, documents, starts) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards of tokens, and the tokens' positions in them.

        ``documents`` are numbers of documents, ``starts`` positions in them: single numbers, or arrays.
        """
        shards = np.searchsorted(self.first_of_shard, documents, side="right") - 1
        return shards, self.begins[documents] - self.begins[self.first_of_shard[shards]] + starts

    def read(self, name: str, shard: int, begin: int, length: int) -> np.ndarray:
        """Return ``length`` values of a shard's ``tokens``, as they are stored, or of its ``scored``."""
        # Not memory-mapped: packing reads every page, and all of them would count as its memory.
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


def make_index(
    shards: list[Path], held_out: list[str], held_out_documents: dict[str, int]
) -> tuple[dict[str, np.ndarray], dict]:
    """Return the tensors of the index (see ``Tokens``) and the facts of the manifest.

    ``shards`` are the files of tokens. ``held_out`` has ids of documents, ``held_out_documents`` how many
    of a collection's first documents to hold out. Raise ``UserError`` if the corpus lacks one of them or
    if no document is left to train on.
    """
    stored = [
        tensorfile.load(shard, "lengths", "digests", "ids", "id_lengths", "conversations")
        for shard in shards
    ]
    lengths = np.concatenate([one["lengths"] for one in stored])
    collections = np.empty(len(lengths), np.int32)
    roles = np.full(len(lengths), TRAINING, np.uint8)
    names: dict[str, int] = {}
    wanted, left = set(held_out), Counter(held_out_documents)
    for number, name in enumerate(ids(stored)):
        collection = name.partition("/")[0]
        collections[number] = names.setdefault(collection, len(names))
        among_the_first = left[collection] > 0
        left[collection] -= among_the_first
        if among_the_first or name in wanted:
            roles[number] = HELD_OUT
            wanted.discard(name)
    check_held_out(stored, wanted, +left, held_out_documents)
    mark_duplicates(np.concatenate([one["digests"] for one in stored]), roles)
    if not (roles == TRAINING).any():
        what = "names every document"
        if (roles == DUPLICATE).any():
            what = "has the same texts as all other documents"
        raise UserError(
            f"corpus.held_out {what}, so no document is left to train on; hold out fewer documents"
        )
    index = {
        "lengths": lengths,
        "roles": roles,
        "collections": collections,
        "conversations": np.concatenate([one["conversations"] for one in stored]),
        "first_of_shard": np.cumsum([0, *(len(one["lengths"]) for one in stored[:-1])]),
    }
    return index, index_facts(stored, index, names)


def index_facts(
    stored: list[dict[str, np.ndarray]], index: dict[str, np.ndarray], names: dict[str, int]
) -> dict:
    """Return the counts and names of the manifest; ``names`` maps collections to their indices."""
    lengths, roles, collections = index["lengths"], index["roles"], index["collections"]
    dropped = np.flatnonzero(roles == DUPLICATE)
    shown = {*dropped[:SHOWN].tolist(), *np.flatnonzero(roles == HELD_OUT).tolist()}
    named = {number: name for number, name in enumerate(ids(stored)) if number in shown}
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "tokens_held_out": int(lengths[roles == HELD_OUT].sum()),
        "held_out": [
            {"id": named[number], "tokens": int(lengths[number])}
            for number in np.flatnonzero(roles == HELD_OUT).tolist()
        ],
        "duplicates_dropped": [named[number] for number in dropped[:SHOWN].tolist()],
        "duplicates_dropped_count": len(dropped),
        "tokens_of_duplicates": int(lengths[dropped].sum()),
        "collections": {
            name: {
                "documents": int((collections == number).sum()),
                "tokens": int(lengths[collections == number].sum()),
            }
            for name, number in names.items()
        },
        "collection_names": list(names),
        "conversations": int(index["conversations"].sum()),
    }


def ids(stored: list[dict[str, np.ndarray]]) -> Iterator[str]:
    """Yield the ids of all documents, in order."""
    for one in stored:
        text, end = bytes(one["ids"]), 0
        for length in one["id_lengths"].tolist():
            begin, end = end, end + length
            yield text[begin:end].decode()


def check_held_out(stored: list, unknown: set[str], left: Counter, asked: dict[str, int]) -> None:
    """Raise ``UserError`` if the corpus lacks a held-out id, or a collection has too few documents."""
    for name in sorted(unknown):
        known = list(ids(stored))
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the first ids are {known[:3]}"
        raise UserError(f"corpus.held_out names {name!r}, which the corpus lacks; {hint}")
    for collection, missing in left.items():
        raise UserError(
            f"corpus.held_out_documents asks for {asked[collection]} of collection {collection!r}, "
            f"which has {asked[collection] - missing}; lower it"
        )


def mark_duplicates(digests: np.ndarray, roles: np.ndarray) -> None:
    """Give the role ``DUPLICATE`` to training documents whose text is in the corpus already.

    The first of several equal texts is kept. If one of them is held out, none is trained on. ``digests``
    uint64 (documents, 2) are of the texts; ``roles`` uint8 (documents,) are changed in place.
    """
    order = np.lexsort(digests.T)  # stable, so equal digests stay in the corpus's order
    ordered = digests[order]
    first = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    begins = np.flatnonzero(first)
    group = np.cumsum(first) - 1
    held_out = np.maximum.reduceat(roles[order] == HELD_OUT, begins)
    extra = (~first | held_out[group]) & (roles[order] == TRAINING)
    roles[order[extra]] = DUPLICATE
