"""Train the micro base model: a Llama of about a million parameters with a window of 512 tokens.

    make micro-base

It reads books without the held-out ones, and synthetic retrieval exercises that fit in 512 tokens. Within
512 tokens the model is a fair language model and finds a passkey; beyond, it fails at both. So an extension
of its context can be tested from end to end on two CPU cores.

Two choices make so small a model retrieve after so few steps: the windows start at 128 tokens and grow to
512, and Muon trains the matrices.
"""

import argparse
import itertools
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "scripts"))

from exercises import ANSWER_WEIGHT, STAGES, Exercises

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

REPORT_EVERY = 20
PROBE_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
PROBE_LENGTHS = (128, 256, 512)
PROBE_TRIALS = 40
PROBE_DIGITS = (3, 5)
PROBE_SEED = 20_000


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
    """Return the model card, its with the numbers of this run."""
    measured = record["measured"]
    rows = "\n".join(
        f"| passkey of {digits} digits, {length} tokens | {cell['successes']} of {cell['trials']} |"
        for digits, cells in measured["passkey"].items()
        for length, cell in cells.items()
    )
    perplexities = measured["held_out_perplexity"]
    steps = sum(stage["steps"] for stage in record["stages"])
    seen = sum(stage["steps"] * stage["tokens"] for stage in record["stages"])
    return (
        (HERE / "card.md")
        .read_text(encoding="utf-8")
        .format(
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
    )


if __name__ == "__main__":
    main()
