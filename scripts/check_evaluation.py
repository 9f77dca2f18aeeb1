"""Make sure, before training, that every evaluation asked for can be done after it.

Held-out documents must be long enough for the perplexity windows, and the passkey prompt must fit its
lengths: both depend on the tokenizer, so the config alone cannot tell. Nor can it tell the model's
original length, which thresholds are about. The rule train runs this first.
"""

import argparse
import json
from pathlib import Path

import passkey
import perplexity
from longyarn.config import thresholds
from longyarn.core import manifest
from longyarn.core.errors import program
from longyarn.models import loading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="manifest of the base model")
    parser.add_argument("--rope", type=Path, required=True, help="manifest of the RoPE settings")
    parser.add_argument("--tokens", type=Path, required=True, help="manifest of the tokens")
    parser.add_argument("--perplexity-lengths", type=int, nargs="+", required=True)
    parser.add_argument("--tokens-per-document", type=int, required=True)
    parser.add_argument("--passkey-lengths", type=int, nargs="+", required=True)
    parser.add_argument("--digits", type=int, required=True, help="digits of a key")
    parser.add_argument(
        "--thresholds", type=json.loads, required=True, help="config section `gate`, as JSON"
    )
    parser.add_argument("--needles", type=int, default=1, help="keys in a prompt")
    parser.add_argument("--haystack", type=Path, help="text that hides them; default: the filler")
    arguments = parser.parse_args()

    base = manifest.read(arguments.base)["facts"]
    tokens = manifest.read_facts(arguments.tokens)
    held_out = {document["id"]: document["tokens"] for document in tokens["held_out"]}
    rope = manifest.read_facts(arguments.rope)
    thresholds.check_lengths(
        arguments.thresholds,
        {"perplexity": arguments.perplexity_lengths, "passkey": arguments.passkey_lengths},
        {
            "original": rope["original_max_position_embeddings"],
            "target": rope["max_position_embeddings"],
        },
    )
    longest = max(arguments.perplexity_lengths)
    perplexity.whole_windows(held_out, longest, arguments.tokens_per_document)
    tokenizer = loading.load_tokenizer(
        arguments.base.parent / base["directory"], base["trust_remote_code"]
    )
    haystack = passkey.read_haystack(tokenizer, arguments.haystack)
    for length in arguments.passkey_lengths:
        (needles,) = passkey.draw_needles(1, arguments.digits, 0, arguments.needles, length, 0.5)
        passkey.prompt(tokenizer, needles, length, 0.5, haystack)


if __name__ == "__main__":
    program(main)()
