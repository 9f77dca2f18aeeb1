"""Windows to train the micro base model on: passages of books, and exercises in retrieval."""

import itertools
from dataclasses import dataclass

import numpy as np

from longyarn.core.errors import UserError
from longyarn.evaluation import passkey_prompts

ANSWER_WEIGHT = 10.0  # of a key's token in the loss; a book's token weighs 1
REPEAT_WEIGHT = 2.0  # of a repeated token, random or of a passage
PLAIN_WEIGHT = 0.1  # of the template around the keys and of filler
BOOK_AROUND_WEIGHT = 0.3  # of a book's token around a key


@dataclass(frozen=True)
class Stage:
    """A part of the training: its steps, its windows and what they hold."""

    steps: int
    tokens: int  # in one step
    lengths: dict[int, float]  # of the windows, with their probabilities
    mixture: dict[str, float]  # kinds of windows, with their probabilities
    alphabet: tuple[int, int]  # smallest and largest alphabet of the repeated random sequences


STAGES = (
    Stage(
        220,
        8192,
        {128: 1.0},
        {"book": 0.4, "passkey": 0.05, "dense": 0.25, "repeat": 0.3},
        (16, 1700),
    ),
    Stage(
        150,
        8192,
        {128: 0.7, 256: 0.3},
        {"book": 0.4, "passkey": 0.2, "copy": 0.05, "dense": 0.2, "repeat": 0.15},
        (3, 64),
    ),
    Stage(
        730,
        8192,
        {128: 0.1, 256: 0.2, 512: 0.7},
        {"book": 0.62, "passkey": 0.24, "copy": 0.04, "dense": 0.05, "repeat": 0.05},
        (3, 64),
    ),
)


