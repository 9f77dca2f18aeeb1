"""Peak memory of tokenise and pack, all processes together, at 0.1 and 1 GB of text.

    python benchmarks/packing_memory.py 0.1 1

It samples Linux's proportional set size, which divides shared memory among the processes that share it.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import texts
from paths import ROOT

SIZES = (100_000_000, 1_000_000_000)  # characters
WORKERS = 2
INTERVAL = 0.2  # seconds between samples


def peak(command: list[str]) -> int:
    """Return the peak bytes of a command and the processes that it starts."""
    most = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, held(psutil.Process(process.pid)))
            time.sleep(INTERVAL)
    if process.returncode:
        raise SystemExit(f"error: {command[1]} failed")
    return most


def held(process: psutil.Process) -> int:
    """Return the bytes that a process and its children hold at this moment."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += one.memory_full_info().pss
    return total


def at(size: int) -> dict[str, int]:
    """Return the peak bytes of each stage for this many characters of text."""
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as directory:
        corpus = texts.write_corpus(Path(directory), size)
        tokenise, pack = texts.stages(corpus, WORKERS)
        return {"tokenise": peak(tokenise), "pack": peak(pack)}


def measure(sizes: tuple[int, ...] = SIZES) -> dict:
    """Return the peak bytes at the largest and the smallest size, and their ratio."""
    most = [max(at(size).values()) for size in (sizes[-1], sizes[0])]
    return {"ours": most[0], "other": most[1], "ratio": most[0] / most[1]}


if __name__ == "__main__":
    chosen = [int(float(size) * 1e9) for size in sys.argv[1:]] or SIZES
    for number in chosen:
        found = {stage: f"{peak / 2**20:.0f} MiB" for stage, peak in at(number).items()}
        print(json.dumps({"GB": number / 1e9} | found), flush=True)
