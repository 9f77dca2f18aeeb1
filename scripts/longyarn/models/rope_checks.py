"""Checks that a configuration, and a built model, have the RoPE of the manifest."""

from pathlib import Path

import numpy as np

from longyarn.core.errors import UserError


def check_config(config, facts: dict, source: Path) -> None:
    """Stop when a configuration's RoPE is not the manifest's."""
    loaded = {k: v for k, v in (config.rope_parameters or {}).items() if k != "type"}
    expected = facts["rope_parameters"]
    lengths = (config.max_position_embeddings, facts["max_position_embeddings"])
    if loaded != expected or lengths[0] != lengths[1]:
        raise UserError(
            f"{source} carries RoPE {loaded} to {lengths[0]} positions where the run's manifest says "
            f"{expected} to {lengths[1]}; it was changed or made by another run, so rebuild it"
        )
    if facts["full_attention"] and config.sliding_window is not None:
        raise UserError(
            f"{source} has a sliding window of {config.sliding_window} where the run's manifest says that "
            "it has none; it was changed or made by another run, so rebuild it"
        )


def check_rotation(model, facts: dict) -> None:
    """Stop unless every rotary module turns as the manifest says, in float32.

    A config can be right and the rotation wrong: RoPE set too late, an arange in bfloat16.
    """
    import torch

    expected = np.asarray(facts["inverse_frequencies"], dtype=np.float64)
    found = 0
    for name, module in model.named_modules():
        frequencies = getattr(module, "inv_freq", None)
        if frequencies is None:
            continue
        found += 1
        actual = frequencies.detach().cpu().double().numpy()
        if frequencies.dtype != torch.float32:
            raise UserError(f"{name}.inv_freq is {frequencies.dtype}; RoPE needs float32")
        if actual.shape != expected.shape or not np.allclose(actual, expected, rtol=1e-6, atol=0):
            raise UserError(
                f"{name} does not rotate as the RoPE manifest says (expected {expected[:3]}…, found "
                f"{actual[:3]}…); the model was built before its RoPE was set, or by other code"
            )
        scaling = getattr(module, "attention_scaling", 1.0)
        if abs(scaling - facts["attention_factor"]) > 1e-6:
            raise UserError(
                f"{name} scales attention by {scaling} where the RoPE manifest says "
                f"{facts['attention_factor']}"
            )
    if not found:
        raise UserError("the model has no rotary embedding with inv_freq, so its RoPE is unproved")
