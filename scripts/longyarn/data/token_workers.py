"""Turning documents into tokens in worker processes, one unit of text at a time.

A *unit* is a range of bytes of a corpus shard: the documents whose line begins in it. Units depend only
on the corpus, so the output does not depend on the number of workers. A worker needs only the tokenizers
library, with a single thread. That is faster than one process with the library's own threads, which wait
for Python between two batches.
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path

import numpy as np

from longyarn.core import tensorfile
from longyarn.core.errors import UserError
from longyarn.data import chat_templates
from longyarn.data.documents import characters
from longyarn.models import loading

SMALLEST, LARGEST = 1 << 20, 32 << 20  # bytes of a unit
UNITS = 64  # in a corpus of medium size
BATCH = 1 << 20  # characters given to the tokenizer at once, which bounds memory


@dataclass(frozen=True)
class Unit:
    """The documents of a corpus shard whose line begins in the bytes from ``begin`` to ``end``."""

    shard: Path
    begin: int
    end: int
    output: Path


@dataclass(frozen=True)
class Tokenizer:
    """How a worker turns text into tokens, as plain values.

    ``file`` is the tokenizers library's JSON, or None for a tokenizer that exists in Python only and is
    loaded from ``model``. ``before`` and ``after`` are the tokens around each document. ``special`` has
    the ``bos_token`` and ``eos_token`` for the chat ``template``. ``dtype`` is the type of stored tokens.
    """

    file: Path | None
    model: Path
    trust_remote_code: bool
    before: tuple[int, ...]
    after: tuple[int, ...]
    special: dict[str, str]
    dtype: str
    template: str | None


def units(shards: list[Path], directory: Path) -> list[Unit]:
    """Cut the shards of a corpus into units; the tokens of each go to a file in ``directory``."""
    sizes = [shard.stat().st_size for shard in shards]
    size = min(max(sum(sizes) // UNITS, SMALLEST), LARGEST)
    ranges = [
        (shard, begin, min(begin + size, whole))
        for shard, whole in zip(shards, sizes, strict=True)
        for begin in range(0, whole, size)
    ]
    return [
        Unit(shard, begin, end, directory / f"tokens-{number:05}.safetensors")
        for number, (shard, begin, end) in enumerate(ranges)
    ]


def documents(unit: Unit) -> Iterator[dict]:
    """Yield the documents of a unit, the last one whole even if it runs over the unit's end."""
    with open(unit.shard, "rb") as file:
        if unit.begin:
            file.seek(unit.begin - 1)
            file.readline()  # the rest of the previous unit's last line
        while (place := file.tell()) < unit.end and (line := file.readline()):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"{unit.shard} is not JSON Lines at byte {place} ({error}); delete it "
                    "and run again"
                ) from None


