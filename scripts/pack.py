"""Mix long and short documents and pack them into training sequences of full length.

    python scripts/pack.py --tokens results/micro/tokens.json --rope results/micro/rope/yarn.json \
        --long-share 0.8 --token-budget 614400 --document-masks --seed 0 \
        --manifest results/micro/pack.json --output results/micro/pack

The payload is one safetensors file; longyarn/data/packed_dataset.py describes its tensors.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from longyarn.config import derived
from longyarn.core import manifest
from longyarn.core.errors import UserError, program
from longyarn.core.files import new_directory, require_space
from longyarn.data import packed_dataset, packing
from longyarn.data.pieces import Plan, share_past
from longyarn.data.token_store import TRAINING, Tokens
from longyarn.rope.record import RopeRecord

# Arguments that are recorded in the manifest as settings.
SETTINGS = (
    "sequence_length", "long_share", "shares", "short_from", "packing", "token_budget", "allow_repeats",
    "document_masks", "seed",
)  # fmt: skip


def main() -> None:
    arguments = parse_arguments()
    tokens = Tokens(arguments.tokens)
    training = np.flatnonzero(tokens.roles == TRAINING)
    original, length = lengths(arguments)
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
    with new_directory(arguments.output) as directory:
        scored = packed_dataset.write(directory / "pack.safetensors", plan, tokens, training)
    record = manifest.read_facts(arguments.tokens)
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings={name: getattr(arguments, name) for name in SETTINGS},
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
            "share_past_original": share_past(plan, original, arguments.document_masks),
        }
        | used(plan, tokens, training),
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=Path, required=True, help="manifest of the tokens")
    parser.add_argument("--rope", type=Path, required=True, help="manifest of the RoPE settings")
    parser.add_argument("--sequence-length", type=int, help="tokens; default: the RoPE's length")
    parser.add_argument("--long-share", type=float, required=True, help="share of long sequences")
    parser.add_argument(
        "--shares", type=json.loads, help="collection -> its share of the tokens, as JSON"
    )
    parser.add_argument("--short-from", nargs="+", help="collections that short pieces come from")
    parser.add_argument("--packing", choices=["concat", "best_fit"], default="concat")
    parser.add_argument("--token-budget", type=int, help="tokens to pack; default: all")
    parser.add_argument(
        "--allow-repeats", action="store_true", help="let training read sequences more than once"
    )
    parser.add_argument("--read", type=int, default=0, help="tokens that training will read")
    parser.add_argument(
        "--document-masks", action=argparse.BooleanOptionalAction, required=True,
        help="hide the pieces of a sequence from one another",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, required=True, help="seed of choice and order")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    return parser.parse_args()


def lengths(arguments: argparse.Namespace) -> tuple[int, int]:
    """Return the model's original length and the length of a training sequence, in tokens."""
    rope = RopeRecord.read(arguments.rope)
    original = rope.original_max_position_embeddings
    length = derived.training_length(arguments.sequence_length, rope.max_position_embeddings)
    if length < original:
        raise UserError(
            f"mix.sequence_length {length} is shorter than the model's original length {original}, so "
            "training would teach no new positions; raise it"
        )
    return original, length


def used(plan: Plan, tokens: Tokens, training: np.ndarray) -> dict:
    """Return which documents are used and how, in total and by collection."""
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
    """Return how many pieces and tokens there are up to each length that is a power of two."""
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
