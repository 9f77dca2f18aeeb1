"""Passkey retrieval of one variant over a grid of lengths and depths.

A key of random digits stands somewhere in repeated filler, and the model is asked for it
(Mohtashami & Jaggi, arXiv 2305.16300). Greedy decoding gives the key exactly when each of its tokens
is the arg-max given those before it, so reading prompt and key once decides a trial.
"""

import argparse
import itertools
import re
import sys
import zlib
from pathlib import Path

import numpy as np

from longyarn.core import manifest
from longyarn.core.console import progress
from longyarn.core.errors import UserError, first_line, program
from longyarn.evaluation import intervals, shared_prefixes, variant_model
from longyarn.models import loading

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
# The same with several keys, each of them of a name.
NAMED_LINE = "The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}.\n"
NAMED_QUESTION = "What is the pass key of {name}? The pass key of {name} is"
NAMES = ("oak", "elm", "ash", "fir", "pine", "birch", "cedar", "larch", "maple", "willow")
# The end of a line or of a sentence.
END = re.compile(r"\n+|(?<=[.!?])[\"')\]”’]*[ \t]+|(?<=[。！？])")

LONGEST_LINE = 64  # tokens of a text's line that are not parted
TOKENS_AT_ONCE = 16384  # tokens of prompts that are read together; one prompt may be longer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    variant_model.add_model_arguments(parser)
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="prompt lengths")
    parser.add_argument("--depths", type=float, nargs="+", required=True, help="0 start, 1 end")
    parser.add_argument("--trials", type=int, required=True, help="keys in each cell")
    parser.add_argument("--digits", type=int, required=True, help="digits of a key")
    parser.add_argument("--seed", type=int, required=True, help="seed of the keys")
    parser.add_argument("--needles", type=int, default=1, help="keys in a prompt, one asked for")
    parser.add_argument("--haystack", type=Path, help="text that hides them; default: the filler")
    arguments = parser.parse_args()
    tokenizer = loading.load_tokenizer(
        variant_model.model_directory(arguments),
        manifest.read_facts(arguments.model)["trust_remote_code"],
    )
    haystack = read_haystack(tokenizer, arguments.haystack)
    text_tokens = sum(map(len, haystack)) if arguments.haystack else None
    if text_tokens and text_tokens < max(arguments.lengths):
        print(f"passkey: the text has {text_tokens} tokens, so it is repeated", file=sys.stderr)
    cells = [(length, depth) for length in arguments.lengths for depth in arguments.depths]
    how = (arguments.trials, arguments.digits, arguments.seed, arguments.needles)
    prompts = {
        cell: [prompt(tokenizer, needles, *cell, haystack) for needles in draw_needles(*how, *cell)]
        for cell in cells
    }
    reader = shared_prefixes.Reader(variant_model.load(arguments))
    if reader.obstacle:
        print(f"passkey: each prompt is read whole: {reader.obstacle}", file=sys.stderr)
    found: dict[tuple, list[bool]] = {cell: [] for cell in cells}
    work = in_order(prompts)
    for cell, batch in progress(work, len(work), f"passkey of {arguments.variant}"):
        found[cell] += retrieved(reader, batch)
    grid: dict[str, dict[str, dict]] = {}
    for (length, depth), hits in found.items():
        low, high = intervals.wilson(sum(hits), len(hits))
        grid.setdefault(str(length), {})[f"{depth:g}"] = {
            "successes": sum(hits),
            "trials": len(hits),
            "low": low,
            "high": high,
        }
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


def draw_keys(trials: int, digits: int, seed: int, length: int, depth: float) -> list[str]:
    """Return a cell's keys: they depend on the cell, not on which other cells are asked for."""
    cell = zlib.crc32(f"{length}/{depth:g}".encode())
    return random_keys(np.random.default_rng([seed, cell]), trials, digits)


def random_keys(generator: np.random.Generator, count: int, digits: int) -> list[str]:
    """Return random keys, the first digit not 0."""
    first = generator.integers(1, 10, size=count)
    rest = generator.integers(0, 10, size=(count, digits - 1))
    return ["".join(map(str, [lead, *others])) for lead, others in zip(first, rest, strict=True)]


def draw_needles(
    trials: int, digits: int, seed: int, count: int, length: int, depth: float
) -> list[dict[str, str]]:
    """Return each trial's keys by name, the one asked for first; a key that is alone has no name.

    The keys asked for are the same with any number of others.
    """
    asked = draw_keys(trials, digits, seed, length, depth)
    if count == 1:
        return [{"": key} for key in asked]
    generator = np.random.default_rng([seed, zlib.crc32(f"{length}/{depth:g}/names".encode())])
    found = []
    for key in asked:
        names = [NAMES[number] for number in generator.permutation(len(NAMES))[:count]]
        others = random_keys(generator, count - 1, digits)
        found.append(dict(zip(names, [key, *others], strict=True)))
    return found


