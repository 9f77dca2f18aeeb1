"""The corpus on disk: documents as JSON Lines, in shards that are read one at a time.

A line is ``{"id": "collection/name", "text": …}`` or, from an instruction set, ``{"id": …,
"messages": [{"role": "user" | "assistant" | "system", "content": …}, …]}``. A shard is a file
``documents-00000.jsonl`` of about 32 MiB that ends with a whole document. The corpus's manifest lists the
shards in order.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.data.columns import characters, is_empty

SHARD_BYTES = 32 * 1024 * 1024
BAD_EXAMPLES = 5  # bad records that the log and the manifest describe; the others are only counted


def write_shards(directory: Path, documents: Iterable[dict]) -> list[Path]:
    """Write documents into shards; return the paths of the shards, an empty list without documents."""
    documents, shards = iter(documents), []
    while write_shard(path := directory / shard_name(len(shards)), documents):
        shards.append(path)
    return shards


def write_shard(path: Path, documents: Iterator[dict], size: int = SHARD_BYTES) -> bool:
    """Write one shard; return False, and write nothing, if no document is left.

    A shard ends with the document that brings it to ``size`` bytes, so no document is split.
    """
    first = next(documents, None)
    if first is None:
        return False
    with open(path, "wb") as shard:
        shard.write(_line(first))
        while shard.tell() < size and (document := next(documents, None)) is not None:
            shard.write(_line(document))
    return True


def _line(document: dict) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode() + b"\n"


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"documents-{number:05}.jsonl"


def read_shards(manifest_path: Path) -> Iterator[dict]:
    """Yield the documents of a corpus, in order; ``manifest_path`` is the corpus's manifest."""
    for shard in shard_paths(manifest_path):
        yield from read_shard(shard)


def shard_paths(manifest_path: Path) -> list[Path]:
    """Return the shards of a corpus, in order; raise ``UserError`` if one is missing."""
    files = manifest.read(manifest_path)["files"]
    return [Path(manifest_path).parent / name for name in sorted(files)]


def read_shard(path: Path) -> Iterator[dict]:
    """Yield the documents of one shard."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path} line {number} is not JSON ({error}); delete it and run again"
                ) from None


@dataclass
class Collection:
    """Counts of the documents of one collection, and where they come from."""

    source: str  # as the report shows it
    licence: str | None
    skip_bad: bool
    documents: int = 0
    characters: int = 0
    empty_documents: int = 0
    bad_records: int = 0
    bad_examples: list[str] = field(default_factory=list)
    records_read: int | None = None  # of a data set, including records that its filter rejects
    ended_by: str | None = None  # of a data set: characters, read_at_most or end

    def bad(self, place: str, reason: object, name: str | None = None) -> None:
        """Raise ``UserError`` for a bad record, or count it if the config sets corpus.skip_bad.

        The manifest names the record's place by ``name``, which has no absolute path.
        """
        if not self.skip_bad:
            raise UserError(
                f"{place} {reason}; correct it or its entry in corpus, or set corpus.skip_bad to true to "
                "skip such records"
            )
        self.bad_records += 1
        if len(self.bad_examples) < BAD_EXAMPLES:
            self.bad_examples.append(f"{name or place} {reason}")
            print(f"skipped: {place} {reason}", file=sys.stderr, flush=True)

    def facts(self) -> dict:
        """Return the counts, without those that this kind of source does not have."""
        shown = asdict(self)
        del shown["skip_bad"]
        # A license that is not stated appears as null.
        return {k: v for k, v in shown.items() if v not in (None, []) or k == "licence"}


class Collections:
    """The collections of a corpus by name, which count their documents as these are written."""

    def __init__(self, skip_bad: bool = False) -> None:
        self.found: dict[str, Collection] = {}
        self._skip_bad = skip_bad
        self._ids: set[bytes] = set()

    def open(self, name: str, source: str, licence: str | None = None) -> Collection:
        """Return the collection with this name; create it if there is none."""
        return self.found.setdefault(name, Collection(source, licence, self._skip_bad))

    def keep(self, documents: Iterable[dict]) -> Iterator[dict]:
        """Yield and count the documents that have text; raise ``UserError`` if two have the same id."""
        for document in documents:
            collection = self.found[document["id"].partition("/")[0]]
            if is_empty(document):
                collection.empty_documents += 1
                continue
            # Half a digest saves memory: there can be millions of ids.
            digest = hashlib.sha256(document["id"].encode()).digest()[:16]
            if digest in self._ids:
                raise UserError(
                    f"two documents have the id {document['id']!r}; change the collection or name of one"
                )
            self._ids.add(digest)
            collection.documents += 1
            collection.characters += characters(document)
            yield document

    def facts(self) -> dict:
        """Return the counts for the manifest: totals, and those of each collection."""
        return {
            "documents": sum(found.documents for found in self.found.values()),
            "characters": sum(found.characters for found in self.found.values()),
            "collections": {name: found.facts() for name, found in self.found.items()},
        }
