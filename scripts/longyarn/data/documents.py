"""The corpus on disk: documents as JSON Lines, in shards that a stage can read one at a time.

A line is ``{"id": "collection/name", "text": …}`` or, from an instruction set, ``{"id": …,
"messages": [{"role": "user" | "assistant" | "system", "content": …}, …]}``. A shard is a file
``documents-00000.jsonl`` of about 32 MB, cut between documents; the corpus's manifest lists them in order.
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
BAD_EXAMPLES = 5  # said in the log and kept in the manifest; the others are counted


def write_shards(directory: Path, documents: Iterable[dict]) -> list[Path]:
    """Write documents into shards; return the shards' paths, none without a document."""
    documents, shards = iter(documents), []
    while write_shard(path := directory / shard_name(len(shards)), documents):
        shards.append(path)
    return shards


def write_shard(path: Path, documents: Iterator[dict], size: int = SHARD_BYTES) -> bool:
    """Write one shard; tell whether there was a document for it.

    It ends with the document that fills it, so a document of any length stays in one piece.
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
    """Yield the documents of a corpus, in order, given its manifest."""
    for shard in shard_paths(manifest_path):
        yield from read_shard(shard)


def shard_paths(manifest_path: Path) -> list[Path]:
    """Return the shards of a corpus, in order; raise ``UserError`` when one is missing."""
    files = manifest.read(manifest_path)["files"]
    return [Path(manifest_path).parent / name for name in sorted(files)]


def read_shard(path: Path) -> Iterator[dict]:
    """Yield the documents of one shard."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is not JSON ({error}); rebuild it") from None


@dataclass
class Collection:
    """What one named source of documents gave."""

    source: str  # in words, for the report
    licence: str | None
    skip_bad: bool
    documents: int = 0
    characters: int = 0
    empty_documents: int = 0
    bad_records: int = 0
    bad_examples: list[str] = field(default_factory=list)
    records_read: int | None = None  # of a data set, those included that a filter passes over
    ended_by: str | None = None  # of a data set: characters, read_at_most or its end

    def bad(self, place: str, reason: object, name: str | None = None) -> None:
        """Stop at a bad record, or count it where the config says so; ``name`` is without a path."""
        if not self.skip_bad:
            raise UserError(
                f"{place} {reason}; mend it or its entry in corpus, or set corpus.skip_bad to true to pass "
                "over such records"
            )
        self.bad_records += 1
        if len(self.bad_examples) < BAD_EXAMPLES:
            self.bad_examples.append(f"{name or place} {reason}")
            print(f"passed over: {place} {reason}", file=sys.stderr, flush=True)

    def facts(self) -> dict:
        """Return the figures, without those that this kind of source does not have."""
        shown = asdict(self)
        del shown["skip_bad"]
        # A licence that is not stated is said to be null.
        return {k: v for k, v in shown.items() if v not in (None, []) or k == "licence"}


class Collections:
    """The collections of a corpus by name, counted while their documents pass."""

    def __init__(self, skip_bad: bool = False) -> None:
        self.found: dict[str, Collection] = {}
        self._skip_bad = skip_bad
        self._ids: set[bytes] = set()

    def open(self, name: str, source: str, licence: str | None = None) -> Collection:
        """Return the collection of this name, made anew when it is not known yet."""
        return self.found.setdefault(name, Collection(source, licence, self._skip_bad))

    def keep(self, documents: Iterable[dict]) -> Iterator[dict]:
        """Yield the documents that have text, counted; stop when two have one id."""
        for document in documents:
            collection = self.found[document["id"].partition("/")[0]]
            if is_empty(document):
                collection.empty_documents += 1
                continue
            # Half a digest, because there can be millions.
            digest = hashlib.sha256(document["id"].encode()).digest()[:16]
            if digest in self._ids:
                raise UserError(
                    f"two documents are named {document['id']!r}; give one another collection or name"
                )
            self._ids.add(digest)
            collection.documents += 1
            collection.characters += characters(document)
            yield document

    def facts(self) -> dict:
        """Return the figures of the manifest: sums, and those of each collection."""
        return {
            "documents": sum(found.documents for found in self.found.values()),
            "characters": sum(found.characters for found in self.found.values()),
            "collections": {name: found.facts() for name, found in self.found.items()},
        }
