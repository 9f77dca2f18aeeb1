"""Passkey retrieval of one variant over a grid of lengths and depths.

A key of random digits stands somewhere in repeated filler, and the model is asked for it
(Mohtashami & Jaggi, arXiv 2305.16300). Greedy decoding gives the key exactly when each of its tokens
is the arg-max given those before it, so one forward pass decides a trial.
"""

import argparse
import sys
import zlib
from pathlib import Path

import numpy as np

from longyarn import evaluation, manifest, models, statistics
from longyarn.cli import UserError, program, progress

PREFIX = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
KEY_LINE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
ANSWER = " {key}"

TOKENS_AT_ONCE = 16384  # tokens of prompts in one forward pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    evaluation.add_model_arguments(parser)
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="prompt lengths")
    parser.add_argument("--depths", type=float, nargs="+", required=True, help="0 start, 1 end")
    parser.add_argument("--trials", type=int, required=True, help="keys in each cell")
    parser.add_argument("--digits", type=int, required=True, help="digits of a key")
    parser.add_argument("--seed", type=int, required=True, help="seed of the keys")
    arguments = parser.parse_args()
    tokenizer = models.load_tokenizer(
        evaluation.model_directory(arguments),
        manifest.read_facts(arguments.model)["trust_remote_code"],
    )
    cells = [(length, depth) for length in arguments.lengths for depth in arguments.depths]
    prompts = {
        cell: [
            prompt(tokenizer, key, *cell)
            for key in draw_keys(arguments.trials, arguments.digits, arguments.seed, *cell)
        ]
        for cell in cells
    }
    model = evaluation.load(arguments)
    grid: dict[str, dict[str, dict]] = {}
    for length, depth in progress(cells, len(cells), f"passkey of {arguments.variant}"):
        found = [
            hit for batch in batches(prompts[length, depth]) for hit in retrieved(model, batch)
        ]
        low, high = statistics.wilson(sum(found), len(found))
        grid.setdefault(str(length), {})[f"{depth:g}"] = {
            "successes": sum(found),
            "trials": len(found),
            "low": low,
            "high": high,
        }
    evaluation.write(
        arguments,
        script=Path(__file__),
        settings={
            "lengths": arguments.lengths,
            "depths": arguments.depths,
            "trials": arguments.trials,
            "digits": arguments.digits,
            "seed": arguments.seed,
        },
        inputs={},
        facts={"grid": grid},
    )
    hits = {
        length: [sum(cell[key] for cell in cells.values()) for key in ("successes", "trials")]
        for length, cells in grid.items()
    }
    told = (f"{found} of {tried} at {length}" for length, (found, tried) in hits.items())
    print(f"passkey of {arguments.variant}: {', '.join(told)}", file=sys.stderr)


def draw_keys(trials: int, digits: int, seed: int, length: int, depth: float) -> list[str]:
    """Return a cell's keys: they depend on the cell, not on which other cells are asked for."""
    cell = zlib.crc32(f"{length}/{depth:g}".encode())
    generator = np.random.default_rng([seed, cell])
    first = generator.integers(1, 10, size=trials)
    rest = generator.integers(0, 10, size=(trials, digits - 1))
    return ["".join(map(str, [lead, *others])) for lead, others in zip(first, rest, strict=True)]


def prompt(tokenizer, key: str, length: int, depth: float) -> tuple[list[int], int]:
    """Return a trial's tokens, prompt and answer, and how many of the last ones are the answer.

    At most ``length`` tokens, with as many whole filler lines as fit; ``depth`` of them stand before
    the key line.
    """
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    start = start + encode(PREFIX)
    key_line, filler, question = encode(KEY_LINE.format(key=key)), encode(FILLER), encode(QUESTION)
    asked = encode(QUESTION + ANSWER.format(key=key))
    if asked[: len(question)] != question:
        raise UserError(
            f"this tokenizer merges the key {key} with the question before it, so the passkey trial "
            "cannot be scored"
        )
    lines = (length - len(start) - len(key_line) - len(asked)) // len(filler)
    if lines < 1:
        raise UserError(
            f"evaluation.passkey.lengths has {length}, too short for the question and a line of filler; "
            f"take at least {len(start) + len(key_line) + len(asked) + len(filler)}"
        )
    before = round(depth * lines)
    tokens = start + filler * before + key_line + filler * (lines - before) + asked
    return tokens, len(asked) - len(question)


def batches(prompts: list[tuple[list[int], int]]) -> list[list[tuple[list[int], int]]]:
    """Group a cell's prompts, in order, by equal length and answer, for one forward pass each."""
    groups: list[list] = []
    for item in sorted(prompts, key=lambda item: (len(item[0]), item[1])):
        last = groups[-1] if groups else None
        if (
            last
            and (len(last[0][0]), last[0][1]) == (len(item[0]), item[1])
            and (len(last) + 1) * len(item[0]) <= TOKENS_AT_ONCE
        ):
            last.append(item)
        else:
            groups.append([item])
    return groups


def retrieved(model, batch: list[tuple[list[int], int]]) -> list[bool]:
    """Return for each prompt whether greedy decoding would give the answer."""
    import torch

    answer = batch[0][1]
    tokens = torch.tensor([item[0] for item in batch]).to(model.device)
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=answer + 1).logits[:, :-1]
    return (logits.argmax(-1) == tokens[:, -answer:]).all(dim=1).tolist()


if __name__ == "__main__":
    program(main)()
