"""Work out the RoPE settings of one variant of the model, check them, and write them down.

Method A (``write_config`` true) writes a patched ``config.json``; method B writes the settings alone,
and every later stage applies them at load. Either way the manifest holds them, with the inverse frequencies
that every later stage compares with what it loads.
"""

import argparse
import json
from pathlib import Path

from longyarn import manifest, models, rope
from longyarn.cli import UserError, first_line, program


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

    config = read_base(model_directory, trust)
    write = settings.pop("write_config")
    method = settings["method"]
    rotary_dim = rotary_dimensions(config)
    if method == "none":
        rope.check_parameters(config.rope_parameters)
        parameters, factor = dict(config.rope_parameters), 1.0
        length = original = config.max_position_embeddings
    else:
        rope.check_parameters(config.rope_parameters)
        refuse_sliding_window(config, settings["target_length"])
        parameters, factor, original = rope.extend(
            config.rope_parameters,
            max_position_embeddings=config.max_position_embeddings,
            rotary_dim=rotary_dim,
            **settings,
        )
        length = settings["target_length"]
    parameters.pop("type", None)
    frequencies, attention_factor = rope.inverse_frequencies(parameters, rotary_dim)

    files = []
    with manifest.new_directory(arguments.output) as directory:
        if write:
            raw = manifest.read_json(model_directory / "config.json")
            patched = rope.patched_config(raw, parameters, length)
            manifest.write_json(directory / "config.json", patched)
            files.append("config.json")
    facts = {
        "method": method,
        "factor": factor,
        "original_max_position_embeddings": original,
        "max_position_embeddings": length,
        "rope_parameters": parameters,
        "rotary_dim": rotary_dim,
        "attention_factor": attention_factor,
        "inverse_frequencies": frequencies.tolist(),
        "base_inverse_frequencies": rope.inverse_frequencies(
            dict(config.rope_parameters), rotary_dim
        )[0].tolist(),
        "ramp_limits": rope.ramp_limits(parameters, rotary_dim) if method == "yarn" else None,
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
    models.load_config(model_directory, arguments.manifest, trust)


def read_base(model_directory: Path, trust_remote_code: bool):
    """Return the base model's configuration; legacy ``rope_scaling`` arrives in today's form."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_directory, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise UserError(
            f"{model_directory}/config.json is not one that transformers reads ({first_line(error)}); "
            "mend it or choose another model"
        ) from None
    if not getattr(config, "rope_parameters", None):
        raise UserError(
            f"the model in {model_directory} (model_type {config.model_type!r}) has no RoPE; "
            "only models with rotary position embeddings can be extended"
        )
    return config


def rotary_dimensions(config) -> int:
    """Return how many dimensions of a head are rotated."""
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


def refuse_sliding_window(config, target_length: int) -> None:
    """Stop when attention is windowed below the target length: nothing would see that far."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) and window and window < target_length:
        raise UserError(
            f"the model attends within a sliding window of {window} tokens, less than "
            f"rope.target_length {target_length}; set sliding_window to null in its config.json or "
            "choose a model that attends to its whole context"
        )


if __name__ == "__main__":
    program(main)()
