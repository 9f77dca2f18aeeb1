"""Time and peak memory of the merge stage against PEFT's ``merge_and_unload``, for 1.1 B parameters.

The model is a random Llama of TinyLlama's shape in bfloat16 shards, 2.2 GB, with a random adapter of rank 64
on all linear layers. The other side loads model and adapter as in PEFT's documentation, merges and saves.
Both include the import of their libraries and read from a warm page cache; ours also hashes what it wrote.
The merged weights of both are compared: they differ only by the rounding of PEFT's bfloat16 delta.
"""

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import packing_memory
from paths import ROOT, SCRIPTS

from longyarn.core import manifest, tensorfile

RANK, THREADS, ROUNDS = 64, 2, 3
SHAPE = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip


def write_inputs(directory: Path) -> None:
    """Write base model, adapter, RoPE and their manifests, like the stages before the merge."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, dtype="bfloat16")).bfloat16()
    model.save_pretrained(directory / "base", max_shard_size="500MB")
    settings = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.002)
    adapted.save_pretrained(directory / "trained")
    facts = {"trust_remote_code": False, "source": "random", "revision": None}
    for name, more in (("base", facts), ("trained", {"mode": "lora"})):
        files = sorted(file for file in (directory / name).iterdir())
        facts = {"directory": name, "bytes": sum(file.stat().st_size for file in files)} | more
        manifest.write(
            directory / f"{name}.json",
            script=Path(__file__), settings={}, inputs={}, files=files, facts=facts,
        )  # fmt: skip
    rope = json.dumps({"method": "yarn", "target_length": 16384, "write_config": True})
    command = [sys.executable, SCRIPTS / "patch_rope.py", "--settings", rope]
    command += ["--base", directory / "base.json", "--manifest", directory / "rope.json"]
    subprocess.run([*map(str, command), "--output", str(directory / "rope")], check=True)


def ours(directory: Path) -> list[str]:
    """Return the command of the merge stage."""
    command = [sys.executable, SCRIPTS / "merge.py", "--threads", THREADS]
    for name in ("base", "rope"):
        command += [f"--{name}", directory / f"{name}.json"]
    command += ["--train", directory / "trained.json", "--work", directory / "work"]
    command += ["--manifest", directory / "merged.json", "--output", directory / "merged"]
    return list(map(str, command))


def with_peft(directory: Path) -> None:
    """Merge as in PEFT's documentation."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype="bfloat16")
    merged = PeftModel.from_pretrained(model, directory / "trained").merge_and_unload()
    merged.save_pretrained(directory / "peft", max_shard_size="500MB")


def compare(directory: Path) -> None:
    """Exit with an error unless the weights of both sides agree up to bfloat16 rounding."""
    theirs = {
        name: (file, place)
        for file in (directory / "peft").glob("*.safetensors")
        for name, place in tensorfile.header(file).items()
    }
    for file in (directory / "merged").glob("*.safetensors"):
        for name, place in tensorfile.header(file).items():
            one = tensorfile.torch_rows(file, place).float()
            other = tensorfile.torch_rows(*theirs[name]).float()
            far = (one - other).abs() > 2**-7 * one.abs() + 1e-5
            if far.any():
                raise SystemExit(f"error: {name} differs from PEFT's merge")


@functools.cache
def both() -> dict:
    """Return the seconds and peak bytes of each round, with both sides in turn."""
    found = {"ours": [], "other": [], "copy": []}
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as name:
        directory = Path(name)
        write_inputs(directory)
        theirs = [sys.executable, __file__, "--peft", str(directory)]
        for _ in range(ROUNDS):
            for side, command in (("ours", ours(directory)), ("other", theirs)):
                began = time.perf_counter()
                memory = packing_memory.peak(command)
                found[side].append((time.perf_counter() - began, memory))
            began = time.perf_counter()
            subprocess.run(["cp", "-r", directory / "base", directory / "copy"], check=True)
            found["copy"].append((time.perf_counter() - began, 0))
        compare(directory)
    return found


def measure(what: str) -> dict:
    """Return the median ``time`` in seconds or ``memory`` in bytes of both sides, and of their ratio."""
    index = ("time", "memory").index(what)
    sides = {side: [one[index] for one in rows] for side, rows in both().items()}
    pairs = zip(sides["ours"], sides["other"], strict=True)
    medians = {side: statistics.median(values) for side, values in sides.items()}
    return medians | {"ratio": statistics.median(a / b for a, b in pairs)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peft"]:
        with_peft(Path(sys.argv[2]))
    else:
        print(json.dumps({what: measure(what) for what in ("time", "memory")}, indent=1))
