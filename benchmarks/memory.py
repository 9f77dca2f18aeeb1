"""Measure the peak memory of the training stage and compare it with the plan's estimate.

    python benchmarks/memory.py micro micro-full

For each case, the stages themselves make and train a random model, each in its own process. The peak is
the training process's largest resident set. The memory of Python and the libraries is measured with a
tiny model and subtracted. Without names it runs all cases; tests/test_estimate.py runs the quick ones.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import small_runs
from paths import ROOT, SCRIPTS

from longyarn.cluster import estimate, model_shapes

MICRO = json.loads((ROOT / "resources/micro-base/config.json").read_text())
NOTHING = MICRO | {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
# The sizes of Llama-3.2-1B.
ONE_BILLION = MICRO | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
}  # fmt: skip
# A case is a config.json, a length, and what differs from `TRAINING`.
TRAINING = {
    "steps": 2, "learning_rate": 1.0e-4, "warmup_steps": 0, "precision": "fp32", "threads": 2,
    "logging_steps": 1, "gradient_checkpointing": False,
}  # fmt: skip
CASES = {
    "nothing": (NOTHING, 128, {}),
    "micro": (MICRO, 4096, {}),
    "micro-checkpointing": (MICRO, 4096, {"gradient_checkpointing": True}),
    "micro-full": (MICRO, 4096, {"mode": "full", "zero_stage": 3}),
    "micro-eager": (MICRO, 2048, {"attention": "eager"}),
    "1b": (ONE_BILLION, 256, {"steps": 1, "gradient_checkpointing": True, "precision": "bf16"}),
    "1b-1024": (
        ONE_BILLION,
        1024,
        {"steps": 1, "gradient_checkpointing": True, "precision": "bf16"},
    ),
    "1b-kept": (ONE_BILLION, 512, {"steps": 1, "precision": "bf16"}),
}
MAKE_MODEL = """
import json, sys, torch, transformers
config = json.loads(sys.argv[1])
config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.to_empty(device="cpu")
for tensor in [*model.parameters(), *model.buffers()]:
    torch.nn.init.normal_(tensor, std=0.02)
model.tie_weights()
model.save_pretrained(sys.argv[2])
"""


def configuration(case: str) -> dict:
    """Return the whole configuration of a case."""
    _, length, changes = CASES[case]
    return small_runs.configured(length, TRAINING | changes)


def estimated(case: str) -> tuple[float, float]:
    """Return the plan's estimates of both peaks in bytes, without the libraries."""
    parts = estimate.memory(
        model_shapes.Shape.of(CASES[case][0]), estimate.Setup.of(configuration(case))
    )
    return estimate.peak(parts | {"saving": 0}), estimate.peak(parts)


def measured(case: str) -> tuple[int, int]:
    """Return both peaks of a case in bytes, including the libraries."""
    with tempfile.TemporaryDirectory() as directory:
        return peaks(case, Path(directory))


def libraries() -> float:
    """Return the bytes that Python and the libraries take."""
    return measured("nothing")[0] - estimated("nothing")[0]


def peaks(case: str, work: Path) -> tuple[int, int]:
    """Train a case in the directory ``work``; return the peak bytes of the steps and of the whole run.

    The difference is saving, for which the Trainer copies the model.
    """
    sizes, length, _ = CASES[case]
    prepare(sizes, length, work)
    settings = configuration(case)["training"]
    steps = []

    def at_last_step(line: str) -> None:
        if line.startswith(f"train: step {settings['steps']}/"):
            steps.append(high_water("train.py", str(work)))

    whole = run(small_runs.train_command(work, work, settings), at_last_step)
    return steps[0], whole


def prepare(sizes: dict, length: int, work: Path, document_masks: bool = True) -> None:
    """Make a random model of these sizes, and the other inputs of training, in ``work``."""
    sizes = sizes | {"max_position_embeddings": length}
    run([sys.executable, "-c", MAKE_MODEL, json.dumps(sizes), work / "model"])
    stage("download_model", work, "base", "--source", work / "model", "--cache", work)
    rope = json.dumps({"method": "none", "write_config": True})
    stage("patch_rope", work, "rope", "--base", work / "base.json", "--settings", rope)
    small_runs.write_pack(
        work, small_runs.random_ids(2, length, sizes["vocab_size"]), document_masks
    )


def high_water(script: str, argument: str) -> int:
    """Return the largest resident set so far, in bytes, of the process that runs a script."""
    sizes = [0]
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # the process has just ended
            command = status.with_name("cmdline").read_text().split("\0")
            if any(part.endswith(script) for part in command[:4]) and argument in str(command):
                lines = status.read_text().splitlines()
                sizes += [int(line.split()[1]) * 1024 for line in lines if "VmHWM" in line]
    return max(sizes)


def stage(name: str, work: Path, output: str, *arguments) -> None:
    """Run a stage's program, its manifest and payload named ``output``."""
    script = SCRIPTS / f"{name}.py"
    where = ["--manifest", work / f"{output}.json", "--output", work / output]
    run([sys.executable, script, *where, *arguments])


# Linux starts a process's peak at what its parent held. So a small process starts the measured one.
LAUNCH = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, flush=True)
sys.exit(status)
"""


def run(command: list, see=lambda line: None) -> int:
    """Run a command, pass its lines to ``see``, and return the peak resident bytes of its largest process.

    The fixed threshold makes glibc return freed tensors to the system. With its default, which adapts, a
    model with tensors as small as the micro model's keeps many of them.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        see(line)
    if process.wait():
        raise RuntimeError(f"{command[1]} failed\n{''.join(lines[-40:])}")
    return int(lines[-1].removeprefix("peak "))


def main() -> None:
    """Print each case's peaks and their estimates in MiB, without the libraries."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "case", nargs="*", help=f"one of {', '.join(list(CASES)[1:])}; default: all"
    )
    cases = parser.parse_args().case or list(CASES)[1:]
    if unknown := set(cases) - CASES.keys():
        parser.error(f"unknown case {', '.join(sorted(unknown))}; choose from {', '.join(CASES)}")
    base = libraries()
    print(f"libraries {base / 2**20:.0f} MiB")
    print(
        f"{'case':22}{'steps':>10}{'estimate':>10}{'ratio':>8}{'all':>10}{'estimate':>10}{'ratio':>8}"
    )
    for case in cases:
        pairs = zip(measured(case), estimated(case), strict=True)
        columns = [
            f"{(own - base) / 2**20:10.0f}{guess / 2**20:10.0f}{guess / (own - base):8.2f}"
            for own, guess in pairs
        ]
        print(f"{case:22}{''.join(columns)}", flush=True)


if __name__ == "__main__":
    main()
