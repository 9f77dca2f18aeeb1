"""Tokens per second of tokenise and pack together, against the bare tokenizer's ``encode_batch``.

The stages are timed as a whole, from text on disk to packed sequences on disk, including Python's start and
all checks. For the tokenizer only the calls are timed, on text in memory, with as many threads.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import texts
from paths import RUN

SIZE = 96_000_000  # characters
THREADS, ROUNDS = 2, 3
AT_ONCE = 256  # documents per call, about 20 MB; all of them would take gigabytes


def encode_batch(corpus: Path) -> None:
    """Print the number of tokens of a corpus and the seconds that encode_batch takes for it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(RUN / "base/tokenizer.json"))
    tokens, seconds, found = 0, 0.0, texts.texts_of(corpus)
    while batch := list(itertools.islice(found, AT_ONCE)):
        began = time.perf_counter()
        encoded = tokenizer.encode_batch(batch, add_special_tokens=False)
        seconds += time.perf_counter() - began
        tokens += sum(len(one) for one in encoded)
    print(json.dumps([tokens, seconds]))


def bare(corpus: Path) -> float:
    """Return the tokens per second of ``encode_batch``."""
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(THREADS),
    }  # fmt: skip
    command = [sys.executable, __file__, str(corpus)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    tokens, seconds = json.loads(done.stdout)
    return tokens / seconds


def ours(corpus: Path) -> float:
    """Return the tokens per second of the two stages."""
    began = time.perf_counter()
    for command in texts.stages(corpus, THREADS):
        subprocess.run(command, check=True, capture_output=True)
    return texts.tokens_of(corpus) / (time.perf_counter() - began)


def measure() -> dict:
    """Return the median tokens per second of both sides, measured in turn, and of their ratio."""
    with tempfile.TemporaryDirectory() as directory:
        corpus = texts.write_corpus(Path(directory), SIZE)
        pairs = [(ours(corpus), bare(corpus)) for _ in range(ROUNDS)]
    return {
        "ours": statistics.median(a for a, _ in pairs),
        "other": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        encode_batch(Path(sys.argv[1]))
    else:
        print(json.dumps(measure()))
