"""Turn documents into tokens with the model's own tokenizer, and keep the held-out ones apart.

Each document begins with the tokenizer's bos token and ends with its eos token, where it has them. The
payload is ``tokens-*.safetensors``, the tokens of a part of the corpus each, and ``index.safetensors``,
which says what each document is for. A finished part is kept in a work directory, so that a run that was
killed goes on where it stood. scripts/longyarn/data/token_store.py reads all this.
"""

import argparse
import concurrent.futures
import difflib
import json
import multiprocessing
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from longyarn.core import attempts, manifest, tensorfile
from longyarn.core.code_hash import code_hash
from longyarn.core.console import token_progress
from longyarn.core.errors import UserError, program
from longyarn.core.files import link_or_copy, new_directory, sha256, write_text
from longyarn.data import chat_templates, documents, token_workers
from longyarn.data.token_store import DUPLICATE, HELD_OUT, INDEX, TRAINING
from longyarn.models import loading

SHOWN = 20  # ids in the manifest of duplicates that were dropped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="manifest of the base model")
    parser.add_argument("--corpus", type=Path, required=True, help="manifest of the corpus")
    parser.add_argument("--held-out", nargs="*", default=[], help="ids kept for evaluation")
    parser.add_argument(
        "--held-out-documents", type=json.loads, default={},
        help="collection -> how many of its first documents to keep for evaluation, as JSON",
    )  # fmt: skip
    parser.add_argument("--chat-template", help="how conversations are written: a name or a file")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--work", type=Path, required=True, help="root of work directories")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()

    base = manifest.read(arguments.base)["facts"]
    shards = documents.shard_paths(arguments.corpus)
    template = arguments.chat_template and chat_templates.load(arguments.chat_template)
    model = arguments.base.parent / base["directory"]
    settings = {
        "chat_template": arguments.chat_template,
        "held_out": arguments.held_out,
        "held_out_documents": arguments.held_out_documents,
    }
    work = attempts.directory(arguments.work, identity(arguments, template))
    work.mkdir(parents=True, exist_ok=True)
    attempts.record(work, identity(arguments, template))
    tokenizer = prepare(model, base["trust_remote_code"], template, work)
    units = token_workers.units(shards, work)
    tokenise(units, tokenizer, arguments.workers)

    index, facts = make_index(units, arguments.held_out, arguments.held_out_documents)
    with new_directory(arguments.output) as directory:
        tensorfile.write(directory / INDEX, index)
        for unit in units:
            link_or_copy(unit.output, directory / unit.output.name)
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings=settings,
        inputs={"base": arguments.base, "corpus": arguments.corpus},
        files=sorted(arguments.output.iterdir()),
        facts=facts | {"dtype": tokenizer.dtype},
    )
    shutil.rmtree(work, ignore_errors=True)  # linked from the payload, or copied there


def identity(arguments: argparse.Namespace, template: str | None) -> dict:
    """Return what defines the tokens, and the run, whose attempts share a work directory."""
    return {
        "run": str(arguments.manifest),
        "code": code_hash(Path(__file__)),
        "chat_template": template,
        "base": sha256(arguments.base),
        "corpus": sha256(arguments.corpus),
    }


