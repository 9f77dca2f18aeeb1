"""Tokens per second of the training stage against LLaMA-Factory's trainer, on the inputs of the default run.

Both train the same patched base on the same token ids in the same order, with the same adapter, batch,
precision, schedule and threads. LLaMA-Factory's pre-training lets the documents of a sequence see one
another, while ours hides them. A run without masks checks that both learn the same. LLaMA-Factory needs
older libraries, so it gets its own environment below .cache/, with the same torch, made if it is missing.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import small_runs
import training_speed
from paths import ROOT, RUN
from safetensors.numpy import load_file

ENVIRONMENT = ROOT / ".cache" / "benchmarks" / "llamafactory"
VERSION = "0.9.5"
UNTIMED = 2 * training_speed.WARM  # sequences of the untimed first steps, two per step


class NotInstalled(Exception):
    """LLaMA-Factory cannot be installed here; the message says why."""


def environment() -> Path:
    """Return the Python of LLaMA-Factory's environment, which is made if it is missing."""
    python = ENVIRONMENT / "bin" / "python"
    if (ENVIRONMENT / "whole").is_file():
        return python
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    install = [python, "-m", "pip", "install", "--quiet"]
    commands = [
        [sys.executable, "-m", "venv", ENVIRONMENT],
        [*install, "-r", ROOT / "envs/torch.txt"],
        [*install, "-r", ROOT / "benchmarks/llamafactory.txt"],
        [*install, "--no-deps", f"llamafactory=={VERSION}"],
    ]
    for command in commands:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise NotInstalled(done.stderr.strip().splitlines()[-1])
    # LLaMA-Factory imports torchaudio, which it needs only for audio and which some builds of torch lack.
    packages = next(ENVIRONMENT.glob("lib/python*/site-packages"))
    (packages / "torchaudio.py").write_text("", encoding="utf-8")
    (ENVIRONMENT / "whole").touch()
    return python


def prepare(directory: Path) -> None:
    """Write the model, the token ids for LLaMA-Factory, and our inputs with and without masks."""
    shutil.copytree(RUN / "base", directory / "model")
    shutil.copyfile(RUN / "rope/yarn/config.json", directory / "model/config.json")
    # Their collator ignores the padding token as a label, and the base's is its end of document.
    tokenizer = directory / "model/tokenizer_config.json"
    words = json.loads(tokenizer.read_text(encoding="utf-8")) | {"pad_token": "<pad>"}
    tokenizer.write_text(json.dumps(words), encoding="utf-8")
    ids, pieces = sequences()
    for name, masks in (("masked", True), ("unmasked", False)):
        (directory / name).mkdir()
        small_runs.write_pieces(directory / name, ids, pieces, masks)
        for part in ("base.json", "base", "rope"):
            (directory / name / part).symlink_to(RUN / part)
    (directory / "ids.json").write_text(json.dumps(ids.tolist()), encoding="utf-8")


def sequences() -> tuple[np.ndarray, list[list[int]]]:
    """Return sequences of the default run and the lengths of their pieces.

    A fifth of the timed sequences hold short documents, as in the default's whole pack.
    """
    pack = json.loads((RUN / "pack.json").read_text(encoding="utf-8"))
    stored = load_file(RUN / next(iter(pack["files"])))
    pieces = np.split(stored["piece_lengths"], stored["piece_offsets"][1:-1])
    long = [row for row, lengths in enumerate(pieces) if len(lengths) == 1]
    short = [row for row, lengths in enumerate(pieces) if len(lengths) > 1]
    rows = [
        short.pop(0) if number >= UNTIMED and number % 5 == 4 else long.pop(0)
        for number in range(2 * training_speed.STEPS)
    ]
    return stored["input_ids"][rows].astype("int32"), [pieces[row].tolist() for row in rows]


TO_DATASET = """
import json, sys, datasets
ids = json.load(open(sys.argv[1]))
rows = datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(r) for r in ids]})
datasets.DatasetDict({"train": rows}).save_to_disk(sys.argv[2])
"""
TRAIN = """
import sys, torch
torch.set_num_threads(int(sys.argv[2]))
from llamafactory.train.tuner import run_exp
import json
run_exp(json.load(open(sys.argv[1])))
"""
THEIR_LINE = r"\{'loss': '?([0-9.]+)"


def theirs(directory: Path, training: dict, output: str) -> dict:
    """Return LLaMA-Factory's arguments for the same training."""
    lora = training["lora"]
    return {
        "model_name_or_path": str(directory / "model"),
        "stage": "pt",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "lora_target": "all",
        "dataset": "unused",  # required, but only tokenized_path is read
        "tokenized_path": str(directory / "dataset"),
        "disable_shuffling": True,
        "output_dir": str(directory / output),
        "per_device_train_batch_size": training["micro_batch_size"],
        "gradient_accumulation_steps": training["batch_size"] // training["micro_batch_size"],
        "learning_rate": training["learning_rate"],
        "lr_scheduler_type": training["scheduler"],
        "warmup_steps": training["warmup_steps"],
        "weight_decay": training["weight_decay"],
        "adam_beta2": training["adam_beta2"],
        "max_grad_norm": training["max_grad_norm"],
        "max_steps": training["steps"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": True,
        "use_cpu": True,
        "seed": training["seed"],
        "disable_tqdm": True,
    }


def measure() -> dict:
    """Return the median tokens a second of both and of their ratio, from runs in turn."""
    python, training = environment(), training_speed.settings()
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(directory)
        subprocess.run(
            [python, "-c", TO_DATASET, directory / "ids.json", directory / "dataset"],
            check=True, capture_output=True,
        )  # fmt: skip
        unmasked = small_runs.train_command(
            directory / "unmasked", directory / "checked", training, rope="rope/yarn.json"
        )
        for number in range(training_speed.ROUNDS):
            stage = small_runs.train_command(
                directory / "masked", directory / f"ours-{number}", training, rope="rope/yarn.json"
            )
            settings = directory / f"theirs-{number}.json"
            arguments = theirs(directory, training, f"theirs-{number}")
            settings.write_text(json.dumps(arguments), encoding="utf-8")
            other_side = [python, "-P", "-u", "-c", TRAIN, settings, training["threads"]]
            ours, _ = training_speed.steps(stage)
            other, losses = training_speed.steps(other_side, THEIR_LINE)
            pairs.append((ours, other))
        check_same(training_speed.steps(unmasked)[1], losses)
    return training_speed.rates(pairs, training["batch_size"])


def check_same(ours: list[float], others: list[float]) -> None:
    """Stop unless both sides learn the same where neither masks documents.

    They divide a loss by all tokens, we by those that have one before them.
    """
    length = json.loads((RUN / "pack.json").read_text())["facts"]["sequence_length"]
    if any(abs(a * (1 - 1 / length) - b) > 1e-3 for a, b in zip(ours, others, strict=True)):
        raise SystemExit(f"error: losses differ: {ours} against {others}")


if __name__ == "__main__":
    print(json.dumps(measure()))
