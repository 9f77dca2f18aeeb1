"""Mix long and short documents and pack them to full length.

The payload is one safetensors file: ``input_ids`` (sequences, sequence_length), uint16 or int32 as the
tokens are; ``piece_lengths`` and ``piece_documents`` int32, the lengths of all pieces end to end and the
numbers of their documents, -1 for padding; ``piece_offsets`` int64 (sequences + 1,), which says where each
sequence's pieces begin in them; and, where there are conversations, ``scored`` bool like input_ids, the
tokens that count in the loss.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longyarn.config import derived
from longyarn.core import manifest, tensorfile
from longyarn.core.console import token_progress
from longyarn.core.errors import UserError, program
from longyarn.core.files import new_directory, require_space
from longyarn.data import packing
from longyarn.data.token_store import TRAINING, Tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=Path, required=True, help="manifest of the tokens")
    parser.add_argument("--rope", type=Path, required=True, help="manifest of the RoPE settings")
    parser.add_argument("--sequence-length", type=int, help="tokens; default: the RoPE's length")
    parser.add_argument("--long-share", type=float, required=True, help="share of long sequences")
    parser.add_argument(
        "--shares", type=json.loads, help="collection -> its share of the tokens, as JSON"
    )
    parser.add_argument("--short-from", nargs="+", help="collections that short pieces come from")
    parser.add_argument("--packing", choices=["concat", "best_fit"], default="concat")
    parser.add_argument("--token-budget", type=int, help="tokens to pack; default: all there are")
    parser.add_argument(
        "--allow-repeats", action="store_true", help="training may read the sequences again"
    )
    parser.add_argument("--read", type=int, default=0, help="tokens that training will read")
    parser.add_argument(
        "--document-masks", action=argparse.BooleanOptionalAction, required=True,
        help="whether pieces of a sequence are hidden from one another",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, required=True, help="seed of choice and order")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()

    record = manifest.read_facts(arguments.tokens)
    tokens = Tokens(arguments.tokens)
    rope = manifest.read_facts(arguments.rope)
    original = rope["original_max_position_embeddings"]
    length = arguments.sequence_length or rope["max_position_embeddings"]
    if length < original:
        raise UserError(
            f"mix.sequence_length {length} is shorter than the model's original length {original}, so "
            "nothing new would be learnt; raise it"
        )
    training = np.flatnonzero(tokens.roles == TRAINING)
    plan = packing.make_plan(
        tokens.lengths[training],
        sequence_length=length,
        piece_length=original,
        long_share=arguments.long_share,
        token_budget=arguments.token_budget,
        seed=arguments.seed,
        strategy=arguments.packing,
        sources=packing.Sources(
            tokens.collections[training],
            tokens.collection_names,
            arguments.shares,
            arguments.short_from,
        ),
        whole=tokens.conversations[training],
    )
    derived.require_enough(len(plan), length, arguments.read, arguments.allow_repeats)
    width = tokens.dtype.itemsize + bool(tokens.conversations.any())
    require_space(arguments.output.parent, len(plan) * length * width, "the packed sequences")
    numbers = np.append(training, packing.PADDING)  # padding's -1 takes the last
    with new_directory(arguments.output) as directory:
        scored = write(directory / "pack.safetensors", plan, tokens, numbers, length)
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings={
            "sequence_length": arguments.sequence_length,
            "long_share": arguments.long_share,
            "shares": arguments.shares,
            "short_from": arguments.short_from,
            "packing": arguments.packing,
            "token_budget": arguments.token_budget,
            "allow_repeats": arguments.allow_repeats,
            "document_masks": arguments.document_masks,
            "seed": arguments.seed,
        },
        inputs={"tokens": arguments.tokens, "rope": arguments.rope},
        files=[arguments.output / "pack.safetensors"],
        facts={
            "document_masks": arguments.document_masks,
            "packing": arguments.packing,
            "allow_repeats": arguments.allow_repeats,
            "sequence_length": length,
            "sequences": len(plan),
            "long_sequences": plan.long_sequences,
            "tokens_in": record["tokens"],
            "tokens_packed": plan.real.tokens,
            "tokens_scored": scored,
            "tails_dropped": plan.tails_dropped,
            "unused_by_the_mix": plan.unused,
            "held_out": record["tokens_held_out"],
            "duplicates": record["tokens_of_duplicates"],
            "padding": plan.padding,
            "short_tokens": plan.short_tokens,
            "share_past_original": packing.share_past(plan, original, arguments.document_masks),
        }
        | used(plan, tokens, training),
    )


def write(path: Path, plan: packing.Plan, tokens: Tokens, numbers: np.ndarray, length: int) -> int:
    """Write the sequences of a plan, a row at a time; return how many of their tokens are scored.

    ``numbers``: the documents' in ``tokens``, by that in the plan.
    """
    pieces, shape = plan.pieces, (len(plan), length)
    documents = numbers[pieces.document]
    shards, begins = tokens.places(documents, pieces.start)

    def rows(name: str, dtype: np.dtype, label: str) -> Iterator[np.ndarray]:
        steps = ((length, length) for _ in range(len(plan)))
        progress = token_progress(steps, len(plan) * length, label)
        for _, row in zip(progress, range(len(plan)), strict=False):
            these = slice(*plan.offsets[row : row + 2])
            parts = zip(
                documents[these].tolist(),
                shards[these].tolist(),
                begins[these].tolist(),
                pieces.length[these].tolist(),
                strict=True,
            )
            yield np.concatenate(
                [
                    np.zeros(count, dtype)
                    if document == packing.PADDING
                    else tokens.read(name, shard, begin, count)
                    for document, shard, begin, count in parts
                ]
            )

    kind = tensorfile.KINDS[tokens.dtype]
    tensors = {
        "piece_lengths": pieces.length.astype(np.int32),
        "piece_documents": documents.astype(np.int32),
        "piece_offsets": plan.offsets.astype(np.int64),
        "input_ids": tensorfile.Stream(kind, shape, rows("tokens", tokens.dtype, "pack")),
    }
    scored = plan.real.tokens
    if tokens.conversations.any():
        scored = 0

        def counted(masks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
            nonlocal scored
            for mask in masks:
                scored += int(mask.sum())
                yield mask

        masks = counted(rows("scored", np.dtype(bool), "pack: what is scored"))
        tensors["scored"] = tensorfile.Stream("BOOL", shape, masks)
    tensorfile.write(path, tensors)
    return scored


def used(plan: packing.Plan, tokens: Tokens, training: np.ndarray) -> dict:
    """Return which documents were used and how, of all and of each collection."""
    real = plan.real
    documents = np.unique(real.document)
    lengths, collections = tokens.lengths[training], tokens.collections[training]
    whole = np.unique(real.document[real.length == lengths[real.document]])
    of_piece = collections[real.document]
    facts = {
        "documents": len(training),
        "documents_used": len(documents),
        "conversations_too_long": plan.too_long,
        "documents_cut": len(documents) - len(whole),
        "long_documents": plan.long_documents,
        "long_windows": plan.long_windows,
        "collections": {},
        "piece_lengths": histogram(real.length),
    }
    for number, name in enumerate(tokens.collection_names):
        packed = int(real.length[of_piece == number].sum())
        facts["collections"][name] = {
            "documents": int((collections == number).sum()),
            "documents_used": int((collections[documents] == number).sum()),
            "tokens": int(lengths[collections == number].sum()),
            "tokens_packed": packed,
            "share": packed / real.tokens,
        }
    return facts


def histogram(lengths: np.ndarray) -> list[dict]:
    """Return how many pieces, and tokens in them, have up to each power of two of tokens."""
    power = np.ceil(np.log2(lengths)).astype(int)
    return [
        {
            "up_to": 1 << int(one),
            "pieces": int((power == one).sum()),
            "tokens": int(lengths[power == one].sum()),
        }
        for one in np.unique(power)
    ]


if __name__ == "__main__":
    program(main)()
