"""The corpus on disk: documents as JSON Lines, in shards that a stage can read one at a time.

A line is ``{"id": "collection/name", "text": …}`` or, from an instruction set, ``{"id": …,
"messages": [{"role": "user" | "assistant" | "system", "content": …}, …]}``. A shard is a file
``documents-00000.jsonl`` of about 32 MB, cut between documents; the corpus's manifest lists them in order.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from longyarn import manifest
from longyarn.cli import UserError

SHARD_BYTES = 32 * 1024 * 1024


def write_shards(
    directory: Path, documents: Iterable[dict], first: int = 0, size: int = SHARD_BYTES
) -> list[Path]:
    """Write documents into shards numbered from ``first`` on; return the shards' paths.

    A shard ends with the document that fills it, so a document of any length stays in one piece.
    Without a document there is no shard.
    """
    shards: list[Path] = []
    documents = iter(documents)
    for document in documents:
        shards.append(directory / shard_name(first + len(shards)))
        with open(shards[-1], "wb") as shard:
            shard.write(_line(document))
            while shard.tell() < size and (document := next(documents, None)) is not None:
                shard.write(_line(document))
    return shards


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


def characters(document: dict) -> int:
    """Return the number of characters of a document's text or of its messages."""
    if "text" in document:
        return len(document["text"])
    return sum(len(message["content"]) for message in document["messages"])


@dataclass
class Collection:
    """What one named source of documents gave."""

    source: str  # in words, for the report
    licence: str | None = None
    documents: int = 0
    characters: int = 0
    empty_documents: int = 0
    bad_records: int = 0


class Collections:
    """The collections of a corpus by name, counted while their documents pass."""

    def __init__(self) -> None:
        self.found: dict[str, Collection] = {}
        self._ids: set[bytes] = set()

    def open(self, name: str, source: str, licence: str | None = None) -> Collection:
        """Return the collection of this name, made anew when it is not known yet."""
        return self.found.setdefault(name, Collection(source, licence))

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
                    f"two documents are named {document['id']!r}; give one another collection"
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
            "collections": {name: asdict(found) for name, found in self.found.items()},
        }


def is_empty(document: dict) -> bool:
    """Tell whether a document has nothing but blanks, or a conversation no answer."""
    if "text" in document:
        return not document["text"].strip()
    return not any(
        message["role"] == "assistant" and message["content"].strip()
        for message in document["messages"]
    )
