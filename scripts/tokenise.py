"""Turn documents into tokens with the model's own tokenizer, and keep the held-out ones apart.

Each document begins with the tokenizer's bos token and ends with its eos token, where it has them.
The payload is one safetensors file: ``tokens`` int32 (n,), all documents end to end, and ``offsets``
int64 (documents + 1,).
"""

import argparse
import difflib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longyarn import manifest, models
from longyarn.cli import UserError, program, progress
from longyarn.documents import read_shards

DOCUMENTS_AT_ONCE = 16  # the tokenizer takes documents of a group in parallel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="manifest of the base model")
    parser.add_argument("--corpus", type=Path, required=True, help="manifest of the corpus")
    parser.add_argument("--held-out", nargs="+", required=True, help="ids kept for evaluation")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()
    from safetensors.numpy import save_file

    base = manifest.read(arguments.base)
    corpus = manifest.read(arguments.corpus)
    check_held_out(
        arguments.held_out, [document["id"] for document in read_shards(arguments.corpus)]
    )
    model_directory = arguments.base.parent / base["facts"]["directory"]
    tokenizer = models.load_tokenizer(model_directory, base["facts"]["trust_remote_code"])

    documents, pieces = [], []
    groups = in_groups(read_shards(arguments.corpus), DOCUMENTS_AT_ONCE)
    total = math.ceil(corpus["facts"]["documents"] / DOCUMENTS_AT_ONCE)
    for group in progress(groups, total, "tokenise"):
        encoded = encode(tokenizer, [document["text"] for document in group])
        for document, piece in zip(group, encoded, strict=True):
            pieces.append(piece)
            held_out = document["id"] in arguments.held_out
            documents.append({"id": document["id"], "tokens": len(piece), "held_out": held_out})
    tokens = np.concatenate(pieces)
    check_vocabulary(tokens, manifest.read_json(model_directory / "config.json"))
    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
    with manifest.new_directory(arguments.output) as directory:
        save_file(
            {"tokens": tokens, "offsets": offsets.astype(np.int64)},
            directory / "tokens.safetensors",
        )
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings={"held_out": arguments.held_out},
        inputs={"base": arguments.base, "corpus": arguments.corpus},
        files=[arguments.output / "tokens.safetensors"],
        facts={
            "tokens": int(offsets[-1]),
            "tokens_held_out": sum(d["tokens"] for d in documents if d["held_out"]),
            "documents": documents,
        },
    )


def check_held_out(held_out: list[str], ids: list[str]) -> None:
    """Stop when a held-out id is not in the corpus, or nothing is left to train on."""
    for name in held_out:
        if name not in ids:
            near = difflib.get_close_matches(name, ids, n=1)
            mend = f"did you mean {near[0]!r}?" if near else f"the first ids are {ids[:3]}"
            raise UserError(f"corpus.held_out names {name!r}, which the corpus lacks; {mend}")
    if set(held_out) >= set(ids):
        raise UserError(
            "corpus.held_out names every document, so none is left to train on; hold fewer out"
        )


def check_vocabulary(tokens: np.ndarray, config: dict) -> None:
    """Stop when the tokenizer gives a token for which the model has no embedding."""
    vocabulary = config.get("vocab_size")
    if vocabulary is not None and tokens.max() >= vocabulary:
        raise UserError(
            f"the tokenizer gives token {tokens.max()}, but the model's vocab_size is {vocabulary}; "
            "model.source mixes files of two models, so restore them"
        )


def encode(tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Return documents' tokens, each int32 (n,), with bos before and eos after where there are such."""
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [np.asarray(before + tokens + after, dtype=np.int32) for tokens in found]


def in_groups(items: Iterator[dict], size: int) -> Iterator[list[dict]]:
    """Yield lists of up to ``size`` items."""
    while group := list(itertools.islice(items, size)):
        yield group


if __name__ == "__main__":
    program(main)()
