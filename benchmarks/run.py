"""Run the benchmarks: each compares two things in turn on this machine and reports the ratio.

Prints a table and writes ``benchmarks/results.json``. A ratio is the median of the pairs' ratios, so
that a machine whose speed drifts does not tilt it.
"""

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

ROOT = Path(__file__).resolve().parents[1]
PAIRS = 7
DRY_SWEEP = ["snakemake", "-n", "sweep", "--config", "run=nothing-done"]


def seconds(command: list[str]) -> float:
    """Return the wall time of a command in seconds; stop when it fails."""
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def compare(name: str, goal: str, ours: list[str], other: list[str]) -> dict:
    """Time two commands alternately, after one unmeasured run of each."""
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
    """Write a speed."""
    return f"{rate:.0f} tokens/s"


def machine() -> str:
    """Return a line about this machine."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return f"{os.cpu_count()} × {model}, {platform.system()}, Python {platform.python_version()}"


def main() -> None:
    """Run all benchmarks; the default run must be finished, so that a no-op run is one."""
    dry = subprocess.run(["snakemake", "-n"], cwd=ROOT, capture_output=True, text=True)
    if "Nothing to be done" not in dry.stdout + dry.stderr:
        sys.exit("error: the default run is not finished; run `make` first, then `make bench`")
    results = [
        compare("noop_vs_version", "<= 2", ["snakemake"], ["snakemake", "--version"]),
        compare(
            "sweep_24_cells_vs_1",
            "<= 2",
            [*DRY_SWEEP, "--configfile", "benchmarks/sweep.yaml"],
            DRY_SWEEP,
        ),
        measured(
            "chunked_loss_memory_vs_stock",
            "<= 0.35",
            chunked_loss,
            lambda size: f"{size / 2**30:.2f} GiB",
        ),
        measured("train_vs_bare_loop", ">= 0.95", training_speed, tokens_a_second),
        measured("passkey_vs_generate", "<= 0.4", passkey_speed, lambda time: f"{time:.1f} s"),
        measured("pack_vs_encode_batch", ">= 0.85", packing_speed, tokens_a_second),
        measured("pack_vs_trl", ">= 1", packing_others, tokens_a_second, "trl"),
        measured("pack_vs_datasets_map", ">= 1", packing_others, tokens_a_second, "map"),
        measured(
            "pack_memory_1_gb_vs_0.1_gb",
            "<= 1.5",
            packing_memory,
            lambda size: f"{size / 2**20:.0f} MiB",
        ),
        measured(
            "merge_memory_vs_peft",
            "<= 0.3",
            merging,
            lambda size: f"{size / 2**20:.0f} MiB",
            "memory",
        ),
        measured("merge_time_vs_peft", "<= 1", merging, lambda time: f"{time:.1f} s", "time"),
        measured(
            "ppl_curve_vs_pass_per_length",
            "<= 0.15",
            perplexity_curve,
            lambda taken: f"{taken:.2f} s",
        ),
    ]
    try:
        results.append(measured("train_vs_llamafactory", ">= 1.1", llamafactory, tokens_a_second))
    except llamafactory.NotInstalled as reason:
        print(f"train_vs_llamafactory: not measured, LLaMA-Factory cannot be installed: {reason}")
    for row in results:
        print(f"{row['name']:30} {row['ratio']:8.3f}  goal {row['goal']:8}", end="")
        print(f" ours {row['ours']:10} other {row['other']:10} {row['command']}")
    text = json.dumps({"machine": machine(), "results": results}, indent=1) + "\n"
    (ROOT / "benchmarks" / "results.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
