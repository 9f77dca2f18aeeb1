"""Text for the benchmarks of packing: copies of the default's books, each with its lines shuffled.

So there can be any amount of text, no two documents are equal, and the same size gives the same text.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from paths import RUN, SCRIPTS

from longyarn.core import manifest
from longyarn.data import documents

SHORTEST, LONGEST = 1 << 10, 1 << 19  # characters of a document; log-uniform
HELD_OUT = ["books/0"]


def made(size: int) -> Iterator[dict]:
    """Yield documents with about ``size`` characters in total."""
    lines = [
        line
        for document in documents.read_shards(RUN / "corpus.json")
        for line in document["text"].splitlines(keepends=True)
    ]
    generator = np.random.default_rng(0)
    number, done = 0, 0
    while done < size:
        shuffled = [lines[i] for i in generator.permutation(len(lines)).tolist()]
        ends = np.cumsum([len(line) for line in shuffled])
        begin, place = 0, 0
        while begin < len(shuffled) and done < size:
            place += int(SHORTEST * (LONGEST / SHORTEST) ** generator.random())
            end = int(np.searchsorted(ends, place)) + 1
            text = "".join(shuffled[begin:end])
            yield {"id": f"books/{number}", "text": text}
            number, done, begin = number + 1, done + len(text), end


def write_corpus(directory: Path, size: int) -> Path:
    """Write a corpus of ``size`` characters in the form of the stage download_corpus; return its manifest."""
    (directory / "corpus").mkdir(parents=True)
    shards = documents.write_shards(directory / "corpus", made(size))
    path = directory / "corpus.json"
    manifest.write(
        path,
        script=SCRIPTS / "download_corpus.py",
        settings={},
        inputs={},
        files=shards,
        facts={},
    )
    return path


def stages(corpus: Path, workers: int = 2, packing: str = "concat") -> list[list[str]]:
    """Return the commands that tokenize a corpus for the default's model and pack all of it, beside it."""
    tokens, pack = corpus.parent / "tokens.json", corpus.parent / "pack.json"
    tokenise = [
        sys.executable, SCRIPTS / "tokenise.py", "--base", RUN / "base.json", "--corpus", corpus,
        "--held-out", *HELD_OUT, "--workers", workers, "--work", corpus.parent / "work",
        "--manifest", tokens, "--output", tokens.with_suffix(""),
    ]  # fmt: skip
    packed = [
        sys.executable, SCRIPTS / "pack.py", "--tokens", tokens, "--rope", RUN / "rope/yarn.json",
        "--long-share", 0.3, "--packing", packing, "--document-masks", "--seed", 0,
        "--manifest", pack, "--output", pack.with_suffix(""),
    ]  # fmt: skip
    return [list(map(str, command)) for command in (tokenise, packed)]


def tokens_of(corpus: Path) -> int:
    """Return the number of tokens that the stages made from a corpus."""
    return manifest.read_facts(corpus.parent / "tokens.json")["tokens"]


def texts_of(corpus: Path) -> Iterator[str]:
    """Yield the texts of the documents."""
    return (json.loads(line)["text"] for line in _lines(corpus))


def _lines(corpus: Path) -> Iterator[str]:
    for shard in documents.shard_paths(corpus):
        with open(shard, encoding="utf-8") as file:
            yield from file
