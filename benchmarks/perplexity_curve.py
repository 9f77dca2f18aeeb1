"""CPU seconds of a curve of perplexity over 16 lengths from one pass over the longest, against 16 passes.

The protocol `truncate` on the micro base model with YaRN, from 128 to 2048 tokens: ours reads each text
once at the longest length; the other, as the code that came with YaRN does, once at each length. The
same function reads and scores in both, and both curves must agree. What is linear in the length costs
a pass for each length 8.5 times as much, and attention, which is quadratic, 5.8 times. Prints JSON.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from longyarn.evaluation import perplexity_protocols  # noqa: E402
from longyarn.evaluation.window_losses import window_losses  # noqa: E402

LONGEST, TEXTS, ROUNDS = 2048, 4, 5
LENGTHS = [LONGEST * number // 16 for number in range(1, 17)]


def micro_base():
    """Return the micro base model with YaRN to the longest length."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    source = ROOT / "resources" / "micro-base"
    config = AutoConfig.from_pretrained(source)
    config.rope_parameters = config.rope_parameters | {
        "rope_type": "yarn", "factor": LONGEST / 512, "original_max_position_embeddings": 512,
    }  # fmt: skip
    config.max_position_embeddings = LONGEST
    return AutoModelForCausalLM.from_pretrained(source, config=config).eval()


def one_pass(model, texts: dict[str, np.ndarray]) -> dict[str, float]:
    """Return perplexity by length from one pass."""
    whole = window_losses(model, texts, LONGEST, None, "")
    curve = perplexity_protocols.truncate(whole, LENGTHS)
    return {length: figure["value"] for length, figure in curve.items()}


def pass_per_length(model, texts: dict[str, np.ndarray]) -> dict[str, float]:
    """Return perplexity by length from a pass for each."""
    curve = {}
    for length in LENGTHS:
        cut = {name: ids[:length] for name, ids in texts.items()}
        curve |= perplexity_protocols.truncate(
            window_losses(model, cut, length, None, ""), [length]
        )
    return {length: figure["value"] for length, figure in curve.items()}


def timed(curve, model, texts) -> tuple[float, dict[str, float]]:
    """Return the CPU seconds that a curve takes, and the curve."""
    began = time.process_time()
    found = curve(model, texts)
    return time.process_time() - began, found


def measure() -> dict:
    """Return the median seconds of both and of their ratio, measured in turn."""
    model, generator = micro_base(), np.random.default_rng(0)
    texts = {
        str(number): generator.integers(model.config.vocab_size, size=LONGEST, dtype=np.int32)
        for number in range(TEXTS)
    }
    pairs = []
    for _ in range(ROUNDS + 1):  # the first is not counted
        (ours, one), (other, each) = (
            timed(curve, model, texts) for curve in (one_pass, pass_per_length)
        )
        np.testing.assert_allclose(list(one.values()), list(each.values()), rtol=1e-5)
        pairs.append((ours, other))
    return {
        "ours": statistics.median(a for a, _ in pairs[1:]),
        "other": statistics.median(b for _, b in pairs[1:]),
        "ratio": statistics.median(a / b for a, b in pairs[1:]),
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