def batches(unit: Unit) -> Iterator[list[dict]]:
    """Yield a unit's documents in batches of about ``BATCH`` characters."""
    batch, size = [], 0
    for document in documents(unit):
        batch.append(document)
        size += characters(document)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Worker:
    """Writes the tokens of units, one file each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.settings = tokenizer
        self.dtype = np.dtype(tokenizer.dtype)
        if tokenizer.file:
            from tokenizers import Tokenizer as FastTokenizer

            self.fast = FastTokenizer.from_file(str(tokenizer.file))
            self.fast.no_truncation()
            self.fast.no_padding()
        else:
            self.fast = None
            self.slow = loading.load_tokenizer(tokenizer.model, tokenizer.trust_remote_code)

    def write(self, unit: Unit) -> tuple[int, int]:
        """Write a unit's tokens; return its size in bytes of the corpus, and its number of tokens.

        The file has ``tokens`` (n,), the documents end to end; their ``lengths``, int64 (documents,);
        ``digests``, uint64 (documents, 2), of their texts with whitespace normalized; ``ids``, uint8,
        UTF-8 end to end; and ``id_lengths``, int32 (documents,). ``conversations``, bool (documents,),
        marks conversations. If there are any, ``scored``, bool (n,), marks the tokens that count.
        """
        pieces, masks, ids, digests = [], [], [], []
        for batch in batches(unit):
            for document, (piece, mask) in zip(batch, self.encode(batch), strict=True):
                pieces.append(piece)
                masks.append(mask)
                ids.append(document["id"].encode())
                digests.append(digest(document))
        empty = np.empty(0, self.dtype)
        tensors = {
            "tokens": np.concatenate([empty, *pieces]),
            "lengths": np.asarray([len(piece) for piece in pieces], np.int64),
            "digests": np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2),
            "ids": np.frombuffer(b"".join(ids), np.uint8),
            "id_lengths": np.asarray([len(name) for name in ids], np.int32),
            "conversations": np.asarray([mask is not None for mask in masks], bool),
        }
        if tensors["conversations"].any():
            tensors["scored"] = np.concatenate(
                [
                    np.ones(len(piece), bool) if mask is None else mask
                    for piece, mask in zip(pieces, masks, strict=True)
                ]
            )
        tensorfile.write(unit.output, tensors)
        return unit.end - unit.begin, len(tensors["tokens"])

    def encode(self, batch: list[dict]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield each document's tokens and, for a conversation, which of them are scored."""
        plain = [document["text"] for document in batch if "text" in document]
        encoded = iter(self.encode_texts(plain))
        for document in batch:
            if "text" in document:
                yield self.framed(next(encoded)), None
            else:
                yield self.encode_conversation(document)

    def encode_texts(self, texts: list[str]) -> Iterator[list[int]]:
        """Yield the tokens of texts, without the tokens around a document."""
        if self.fast:
            # This method computes no offsets, which only conversations need.
            found = self.fast.encode_batch_fast(texts, add_special_tokens=False)
            return (one.ids for one in found)
        return iter(self.slow(texts, add_special_tokens=False)["input_ids"] if texts else [])

    def encode_conversation(self, document: dict) -> tuple[np.ndarray, np.ndarray]:
        """Return a conversation's tokens, and which of them belong to answers."""
        if self.settings.template is None:
            raise UserError(
                f"{document['id']} is a conversation, but corpus.chat_template is null; name a template"
            )
        if not self.fast:
            raise UserError(
                "conversations need a tokenizer of the tokenizers library, which the model lacks; remove "
                "the instruction set from the corpus"
            )
        text, answers = chat_templates.render(
            self.settings.template, document["messages"], self.settings.special
        )
        encoding = self.fast.encode(text, add_special_tokens=False)
        places = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        scored = np.zeros(len(places), bool)
        for begin, end in answers:
            scored |= (places[:, 1] > begin) & (places[:, 0] < end)
        if not scored.any():
            raise UserError(
                f"corpus.chat_template marks no answer in {document['id']}; put {{% generation %}} and "
                "{% endgeneration %} around what the assistant writes"
            )
        tokens = encoding.ids
        # Many templates write bos and eos themselves.
        before = () if tuple(tokens[:1]) == self.settings.before else self.settings.before
        after = () if tuple(tokens[-1:]) == self.settings.after else self.settings.after
        mask = np.concatenate([np.zeros(len(before), bool), scored, np.zeros(len(after), bool)])
        return np.asarray([*before, *tokens, *after], self.dtype), mask

    def framed(self, tokens: list[int]) -> np.ndarray:
        """Return a document's tokens with the tokens around it."""
        return np.asarray([*self.settings.before, *tokens, *self.settings.after], self.dtype)


def digest(document: dict) -> bytes:
    """Return 16 bytes that are the same for documents that differ only in whitespace."""
    if "text" in document:
        texts = [document["text"]]
    else:
        texts = [part for message in document["messages"] for part in message.values()]
    found = hashlib.blake2b(digest_size=16)
    for text in texts:
        found.update(" ".join(text.split()).encode() + b"\0")
    return found.digest()


def run(units: list[Unit], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[int, int]]:
    """Write the units in ``workers`` processes; yield what ``Worker.write`` returns for each.

    Raise ``UserError`` if a process is killed.
    """
    if not units:
        return
    executor = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(units)),
        # Not a fork: the tokenizers library and torch have threads.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start,
        initargs=(tokenizer,),
    )
    try:
        jobs = [executor.submit(work, unit) for unit in units]
        for job in concurrent.futures.as_completed(jobs):
            yield job.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker of tokenise was killed, most likely because memory ran out; give the job more "
            "memory or fewer threads, and run again: finished parts are kept"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


# The rest runs in a worker process.

worker: Worker | None = None


def start(tokenizer: Tokenizer) -> None:
    """Make this process a worker, which ends when the process that started it ends."""
    global worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    worker = Worker(tokenizer)


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def work(unit: Unit) -> tuple[int, int]:
    """Write a unit's tokens in this worker."""
    return worker.write(unit)
