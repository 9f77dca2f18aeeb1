"""Seconds of the default's passkey grid with shared prefixes, against ``generate`` for each trial.

Both sides have the same model, prompts and threads, and must find the same keys. Loading and tokenizing are
not timed. The model is the untrained base with YaRN to the default's target length.
"""

import json
import statistics
import sys
import time

import yaml
from paths import ROOT, RUN

from longyarn.core.torch_setup import set_up_torch
from longyarn.evaluation import passkey_prompts, shared_prefixes
from longyarn.models import loading

ROUNDS = 3


def grid() -> dict[tuple, list[tuple[list[int], int]]]:
    """Return the default's prompts by cell."""
    settings = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    settings = settings["evaluation"]["passkey"]
    tokenizer = loading.load_tokenizer(RUN / "base", False)
    filler = passkey_prompts.read_haystack(tokenizer, None)
    how = (settings["trials"], settings["digits"], settings["seed"], settings["needles"])
    return {
        (length, depth): [
            passkey_prompts.prompt(tokenizer, needles, length, depth, filler)
            for needles in passkey_prompts.draw_needles(*how, length, depth)
        ]
        for length in settings["lengths"]
        for depth in settings["depths"]
    }


def ours(model, prompts: dict) -> dict[tuple, int]:
    """Return the keys found in each cell by the code of the passkey stage."""
    reader = shared_prefixes.Reader(model)
    found = dict.fromkeys(prompts, 0)
    for cell, batch in passkey_prompts.in_order(prompts):
        found[cell] += sum(passkey_prompts.retrieved(reader, batch))
    return found


def generated(model, prompts: dict) -> dict[tuple, int]:
    """Return the keys found in each cell if ``generate`` decodes each trial."""
    import torch

    found = dict.fromkeys(prompts, 0)
    for cell, trials in prompts.items():
        for tokens, answer in trials:
            asked = torch.tensor([tokens[:-answer]])
            written = model.generate(
                asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=answer,
                min_new_tokens=answer, pad_token_id=0,
            )  # fmt: skip
            found[cell] += written[0, -answer:].tolist() == tokens[-answer:]
    return found


def timed(function, model, prompts: dict) -> tuple[float, dict]:
    """Return the seconds that a function takes, and its result."""
    began = time.perf_counter()
    found = function(model, prompts)
    return time.perf_counter() - began, found


def measure() -> dict:
    """Return the median seconds of both sides, measured in turn, and of their ratio."""
    set_up_torch(1)
    model = loading.load_model(
        RUN / "base", RUN / "rope" / "yarn.json", dtype="fp32", attention="sdpa"
    ).eval()
    prompts, pairs = grid(), []
    for _ in range(ROUNDS):
        (seconds, found), (other, expected) = (timed(f, model, prompts) for f in (ours, generated))
        if found != expected:
            sys.exit(f"error: the stage finds {found}, and generate {expected}")
        pairs.append((seconds, other))
    return {
        "ours": statistics.median(a for a, _ in pairs),
        "other": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