class Exercises:
    """Windows of books and of retrieval, each as tokens and their weights in the loss.

    A window of length L has L + 1 tokens, the last one only a target, so that the model never sees
    more than L positions. A method per kind; ``length`` counts its tokens.
    """

    def __init__(self, tokenizer, books: np.ndarray, seed: int) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        self.random = np.random.default_rng([seed, 1])
        self.books = books
        self.vocabulary = len(tokenizer)
        self.alphabet = (16, 64)
        self.bos = tokenizer.bos_token_id
        self.digits = [encode(str(digit))[0] for digit in range(10)]
        self.space = encode(" ")[0]
        self.prefix = encode(passkey_prompts.PREFIX)
        self.filler = encode(passkey_prompts.FILLER)
        self.question = encode(passkey_prompts.QUESTION)
        self.stop = encode(".\n")
        before, between, after = passkey_prompts.KEY_LINE.split("{key}")
        self.before, self.between, self.after = encode(before), encode(between), encode(after)
        sample = encode(passkey_prompts.KEY_LINE.format(key="907"))
        if sample != self.key_line([self.digits[9], self.digits[0], self.digits[7]])[0]:
            raise UserError("the tokenizer merges a digit of a key with what stands beside it")

    def batch(self, stage: Stage):
        """Return the tokens and weights of one step's windows, all of one length."""
        import torch

        self.alphabet = stage.alphabet
        length = int(self.random.choice(list(stage.lengths), p=list(stage.lengths.values())))
        kinds = self.random.choice(
            list(stage.mixture), size=stage.tokens // length, p=list(stage.mixture.values())
        )
        windows = [getattr(self, kind)(length + 1) for kind in kinds]
        tokens, weights = zip(*windows, strict=True)
        return torch.tensor(tokens), torch.tensor(weights)

    def book(self, length: int) -> tuple[list[int], list[float]]:
        """A passage of the books."""
        return self.passage(length), [1.0] * length

    def passkey(self, length: int) -> tuple[list[int], list[float]]:
        """One key in filler or in a book, asked for one to three times, the last at the end."""
        in_book = self.random.random() < 0.3
        key = self.key()
        line, asked = self.key_line(key), self.asked(key)
        head = [self.bos]
        if not in_book or self.random.random() < 0.3:
            head += self.prefix
        room = length - len(head) - len(line[0])
        questions = 1 if self.random.random() < 0.5 else int(self.random.integers(2, 4))
        questions = min(questions, room // len(asked[0]))
        room -= questions * len(asked[0])
        if in_book:
            unit, around = self.passage(room), BOOK_AROUND_WEIGHT
            cuts = np.sort(self.random.integers(0, room + 1, questions))
        else:
            lines = room // len(self.filler)
            unit, around = self.filler * lines, PLAIN_WEIGHT
            cuts = np.sort(self.random.integers(0, lines + 1, questions)) * len(self.filler)
        tokens, weights = list(head), [PLAIN_WEIGHT] * len(head)

        def add(piece: list[int], weight: list[float]) -> None:
            tokens.extend(piece)
            weights.extend(weight)

        ends = [int(cut) for cut in cuts] + [len(unit)]
        add(unit[: ends[0]], [around] * ends[0])
        add(*line)
        for start, end in itertools.pairwise(ends):
            add(unit[start:end], [around] * (end - start))
            add(*asked)
        left = length - len(tokens)
        add(self.plain(left), [0.0] * left)
        return tokens, weights

    def dense(self, length: int) -> tuple[list[int], list[float]]:
        """Key lines and questions in quick succession, a new key each time."""
        tokens: list[int] = []
        weights: list[float] = []
        if self.random.random() < 0.5:
            tokens, weights = [self.bos], [PLAIN_WEIGHT]
        while len(tokens) < length:
            key = self.key()
            pieces = [self.key_line(key, repeat_weight=ANSWER_WEIGHT)]
            for _ in range(int(self.random.integers(1, 3))):
                if self.random.random() < 0.5:
                    gap = self.gap(int(self.random.integers(1, 2 + length // 4)))
                    pieces.append((gap, [PLAIN_WEIGHT] * len(gap)))
                pieces.append(self.asked(key))
            for piece, weight in pieces:
                tokens += piece
                weights += weight
        return tokens[:length], weights[:length]

    def copy(self, length: int) -> tuple[list[int], list[float]]:
        """A sequence, then parts of it again, with filler or a book between."""
        size = int(self.random.integers(8, length // 2))
        kind = self.random.random()
        if kind < 0.35:
            source = self.random.choice(self.digits, size).tolist()
        elif kind < 0.5:
            few = self.random.integers(2, self.vocabulary, int(self.random.integers(4, 64)))
            source = self.random.choice(few, size).tolist()
        elif kind < 0.7:
            source = self.random.integers(2, self.vocabulary, size).tolist()
        else:
            source = self.passage(size)
        tokens = [self.bos] if self.random.random() < 0.5 else []
        tokens += self.gap(int(self.random.integers(0, length // 4)))
        weights = [PLAIN_WEIGHT] * len(tokens)
        tokens += source
        weights += [0.0] * size
        while len(tokens) < length:
            if self.random.random() < 0.8:
                gap = self.gap(int(self.random.integers(0, max(1, length - len(tokens) - 8))))
                tokens += gap
                weights += [PLAIN_WEIGHT] * len(gap)
            start = int(self.random.integers(0, max(1, size - 8)))
            end = int(self.random.integers(min(start + 8, size), size + 1))
            tokens += source[start:end]
            weights += ([0.0] * 3 + [REPEAT_WEIGHT] * (end - start))[: end - start]
        return tokens[:length], weights[:length]

    def repeat(self, length: int) -> tuple[list[int], list[float]]:
        """A random sequence over a random alphabet, or of digits, again and again."""
        low, high = self.alphabet
        if self.random.random() < (0.1 if low >= 16 else 0.5):
            alphabet = np.array(self.digits)
        else:
            size = int(low * (high / low) ** self.random.random())
            alphabet = self.random.choice(np.arange(2, self.vocabulary), size, replace=False)
        period = int(self.random.integers(4, length // 2))
        sequence = self.random.choice(alphabet, period).tolist()
        known = period + 3
        weights = [0.0] * known + [REPEAT_WEIGHT] * length
        return (sequence * (length // period + 1))[:length], weights[:length]

    def key(self) -> list[int]:
        """A random key of 3 to 8 digits, half of them of 3, the first one not 0."""
        size = 3 if self.random.random() < 0.5 else int(self.random.integers(3, 9))
        first, *rest = self.random.integers(0, 10, size)
        return [self.digits[first or self.random.integers(1, 10)]] + [self.digits[i] for i in rest]

    def key_line(
        self, key: list[int], repeat_weight: float = ANSWER_WEIGHT / 4
    ) -> tuple[list[int], list[float]]:
        """The line that gives a key, twice; only the second time can it be foreseen."""
        tokens = self.before + key + self.between + key + self.after
        weights = [PLAIN_WEIGHT] * len(self.before) + [0.0] * len(key)
        weights += [PLAIN_WEIGHT] * len(self.between) + [repeat_weight] * len(key)
        return tokens, weights + [PLAIN_WEIGHT] * len(self.after)

    def asked(self, key: list[int]) -> tuple[list[int], list[float]]:
        """The question, its answer and a full stop."""
        tokens = [*self.question, self.space, *key, *self.stop]
        weights = [PLAIN_WEIGHT] * len(self.question) + [ANSWER_WEIGHT / 2]
        weights += [ANSWER_WEIGHT] * len(key) + [ANSWER_WEIGHT / 4]
        return tokens, weights + [PLAIN_WEIGHT] * (len(self.stop) - 1)

    def gap(self, length: int) -> list[int]:
        """Something between: a passage of the books or filler."""
        return self.passage(length) if self.random.random() < 0.5 else self.plain(length)

    def passage(self, length: int) -> list[int]:
        """Tokens of the books from a random place."""
        start = int(self.random.integers(0, len(self.books) - length))
        return self.books[start : start + length].tolist()

    def plain(self, length: int) -> list[int]:
        """Filler, its last line cut short."""
        return (self.filler * (length // len(self.filler) + 1))[:length]
