"""CPU seconds of perplexity at 16 lengths from one pass over the longest length, against 16 passes.

It uses the protocol `truncate` on the micro base model with YaRN, from 128 to 2048 tokens. Ours reads each
text once, at the longest length; the other side reads it once at each length, like YaRN's published code. The
same function scores both, and both curves must agree. With a pass for each length, work that is linear in
the length costs 8.5 times as much, and attention, which is quadratic, 5.8 times. Prints JSON.
"""

import json
import statistics
import time

import numpy as np
from paths import ROOT

from longyarn.evaluation import perplexity_protocols
from longyarn.evaluation.window_losses import window_losses

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
    """Return the perplexity at each length from one pass."""
    whole = window_losses(model, texts, LONGEST, None, "")
    curve = perplexity_protocols.truncate(whole, LENGTHS)
    return {length: figure["value"] for length, figure in curve.items()}


def pass_per_length(model, texts: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the perplexity at each length from a pass of its own."""
    curve = {}
    for length in LENGTHS:
        cut = {name: ids[:length] for name, ids in texts.items()}
        curve |= perplexity_protocols.truncate(
            window_losses(model, cut, length, None, ""), [length]
        )
    return {length: figure["value"] for length, figure in curve.items()}


def timed(curve, model, texts) -> tuple[float, dict[str, float]]:
    """Return the CPU seconds that a function takes, and its curve."""
    began = time.process_time()
    found = curve(model, texts)
    return time.process_time() - began, found


def measure() -> dict:
    """Return the median seconds of both sides, measured in turn, and of their ratio."""
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
