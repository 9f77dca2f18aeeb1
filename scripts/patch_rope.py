"""Work out the RoPE settings of one variant of the model, check them, and write them down.

Method A (``write_config`` true) writes a patched ``config.json``; method B writes the settings alone,
and every later stage applies them at load. Either way the manifest holds them, with the inverse frequencies
that every later stage compares with what it loads.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

from longyarn.core import manifest
from longyarn.core.errors import UserError, program
from longyarn.core.files import new_directory, read_json, write_json
from longyarn.models import loading
from longyarn.rope.extend import extend
from longyarn.rope.frequencies import inverse_frequencies, ramp_limits
from longyarn.rope.parameters import check_parameters
from longyarn.rope.record import patched_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="manifest of the base model")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="config section `rope`, as JSON"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()
    settings = dict(arguments.settings)
    base = manifest.read(arguments.base)
    model_directory = arguments.base.parent / base["facts"]["directory"]
    trust = base["facts"]["trust_remote_code"]

    config = loading.read_base_config(model_directory, trust)
    write = settings.pop("write_config")
    window = settings.pop("sliding_window", "keep")
    method = settings["method"]
    if settings.get("target_length", 0) is None:  # a variant that is defined by its factor alone
        original = settings["original_max_position_embeddings"] or config.max_position_embeddings
        settings["target_length"] = round(settings["factor"] * original)
    own = dict(config.rope_parameters)
    check_parameters(own)
    own.pop("type", None)
    rotary_dim = rotary_dimensions(config)
    replaced, full_attention = None, False
    if method == "none":
        parameters, factor = dict(own), 1.0
        length = original = config.max_position_embeddings
    else:
        full_attention = lifts_window(config, settings["target_length"], window)
        parameters, factor, original = extend(
            own,
            max_position_embeddings=config.max_position_embeddings,
            rotary_dim=rotary_dim,
            **settings,
        )
        length = settings["target_length"]
        if own["rope_type"] != "default":
            replaced = own
    tell(method, replaced, full_attention, config)
    frequencies, attention_factor = inverse_frequencies(parameters, rotary_dim)
    raw = read_json(model_directory / "config.json")
    patched = patched_config(raw, parameters, length, full_attention)
    check_it_is_taken(type(config), patched, method)

    files = []
    with new_directory(arguments.output) as directory:
        if write:
            write_json(directory / "config.json", patched)
            files.append("config.json")
    facts = {
        "method": method,
        "replaced": replaced,
        "full_attention": full_attention,
        "factor": factor,
        "original_max_position_embeddings": original,
        "max_position_embeddings": length,
        "rope_parameters": parameters,
        "rotary_dim": rotary_dim,
        "attention_factor": attention_factor,
        "inverse_frequencies": frequencies.tolist(),
        "base_inverse_frequencies": inverse_frequencies(own, rotary_dim)[0].tolist(),
        "ramp_limits": ramp_limits(parameters, rotary_dim) if method == "yarn" else None,
    }
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings=arguments.settings,
        inputs={"base": arguments.base},
        files=[arguments.output / name for name in files],
        facts=facts,
    )
    # Read back what was written, as every later stage will: transformers fills in silent defaults.
    loading.load_config(model_directory, arguments.manifest, trust)


def rotary_dimensions(config) -> int:
    """Return how many dimensions of a head are rotated."""
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


def lifts_window(config, target_length: int, setting: str) -> bool:
    """Tell whether the model's sliding window is to be lifted; stop where nothing would see that far.

    ``setting`` is rope.sliding_window: ``keep`` or ``full``.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in kinds and len(kinds) > 1:
        raise UserError(
            f"the model mixes layers that attend within {window} tokens with layers that attend to all; one "
            "RoPE serves both, and slowing it would change distances that the local layers know; Longyarn "
            "extends models whose layers are all of one kind"
        )
    windowed = getattr(config, "use_sliding_window", True) and window and window < target_length
    if windowed and setting == "keep":
        raise UserError(
            f"the model attends within a sliding window of {window} tokens, less than "
            f"rope.target_length {target_length}; set rope.sliding_window to full, so that every token "
            "attends to all before it, or choose a model that attends to its whole context"
        )
    return bool(windowed)


def check_it_is_taken(config_class: type, patched: dict, method: str) -> None:
    """Stop where transformers would read the patched configuration otherwise, or not at all."""
    from huggingface_hub.errors import StrictDataclassError

    wanted = patched["rope_parameters"]
    try:
        read = config_class.from_dict(copy.deepcopy(patched))
    except (ValueError, KeyError, TypeError, StrictDataclassError):
        read = None
    # As Mixtral's is; transformers fills it in for the other methods.
    if wanted["rope_type"] == "yarn" and getattr(read, "head_dim", 0) is None:
        raise UserError(
            "the model's config.json does not state head_dim, without which transformers builds no YaRN for "
            f'models of type {patched["model_type"]!r}; write "head_dim": '
            f"{read.hidden_size // read.num_attention_heads} there, in a local copy that model.source names"
        )
    if read is None or read.rope_parameters != wanted:
        raise UserError(
            f"models of type {patched['model_type']!r} take no RoPE of type {wanted['rope_type']!r} in "
            f"transformers, so rope.method {method} cannot be written for them; set it to ntk, which "
            "changes rope_theta alone"
        )


def tell(method: str, replaced: dict | None, full_attention: bool, config) -> None:
    """Say what the extension takes away from the model, because training has to make up for it."""
    if replaced:
        print(
            f"{method} replaces the model's own RoPE scaling {json.dumps(replaced)}; it was trained with "
            "those frequencies, so training has them to undo as well, and untrained variants start lower",
            file=sys.stderr,
        )
    if full_attention:
        print(
            f"the model's sliding window of {config.sliding_window} tokens is lifted: every token attends to "
            "all before it, which the model learns in training",
            file=sys.stderr,
        )


if __name__ == "__main__":
    program(main)()
