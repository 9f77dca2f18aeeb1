"""Mix long and short documents and pack them to full length.

The payload is one safetensors file: ``input_ids`` int32 (sequences, sequence_length),
``piece_lengths`` int32, the lengths of all pieces end to end, and ``piece_offsets`` int64
(sequences + 1,), which says where each sequence's pieces begin in it.
"""

import argparse
from pathlib import Path

import numpy as np

from longyarn import manifest, packing
from longyarn.cli import UserError, program, require_space


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=Path, required=True, help="manifest of the tokens")
    parser.add_argument("--rope", type=Path, required=True, help="manifest of the RoPE settings")
    parser.add_argument("--sequence-length", type=int, help="tokens; default: the RoPE's length")
    parser.add_argument("--long-share", type=float, required=True, help="share of long sequences")
    parser.add_argument("--token-budget", type=int, help="tokens to pack; default: all there are")
    parser.add_argument(
        "--document-masks", action=argparse.BooleanOptionalAction, required=True,
        help="whether pieces of a sequence are hidden from one another",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, required=True, help="seed of choice and order")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()
    from safetensors.numpy import load_file, save_file

    tokens = manifest.read(arguments.tokens)
    rope = manifest.read_facts(arguments.rope)
    original = rope["original_max_position_embeddings"]
    length = arguments.sequence_length or rope["max_position_embeddings"]
    if length < original:
        raise UserError(
            f"mix.sequence_length {length} is shorter than the model's original length {original}, so "
            "nothing new would be learnt; raise it"
        )
    stored = load_file(arguments.tokens.parent / next(iter(tokens["files"])))
    documents = tokens["facts"]["documents"]
    training = [number for number, d in enumerate(documents) if not d["held_out"]]

    plan = packing.make_plan(
        [documents[number]["tokens"] for number in training],
        sequence_length=length,
        piece_length=original,
        long_share=arguments.long_share,
        token_budget=arguments.token_budget,
        seed=arguments.seed,
    )
    require_space(arguments.output.parent, len(plan.sequences) * length * 4, "the packed sequences")
    input_ids = np.empty((len(plan.sequences), length), dtype=np.int32)
    for row, sequence in enumerate(plan.sequences):
        parts = []
        for piece in sequence:
            begin = stored["offsets"][training[piece.document]] + piece.start
            parts.append(stored["tokens"][begin : begin + piece.length])
        input_ids[row] = np.concatenate(parts)
    counts = [len(sequence) for sequence in plan.sequences]
    with manifest.new_directory(arguments.output) as directory:
        save_file(
            {
                "input_ids": input_ids,
                "piece_lengths": np.asarray(
                    [piece.length for sequence in plan.sequences for piece in sequence], np.int32
                ),
                "piece_documents": np.asarray(
                    [training[p.document] for sequence in plan.sequences for p in sequence],
                    np.int32,
                ),
                "piece_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            },
            directory / "pack.safetensors",
        )
    used = {training[piece.document] for sequence in plan.sequences for piece in sequence}
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings={
            "sequence_length": arguments.sequence_length,
            "long_share": arguments.long_share,
            "token_budget": arguments.token_budget,
            "document_masks": arguments.document_masks,
            "seed": arguments.seed,
        },
        inputs={"tokens": arguments.tokens, "rope": arguments.rope},
        files=[arguments.output / "pack.safetensors"],
        facts={
            "document_masks": arguments.document_masks,
            "sequence_length": length,
            "sequences": len(plan.sequences),
            "long_sequences": plan.long_sequences,
            "documents_used": len(used),
            "tokens_in": tokens["facts"]["tokens"],
            "tokens_packed": input_ids.size,
            "tails_dropped": plan.tails_dropped,
            "unused_by_the_mix": plan.unused,
            "held_out": tokens["facts"]["tokens_held_out"],
            "short_tokens": plan.short_tokens,
            "share_past_original": packing.share_past(plan, original, arguments.document_masks),
        },
    )


if __name__ == "__main__":
    program(main)()