def read_haystack(tokenizer, path: Path | None) -> list[list[int]]:
    """Return the tokens of a text, line by line and sentence by sentence; of the filler without one."""
    if path is None:
        return [tokenizer(FILLER, add_special_tokens=False)["input_ids"]]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"evaluation.passkey.haystack {path} cannot be read as a text in UTF-8 "
            f"({first_line(error)}); mend the path or the file"
        ) from None
    ends = [0, *(match.end() for match in END.finditer(text)), len(text)]
    lines = [text[begin:end] for begin, end in itertools.pairwise(ends) if begin < end]
    if not text.strip():
        raise UserError(f"evaluation.passkey.haystack {path} is empty; name a file with a text")
    encoded = (tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines)
    # Prompts hold whole lines, so a text without breaks is cut, or little of it would fit.
    return [
        tokens[begin : begin + LONGEST_LINE]
        for tokens in encoded
        for begin in range(0, len(tokens), LONGEST_LINE)
    ]


def prompt(
    tokenizer, needles: dict[str, str], length: int, depth: float, haystack: list[list[int]]
) -> tuple[list[int], int]:
    """Return a trial's tokens, prompt and answer, and how many of the last ones are the answer.

    At most ``length`` tokens, with as many whole lines of the haystack as fit; it begins again where it
    is too short. ``depth`` of the lines stand before the line with the first of the ``needles``, which is
    asked for; the others are spread evenly.
    """
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    start = start + encode(PREFIX)
    name, key = next(iter(needles.items()))
    line, query = (NAMED_LINE, NAMED_QUESTION) if name else (KEY_LINE, QUESTION)
    key_lines = [encode(line.format(name=one, key=hidden)) for one, hidden in needles.items()]
    question = encode(query.format(name=name))
    asked = encode(query.format(name=name) + ANSWER.format(key=key))
    if asked[: len(question)] != question:
        raise UserError(
            f"this tokenizer merges the key {key} with the question before it, so the passkey trial "
            "cannot be scored"
        )
    least = len(start) + sum(map(len, key_lines)) + len(asked)
    lines = fitting(haystack, length - least)
    if not lines:
        hidden = "the question" if len(needles) == 1 else f"{len(needles)} keys, the question"
        raise UserError(
            f"evaluation.passkey.lengths has {length}, too short for {hidden} and a line of filler; "
            f"take at least {least + len(haystack[0])}"
        )
    # How many lines stand before each needle.
    spread = [(number + 0.5) / (len(needles) - 1) for number in range(len(needles) - 1)]
    places = [round(share * len(lines)) for share in (depth, *spread)]
    for place, key_line in sorted(zip(places, key_lines, strict=True), key=lambda one: -one[0]):
        lines.insert(place, key_line)
    return [*start, *itertools.chain.from_iterable(lines), *asked], len(asked) - len(question)


def fitting(haystack: list[list[int]], room: int) -> list[list[int]]:
    """Return the lines of a haystack that fit into ``room`` tokens, from its start, over and over."""
    found = []
    for line in itertools.cycle(haystack):
        room -= len(line)
        if room < 0:
            return found
        found.append(line)


def in_order(prompts: dict[tuple, list[tuple[list[int], int]]]) -> list[tuple[tuple, list]]:
    """Return each batch with its cell, those that begin alike beside each other.

    In the order of their tokens, what several prompts share is read once
    (longyarn/evaluation/shared_prefixes.py): the trials of a cell share all that stands before the key, and
    the same filler begins the cells of every length.
    """
    found = [(cell, batch) for cell, trials in prompts.items() for batch in batches(trials)]
    return sorted(found, key=lambda entry: entry[1][0][0])


def batches(prompts: list[tuple[list[int], int]]) -> list[list[tuple[list[int], int]]]:
    """Group a cell's prompts, in order, by equal length and answer, to be read together.

    A group has at most TOKENS_AT_ONCE tokens, with the beginning that it shares once more.
    """
    groups: list[list] = []
    for item in sorted(prompts, key=lambda item: (len(item[0]), item[1])):
        last = groups[-1] if groups else None
        if (
            last
            and (len(last[0][0]), last[0][1]) == (len(item[0]), item[1])
            and (len(last) + 2) * len(item[0]) <= TOKENS_AT_ONCE
        ):
            last.append(item)
        else:
            groups.append([item])
    return groups


def retrieved(reader: shared_prefixes.Reader, batch: list[tuple[list[int], int]]) -> list[bool]:
    """Return for each prompt whether greedy decoding would give the answer."""
    import torch

    answer = batch[0][1]
    logits = reader.logits([tokens for tokens, _ in batch], answer + 1)[:, :-1]
    wanted = torch.tensor([tokens[-answer:] for tokens, _ in batch], device=logits.device)
    return (logits.argmax(-1) == wanted).all(dim=1).tolist()


if __name__ == "__main__":
    program(main)()