def prepare(
    model: Path, trust_remote_code: bool, template: str | None, work: Path
) -> token_workers.Tokenizer:
    """Check the model's tokenizer and return what workers need of it."""
    tokenizer = loading.load_tokenizer(model, trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {model} has no eos token, which ends each document; name one in "
            "tokenizer_config.json (eos_token) in model.source"
        )
    if tokenizer.bos_token_id is None:
        print(
            "tokenise: the tokenizer has no bos token, so documents begin without", file=sys.stderr
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        write_text(work / "tokenizer.json", backend.to_str())
    return token_workers.Tokenizer(
        file=None if backend is None else work / "tokenizer.json",
        model=model,
        trust_remote_code=trust_remote_code,
        before=() if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,),
        after=(tokenizer.eos_token_id,),
        special={"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token},
        dtype="uint16" if max(tokenizer.get_vocab().values()) < 1 << 16 else "int32",
        template=template,
    )


def tokenise(
    units: list[token_workers.Unit], tokenizer: token_workers.Tokenizer, workers: int
) -> None:
    """Write the tokens of every unit that is not there yet."""
    pending = [unit for unit in units if not unit.output.is_file()]
    if len(pending) < len(units):
        done = len(units) - len(pending)
        print(f"tokenise: {done} of {len(units)} parts are there already", file=sys.stderr)
    total = sum(unit.end - unit.begin for unit in pending)
    for _ in token_progress(finished(pending, tokenizer, workers), total, "tokenise"):
        pass


def finished(
    units: list[token_workers.Unit], tokenizer: token_workers.Tokenizer, workers: int
) -> Iterator[tuple[int, int]]:
    """Yield what ``Worker.write`` returns for each unit, as processes finish them."""
    if not units:
        return
    executor = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(units)),
        # Not a fork: the tokenizers library and torch have threads.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=token_workers.start,
        initargs=(tokenizer,),
    )
    try:
        jobs = [executor.submit(token_workers.work, unit) for unit in units]
        for job in concurrent.futures.as_completed(jobs):
            yield job.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker of tokenise was killed, most likely for want of memory; give the job more, or "
            "fewer threads, and run again: what is finished is kept"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def make_index(
    units: list[token_workers.Unit], held_out: list[str], held_out_documents: dict[str, int]
) -> tuple[dict[str, np.ndarray], dict]:
    """Return the tensors of the index (see ``tokens.Tokens``) and the facts of the manifest."""
    stored = [
        tensorfile.load(unit.output, "lengths", "digests", "ids", "id_lengths", "conversations")
        for unit in units
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
        raise UserError(f"corpus.held_out {what}, so none is left to train on; hold fewer out")
    index = {
        "lengths": lengths,
        "roles": roles,
        "collections": collections,
        "conversations": np.concatenate([one["conversations"] for one in stored]),
        "first_of_shard": np.cumsum([0, *(len(one["lengths"]) for one in stored[:-1])]),
    }
    dropped = np.flatnonzero(roles == DUPLICATE)
    shown = {*dropped[:SHOWN].tolist(), *np.flatnonzero(roles == HELD_OUT).tolist()}
    named = {number: name for number, name in enumerate(ids(stored)) if number in shown}
    facts = {
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
    return index, facts


def ids(stored: list[dict[str, np.ndarray]]) -> Iterator[str]:
    """Yield the ids of all documents, in order."""
    for one in stored:
        text, end = bytes(one["ids"]), 0
        for length in one["id_lengths"].tolist():
            begin, end = end, end + length
            yield text[begin:end].decode()


def check_held_out(stored: list, unknown: set[str], left: Counter, asked: dict[str, int]) -> None:
    """Stop when a held-out id is not in the corpus, or a collection has too few documents."""
    for name in sorted(unknown):
        known = list(ids(stored))
        near = difflib.get_close_matches(name, known, n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"the first ids are {known[:3]}"
        raise UserError(f"corpus.held_out names {name!r}, which the corpus lacks; {mend}")
    for collection, missing in left.items():
        raise UserError(
            f"corpus.held_out_documents asks for {asked[collection]} of collection {collection!r}, "
            f"which has {asked[collection] - missing}; lower it"
        )


def mark_duplicates(digests: np.ndarray, roles: np.ndarray) -> None:
    """Give the role ``DUPLICATE`` to documents for training whose text is there already.

    Of equal texts the first is kept; where one of them is held out, none is trained on. ``digests``:
    uint64 (documents, 2); ``roles``: uint8 (documents,).
    """
    order = np.lexsort(digests.T)  # stable: equal ones stay in the corpus's order
    ordered = digests[order]
    first = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    begins = np.flatnonzero(first)
    group = np.cumsum(first) - 1
    held_out = np.maximum.reduceat(roles[order] == HELD_OUT, begins)
    extra = (~first | held_out[group]) & (roles[order] == TRAINING)
    roles[order[extra]] = DUPLICATE


if __name__ == "__main__":
    program(main)()
