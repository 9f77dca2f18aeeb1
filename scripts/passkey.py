"""Measure passkey retrieval of one variant over a grid of prompt lengths and depths.

    python scripts/passkey.py --variant trained --model results/micro/merged.json \
        --base results/micro/base.json --rope results/micro/rope/yarn.json \
        --precision bf16 --attention sdpa --threads 2 --lengths 512 4096 --depths 0.1 0.5 0.9 \
        --trials 10 --digits 5 --seed 0 --manifest results/micro/passkey/trained.json

The result is the manifest's facts. longyarn/evaluation/passkey_prompts.py makes the prompts.
"""

import argparse
import sys
from pathlib import Path

from longyarn.core import manifest
from longyarn.core.console import progress
from longyarn.core.errors import program
from longyarn.evaluation import intervals, passkey_prompts, shared_prefixes, variant_model
from longyarn.models import loading


def main() -> None:
    arguments = parse_arguments()
    arguments.lengths = variant_model.lengths(arguments, arguments.lengths)
    tokenizer = loading.load_tokenizer(
        variant_model.model_directory(arguments),
        manifest.read_facts(arguments.model)["trust_remote_code"],
    )
    haystack = passkey_prompts.read_haystack(tokenizer, arguments.haystack)
    text_tokens = sum(map(len, haystack)) if arguments.haystack else None
    if text_tokens and text_tokens < max(arguments.lengths):
        print(f"passkey: the text has {text_tokens} tokens, so it is repeated", file=sys.stderr)
    prompts = make_prompts(arguments, tokenizer, haystack)
    grid = measure(variant_model.load(arguments), prompts, arguments.variant)
    variant_model.write(
        arguments,
        script=Path(__file__),
        settings={
            "lengths": arguments.lengths,
            "depths": arguments.depths,
            "trials": arguments.trials,
            "digits": arguments.digits,
            "seed": arguments.seed,
            "needles": arguments.needles,
            "haystack": arguments.haystack and arguments.haystack.name,
        },
        inputs={"haystack": arguments.haystack} if arguments.haystack else {},
        facts={"grid": grid, "haystack_tokens": text_tokens},
    )
    hits = {
        length: [sum(cell[key] for cell in cells.values()) for key in ("successes", "trials")]
        for length, cells in grid.items()
    }
    told = (f"{found} of {tried} at {length}" for length, (found, tried) in hits.items())
    print(f"passkey of {arguments.variant}: {', '.join(told)}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    variant_model.add_model_arguments(parser)
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt lengths in tokens")
    variant_model.add_length_arguments(parser)
    parser.add_argument(
        "--depths", type=float, nargs="+", required=True, help="places of the key: 0 start, 1 end"
    )
    parser.add_argument("--trials", type=int, required=True, help="trials of each length and depth")
    parser.add_argument("--digits", type=int, required=True, help="digits of a key")
    parser.add_argument("--seed", type=int, required=True, help="seed of the keys")
    parser.add_argument("--needles", type=int, default=1, help="keys in a prompt; one is asked for")
    parser.add_argument(
        "--haystack", type=Path, help="text file that hides the keys; default: the filler"
    )
    return parser.parse_args()


def make_prompts(arguments: argparse.Namespace, tokenizer, haystack: list[list[int]]) -> dict:
    """Return the prompts of each cell, a pair of length and depth."""
    how = (arguments.trials, arguments.digits, arguments.seed, arguments.needles)
    cells = [(length, depth) for length in arguments.lengths for depth in arguments.depths]
    return {
        cell: [
            passkey_prompts.prompt(tokenizer, needles, *cell, haystack)
            for needles in passkey_prompts.draw_needles(*how, *cell)
        ]
        for cell in cells
    }


def measure(model, prompts: dict[tuple, list], variant: str) -> dict[str, dict[str, dict]]:
    """Return successes, trials and the 95 % interval of their rate, by length and depth."""
    reader = shared_prefixes.Reader(model)
    if reader.obstacle:
        print(f"passkey: each prompt is read from its start: {reader.obstacle}", file=sys.stderr)
    found: dict[tuple, list[bool]] = {cell: [] for cell in prompts}
    work = passkey_prompts.in_order(prompts)
    for cell, batch in progress(work, len(work), f"passkey of {variant}"):
        found[cell] += passkey_prompts.retrieved(reader, batch)
    grid: dict[str, dict[str, dict]] = {}
    for (length, depth), hits in found.items():
        low, high = intervals.wilson(sum(hits), len(hits))
        grid.setdefault(str(length), {})[f"{depth:g}"] = {
            "successes": sum(hits),
            "trials": len(hits),
            "low": low,
            "high": high,
        }
    return grid


if __name__ == "__main__":
    program(main)()
