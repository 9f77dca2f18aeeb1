"""Passkey prompts: random keys hidden in a text, and whether a model retrieves them.

The model reads a long text with a key of random digits somewhere in it, and is asked for the key
(Mohtashami & Jaggi, arXiv 2305.16300).
"""

import itertools
import re
import zlib
from pathlib import Path

import numpy as np

from longyarn.core.errors import UserError, first_line
from longyarn.evaluation import shared_prefixes

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
# With several keys, each key has a name.
NAMED_LINE = "The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}.\n"
NAMED_QUESTION = "What is the pass key of {name}? The pass key of {name} is"
NAMES = ("oak", "elm", "ash", "fir", "pine", "birch", "cedar", "larch", "maple", "willow")
# The end of a line or of a sentence.
END = re.compile(r"\n+|(?<=[.!?])[\"')\]”’]*[ \t]+|(?<=[。！？])")

LONGEST_LINE = 64  # tokens; longer lines of a haystack are split
TOKENS_AT_ONCE = 16384  # tokens of prompts in one batch; a single prompt may be longer


def draw_keys(trials: int, digits: int, seed: int, length: int, depth: float) -> list[str]:
    """Return a cell's keys. They do not depend on which other cells are evaluated."""
    cell = zlib.crc32(f"{length}/{depth:g}".encode())
    return random_keys(np.random.default_rng([seed, cell]), trials, digits)


def random_keys(generator: np.random.Generator, count: int, digits: int) -> list[str]:
    """Return random keys whose first digit is not 0."""
    first = generator.integers(1, 10, size=count)
    rest = generator.integers(0, 10, size=(count, digits - 1))
    return ["".join(map(str, [lead, *others])) for lead, others in zip(first, rest, strict=True)]


def draw_needles(
    trials: int, digits: int, seed: int, count: int, length: int, depth: float
) -> list[dict[str, str]]:
    """Return the ``count`` keys of each trial by name; the first one is asked for.

    A single key has the empty name. The keys asked for do not depend on ``count``.
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
    """Return the tokens of each line and sentence of a text file, or of the filler if there is no path.

    Raise ``UserError`` if the file cannot be read or is empty.
    """
    if path is None:
        return [tokenizer(FILLER, add_special_tokens=False)["input_ids"]]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"evaluation.passkey.haystack {path} cannot be read as UTF-8 text "
            f"({first_line(error)}); correct the path or the file"
        ) from None
    ends = [0, *(match.end() for match in END.finditer(text)), len(text)]
    lines = [text[begin:end] for begin, end in itertools.pairwise(ends) if begin < end]
    if not text.strip():
        raise UserError(
            f"evaluation.passkey.haystack {path} is empty; name a file that contains text"
        )
    encoded = (tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines)
    # A prompt holds whole lines only. A text without line breaks is split, so that it fills the prompt.
    return [
        tokens[begin : begin + LONGEST_LINE]
        for tokens in encoded
        for begin in range(0, len(tokens), LONGEST_LINE)
    ]


def prompt(
    tokenizer, needles: dict[str, str], length: int, depth: float, haystack: list[list[int]]
) -> tuple[list[int], int]:
    """Return the tokens of a trial, prompt and answer, and how many of the last tokens are the answer.

    There are at most ``length`` tokens, with as many whole lines of the haystack as fit; a haystack that
    is too short is repeated. The share ``depth`` of the lines stands before the first of the ``needles``,
    the one that is asked for; the other needles are spread evenly. Raise ``UserError`` if the needles do
    not fit into ``length``.
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
            f"the tokenizer merges the key {key} with the question before it, so the passkey evaluation "
            "cannot score this model"
        )
    least = len(start) + sum(map(len, key_lines)) + len(asked)
    lines = fitting(haystack, length - least)
    if not lines:
        hidden = "the question" if len(needles) == 1 else f"{len(needles)} keys, the question"
        raise UserError(
            f"evaluation.passkey.lengths has {length}, too short for {hidden} and a line of filler; "
            f"use at least {least + len(haystack[0])}"
        )
    # How many lines stand before each needle.
    spread = [(number + 0.5) / (len(needles) - 1) for number in range(len(needles) - 1)]
    places = [round(share * len(lines)) for share in (depth, *spread)]
    for place, key_line in sorted(zip(places, key_lines, strict=True), key=lambda one: -one[0]):
        lines.insert(place, key_line)
    return [*start, *itertools.chain.from_iterable(lines), *asked], len(asked) - len(question)


def fitting(haystack: list[list[int]], room: int) -> list[list[int]]:
    """Return the lines of the repeated haystack, from its start, that fit into ``room`` tokens."""
    found = []
    for line in itertools.cycle(haystack):
        room -= len(line)
        if room < 0:
            return found
        found.append(line)


def in_order(prompts: dict[tuple, list[tuple[list[int], int]]]) -> list[tuple[tuple, list]]:
    """Return each batch with its cell, sorted by tokens, so that equal beginnings are neighbors.

    ``shared_prefixes`` then reads each shared beginning once. The trials of a cell share all that stands
    before the key, and the prompts of all lengths begin with the same filler.
    """
    found = [(cell, batch) for cell, trials in prompts.items() for batch in batches(trials)]
    return sorted(found, key=lambda entry: entry[1][0][0])


def batches(prompts: list[tuple[list[int], int]]) -> list[list[tuple[list[int], int]]]:
    """Group a cell's prompts, in order, by equal lengths of prompt and answer.

    A group has at most TOKENS_AT_ONCE tokens, where the shared beginning counts once more.
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
    """Return for each prompt of a batch whether greedy decoding gives the answer.

    It does exactly when each token of the answer is the arg-max, given the tokens before it. So one
    forward pass over prompt and answer decides a trial.
    """
    import torch

    answer = batch[0][1]
    logits = reader.logits([tokens for tokens, _ in batch], answer + 1)[:, :-1]
    wanted = torch.tensor([tokens[-answer:] for tokens, _ in batch], device=logits.device)
    return (logits.argmax(-1) == wanted).all(dim=1).tolist()
