"""Check, before training, that every evaluation in the config will be possible after it.

    python scripts/check_evaluation.py --base results/micro/base.json \
        --rope results/micro/rope/yarn.json --tokens results/micro/tokens.json \
        --perplexity-lengths 512 4096 --tokens-per-document 16384 --passkey-lengths 512 4096 \
        --digits 5 --thresholds '{"perplexity_ratio": 1.05}'

Held-out documents must be long enough for the perplexity windows, and the passkey prompts must fit into
their lengths. Both depend on the tokenizer, so the config alone cannot tell. Nor can it tell the model's
original length, which thresholds refer to. The rule train runs this script first.
"""

import argparse
import json
from pathlib import Path

from longyarn.config import derived, thresholds
from longyarn.core import manifest
from longyarn.core.errors import program
from longyarn.evaluation import passkey_prompts, perplexity_protocols
from longyarn.models import loading
from longyarn.rope.record import RopeRecord


def main() -> None:
    arguments = parse_arguments()
    base = manifest.read(arguments.base)["facts"]
    tokens = manifest.read_facts(arguments.tokens)
    held_out = {document["id"]: document["tokens"] for document in tokens["held_out"]}
    rope = RopeRecord.read(arguments.rope)
    original = rope.original_max_position_embeddings
    target = arguments.target or rope.max_position_embeddings
    lengths = {
        "perplexity": derived.evaluation_lengths(arguments.perplexity_lengths, original, target),
        "passkey": derived.evaluation_lengths(arguments.passkey_lengths, original, target),
    }
    thresholds.check_lengths(
        arguments.thresholds, lengths, {"original": original, "target": target}
    )
    longest = max(lengths["perplexity"])
    perplexity_protocols.whole_windows(held_out, longest, arguments.tokens_per_document)
    tokenizer = loading.load_tokenizer(
        arguments.base.parent / base["directory"], base["trust_remote_code"]
    )
    haystack = passkey_prompts.read_haystack(tokenizer, arguments.haystack)
    for length in lengths["passkey"]:
        (needles,) = passkey_prompts.draw_needles(
            1, arguments.digits, 0, arguments.needles, length, 0.5
        )
        passkey_prompts.prompt(tokenizer, needles, length, 0.5, haystack)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="manifest of the base model")
    parser.add_argument("--rope", type=Path, required=True, help="manifest of the RoPE settings")
    parser.add_argument("--tokens", type=Path, required=True, help="manifest of the tokens")
    parser.add_argument(
        "--target", type=int, help="target length of the run; default: that of --rope"
    )
    parser.add_argument("--perplexity-lengths", type=int, nargs="+", help="default: derived")
    parser.add_argument("--tokens-per-document", type=int, required=True)
    parser.add_argument("--passkey-lengths", type=int, nargs="+", help="default: derived")
    parser.add_argument("--digits", type=int, required=True, help="digits of a key")
    parser.add_argument(
        "--thresholds", type=json.loads, required=True, help="config section `gate`, as JSON"
    )
    parser.add_argument("--needles", type=int, default=1, help="keys in a prompt")
    parser.add_argument(
        "--haystack", type=Path, help="text file that hides the keys; default: the filler"
    )
    return parser.parse_args()


if __name__ == "__main__":
    program(main)()
