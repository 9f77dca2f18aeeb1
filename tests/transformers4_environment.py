"""The last transformers 4, beside the running environment: its packages first on the path, all else shared.

Made below .cache/ when it is not there, from versions and hashes in transformers4.txt.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from longyarn.core.files import sha256

REQUIREMENTS = ROOT / "tests" / "transformers4.txt"
VERSION = "4.57.6"

# Logits of each model, its RoPE, and its tokenizer's ids of a text.
PROGRAM = """
import json, sys
import torch, transformers
from safetensors.torch import save_file
assert transformers.__version__ == sys.argv[1], transformers.__version__
asked = json.load(open(sys.argv[2]))
torch.set_num_threads(1)
found, facts = {}, {}
for name, one in asked.items():
    model = transformers.AutoModelForCausalLM.from_pretrained(one["model"], dtype=torch.float32)
    rotary = next(m for m in model.modules() if hasattr(m, "inv_freq"))
    with torch.inference_mode():
        tokens = torch.tensor([one["tokens"]])
        found[name] = model.eval()(input_ids=tokens, use_cache=False).logits[0].contiguous()
    facts[name] = {
        "inverse_frequencies": rotary.inv_freq.double().tolist(),
        "attention_factor": rotary.attention_scaling,
        "dtype": str(transformers.AutoConfig.from_pretrained(one["model"]).dtype),
    }
    if "text" in one:
        tokenizer = transformers.AutoTokenizer.from_pretrained(one["model"])
        facts[name]["ids"] = tokenizer(one["text"]).input_ids
        facts[name]["longest"] = tokenizer.model_max_length
save_file(found, sys.argv[3])
json.dump(facts, open(sys.argv[4], "w"))
"""


def packages() -> Path:
    """Return the directory with transformers 4, made when it is not there or of other versions."""
    directory = ROOT / ".cache" / "tests" / "transformers4"
    stamp = directory / "whole"
    if not stamp.is_file() or stamp.read_text() != sha256(REQUIREMENTS):
        shutil.rmtree(directory, ignore_errors=True)
        command = [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes",
            "--target", directory, "-r", REQUIREMENTS,
        ]  # fmt: skip
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"transformers {VERSION} cannot be installed: {done.stderr.strip()[-300:]}")
        stamp.write_text(sha256(REQUIREMENTS))
    return directory


def run(asked: dict[str, dict], directory: Path) -> tuple[dict, dict]:
    """Load models with transformers 4; return the logits and the facts of each by its name.

    ``asked`` has of each ``model``, ``tokens`` and perhaps a ``text`` for its tokenizer.
    """
    from safetensors.torch import load_file

    directory.mkdir()
    (directory / "asked.json").write_text(json.dumps(asked, default=str))
    environment = os.environ | {"PYTHONPATH": str(packages()), "HF_HUB_OFFLINE": "1"}
    files = [directory / name for name in ("asked.json", "logits.safetensors", "facts.json")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, VERSION, *map(str, files)],
        env=environment, cwd=directory, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return load_file(files[1]), json.loads(files[2].read_text())
