"""Run the benchmarks: each measures two things in turn on this machine and reports their ratio.

    python benchmarks/run.py noop_vs_version passkey_vs_generate

Prints a table and writes benchmarks/results.json. With names it measures only these rows and keeps the
others. A ratio is the median of the pairs' ratios, so a machine whose speed drifts does not distort it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import chunked_loss
import llamafactory
import merging
import packing_memory
import packing_others
import packing_speed
import passkey_speed
import perplexity_curve
import training_speed
from paths import ROOT

RESULTS = ROOT / "benchmarks" / "results.json"
PAIRS = 7
DRY_SWEEP = ["snakemake", "-n", "sweep", "--config", "run=nothing-done"]


def seconds(command: list[str]) -> float:
    """Return the wall time of a command in seconds; raise an error if it fails."""
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def compare(name: str, goal: str, ours: list[str], other: list[str]) -> dict:
    """Time two commands in turn, after one untimed run of each."""
    seconds(ours), seconds(other)
    pairs = [(seconds(ours), seconds(other)) for _ in range(PAIRS)]
    return {
        "name": name,
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "goal": goal,
        "ours": f"{statistics.median(a for a, _ in pairs):.2f} s",
        "other": f"{statistics.median(b for _, b in pairs):.2f} s",
        "command": f"{' '.join(ours)}  against  {' '.join(other)}",
    }


def measured(name: str, goal: str, module, show: Callable[[float], str], *arguments: str) -> dict:
    """Return the row of a benchmark that is a module with ``measure``; ``show`` writes its figures."""
    found = module.measure(*arguments)
    return {
        "name": name,
        "ratio": round(found["ratio"], 3),
        "goal": goal,
        "ours": show(found["ours"]),
        "other": show(found["other"]),
        "command": f"python benchmarks/{module.__name__}.py",
    }


def tokens_a_second(rate: float) -> str:
    """Return a speed in words."""
    return f"{rate:.0f} tokens/s"


def machine() -> str:
    """Return one line that describes this machine."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return f"{os.cpu_count()} × {model}, {platform.system()}, Python {platform.python_version()}"


def seconds_taken(time: float) -> str:
    """Return a time in words."""
    return f"{time:.2f} s"


def mebibytes(size: float) -> str:
    """Return a size in words."""
    return f"{size / 2**20:.0f} MiB"


# Each row's goal, the function that measures it, and that function's arguments.
ROWS = {
    "noop_vs_version": ("<= 2", compare, ["snakemake"], ["snakemake", "--version"]),
    "sweep_24_cells_vs_1": (
        "<= 2", compare, [*DRY_SWEEP, "--configfile", "config.yaml", "benchmarks/sweep.yaml"], DRY_SWEEP,
    ),
    "chunked_loss_memory_vs_stock": ("<= 0.35", measured, chunked_loss, mebibytes),
    "train_vs_bare_loop": (">= 0.95", measured, training_speed, tokens_a_second),
    "train_vs_llamafactory": (">= 1.1", measured, llamafactory, tokens_a_second),
    "pack_vs_encode_batch": (">= 0.85", measured, packing_speed, tokens_a_second),
    "pack_vs_trl": (">= 1", measured, packing_others, tokens_a_second, "trl"),
    "pack_vs_datasets_map": (">= 1", measured, packing_others, tokens_a_second, "map"),
    "pack_memory_1_gb_vs_0.1_gb": ("<= 1.5", measured, packing_memory, mebibytes),
    "merge_memory_vs_peft": ("<= 0.3", measured, merging, mebibytes, "memory"),
    "merge_time_vs_peft": ("<= 1", measured, merging, seconds_taken, "time"),
    "ppl_curve_vs_pass_per_length": ("<= 0.15", measured, perplexity_curve, seconds_taken),
    "passkey_vs_generate": ("<= 0.4", measured, passkey_speed, seconds_taken),
}  # fmt: skip


def kept(names: list[str]) -> dict[str, dict]:
    """Return the rows of results.json that are kept if only some are measured again."""
    if set(names) == set(ROWS) or not RESULTS.is_file():
        return {}
    before = json.loads(RESULTS.read_text(encoding="utf-8"))
    if before["machine"] != machine():
        sys.exit(
            f"error: {RESULTS.name} was measured on another machine, {before['machine']}; all rows must be "
            "from one machine, so measure all of them with `make bench`"
        )
    return {row["name"]: row for row in before["results"]}


def main() -> None:
    """Run the benchmarks. The default run must be finished, so that Snakemake has nothing to do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help=f"one of {', '.join(ROWS)}; default: all"
    )
    names = parser.parse_args().rows or list(ROWS)
    if unknown := set(names) - ROWS.keys():
        parser.error(f"unknown row {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}")
    rows = kept(names)
    dry = subprocess.run(["snakemake", "-n"], cwd=ROOT, capture_output=True, text=True)
    if "Nothing to be done" not in dry.stdout + dry.stderr:
        sys.exit("error: the default run is not finished; run `make` first, then `make bench`")
    for name in names:
        goal, how, *what = ROWS[name]
        try:
            rows[name] = row = how(name, goal, *what)
        except llamafactory.NotInstalled as reason:
            print(f"{name}: not measured, LLaMA-Factory cannot be installed: {reason}")
            continue
        print(f"{name:30} {row['ratio']:8.3f}  goal {goal:8}", end="")
        print(f" ours {row['ours']:10} other {row['other']:10} {row['command']}", flush=True)
        results = [rows[name] for name in ROWS if name in rows]
        text = json.dumps({"machine": machine(), "results": results}, indent=1) + "\n"
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
