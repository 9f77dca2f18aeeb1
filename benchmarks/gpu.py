"""Train random models of real shapes at 32,768 tokens on a GPU: speed, memory, and what each feature saves.

    python benchmarks/gpu.py --shape 1b --case all "stock loss"

We had no GPU to run it on. Each case is the training stage in its own process. Prints a line per case and
writes benchmarks/gpu.json. A published figure for comparison: an 8B model on one H100 with ALST
(arXiv 2506.13996) reaches 189 TFLOP/s at 32k tokens and 548 at 500k. `--cpu` with a short `--length` tests
the program without a GPU; its figures mean nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import memory
import small_runs
import torch
from paths import ROOT

from longyarn.cluster import estimate, model_shapes
from longyarn.core.errors import UserError
from longyarn.training.metrics import read

LLAMA_2_7B = memory.MICRO | {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000,
    "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {"llama-2-7b": LLAMA_2_7B, "1b": memory.ONE_BILLION, "micro": memory.MICRO}
# "all" has every feature that works on any GPU; the others say how they differ from it.
CASES = {
    "all": {},
    "stock loss": {"loss": "stock"},
    "liger": {"loss": "liger"},
    "no checkpointing": {"gradient_checkpointing": False},
    "activation offload": {"activation_offload": True},
    "optimizer offload": {"offload": "optimizer"},
    "weights offload": {"offload": "all", "zero_stage": 3},
    "flash attention": {"attention": "flash_attention_2"},
}


def configuration(length: int, cpu: bool, changes: dict) -> dict:
    """Return the whole configuration of a case."""
    training = {
        "steps": 4, "learning_rate": 1.0e-4, "warmup_steps": 0, "logging_steps": 1, "batch_size": 1,
        "precision": "fp32" if cpu else "bf16", "gpus": 0 if cpu else 1, "threads": 1,
        "gradient_checkpointing": True, "lora": {"rank": 64},
    }  # fmt: skip
    # Whole documents of full length, which cost the most time.
    return small_runs.configured(length, training | changes, document_masks=False)


def measure(sizes: dict, length: int, cpu: bool, changes: dict) -> dict:
    """Return the speed, model operations per second and peak memory of a case, or its error."""
    config = configuration(length, cpu, changes)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        memory.prepare(sizes, length, work, document_masks=False)
        command = small_runs.train_command(work, work, config["training"], metrics=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "rror" in line]
            return {"failed": lines[-1][:200] if lines else f"exit {done.returncode}"}
        steps = [line for line in read(work / "metrics.jsonl") if "loss" in line][1:]
    rate = sum(line["tokens_per_second"] for line in steps) / len(steps)
    setup = estimate.Setup(length, lora=config["training"]["lora"], gradient_checkpointing=False)
    flops = estimate.training_flops(model_shapes.Shape.of(sizes), setup, 1)
    return {
        "tokens_per_second": rate,
        "model_tflops": rate * flops / 1e12,
        "peak_gib": max(line["memory_bytes"] for line in steps) / estimate.GIB,
    }


def main() -> None:
    """Run the chosen cases for the chosen shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llama-2-7b", "1b"])
    parser.add_argument("--length", type=int, default=32768, help="tokens of a sequence")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--cpu", action="store_true", help="test the program without a GPU")
    arguments = parser.parse_args()
    if not arguments.cpu and not torch.cuda.is_available():
        sys.exit("error: no GPU found; run this on a machine with one, or test it with --cpu")
    device = "CPU" if arguments.cpu else torch.cuda.get_device_name()
    results = {"device": device, "length": arguments.length, "results": []}
    for shape in arguments.shape:
        for case in arguments.case:
            try:
                found = measure(SHAPES[shape], arguments.length, arguments.cpu, CASES[case])
            except UserError as error:
                found = {"failed": str(error)}
            results["results"].append({"shape": shape, "case": case} | found)
            print(json.dumps(results["results"][-1]), flush=True)
    if not arguments.cpu:
        text = json.dumps(results, indent=1) + "\n"
        (ROOT / "benchmarks" / "gpu.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
