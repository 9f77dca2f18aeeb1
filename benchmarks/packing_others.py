"""Tokens per second of tokenise and pack against other libraries on the same text.

``trl``: `datasets.map` with the model's tokenizer, then TRL's `pack_dataset` with its best fit that splits
long documents, as ours does; against our best_fit. ``map``: the same tokens, joined and cut into sequences by
`datasets.map`, as in transformers' language-modeling examples; against our concat. Each goes from JSON Lines
on disk to sequences on disk, with two processes, including the import of its libraries. TRL is not one of
our requirements; it is installed below .cache/ for this benchmark.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import texts
from paths import ROOT, RUN

SIZE = 24_000_000  # characters
PROCESSES, ROUNDS = 2, 3
LENGTH = 4096
TRL = ROOT / ".cache/benchmarks/trl"
VERSION = "1.16.0"
STRATEGY = {"trl": "best_fit", "map": "concat"}


def other(kind: str, corpus: Path, output: Path) -> None:
    """Tokenise and pack a corpus with other libraries."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(RUN / "base")
    files = [str(path) for path in sorted((corpus.parent / "corpus").glob("*.jsonl"))]
    cache = str(output / "cache")
    data = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache)

    def tokenise(batch: dict) -> dict:
        found = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        return {"input_ids": [[begin, *tokens, end] for tokens in found]}

    def chunk(batch: dict) -> dict:
        joined = list(itertools.chain.from_iterable(batch["input_ids"]))
        whole = len(joined) // LENGTH * LENGTH
        return {"input_ids": [joined[i : i + LENGTH] for i in range(0, whole, LENGTH)]}

    options = {"batched": True, "num_proc": PROCESSES}
    data = data.map(tokenise, remove_columns=data.column_names, batch_size=100, **options)
    if kind == "trl":
        sys.path.append(str(TRL))
        from trl import pack_dataset

        data = pack_dataset(data, LENGTH, "bfd_split", {"num_proc": PROCESSES})
    else:
        data = data.map(chunk, **options)
    data.save_to_disk(str(output / "packed"))


def install() -> None:
    """Install TRL without its dependencies; those that this benchmark uses are there already."""
    if not (TRL / "trl").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", TRL]
        subprocess.run([*map(str, pip), f"trl=={VERSION}"], check=True)


def seconds(commands: list[list[str]]) -> float:
    """Return the wall time in seconds of commands that run one after the other."""
    began = time.perf_counter()
    for command in commands:
        subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def measure(kind: str) -> dict:
    """Return the median tokens per second of both sides, measured in turn, and of their ratio."""
    if kind == "trl":
        install()
    pairs = []
    with tempfile.TemporaryDirectory() as directory:
        corpus = texts.write_corpus(Path(directory), SIZE)
        for number in range(ROUNDS):
            ours = seconds(texts.stages(corpus, PROCESSES, STRATEGY[kind]))
            output = Path(directory) / f"other-{number}"
            command = [sys.executable, __file__, kind, str(corpus), str(output)]
            pairs.append((ours, seconds([command])))
        tokens = texts.tokens_of(corpus)
    return {
        "ours": statistics.median(tokens / a for a, _ in pairs),
        "other": statistics.median(tokens / b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        other(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        print(json.dumps({kind: measure(kind) for kind in STRATEGY}))
