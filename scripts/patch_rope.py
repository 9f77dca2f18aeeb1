"""Compute the RoPE settings of one variant of the base model, check them, and record them.

    python scripts/patch_rope.py --base results/micro/base.json \
        --settings '{"method": "yarn", "target_length": 4096, "write_config": true}' \
        --manifest results/micro/rope/yarn.json --output results/micro/rope/yarn

With ``write_config`` true the stage writes a patched ``config.json``. With false it writes the settings
alone, and later stages apply them when they load the model. The manifest holds the settings in either
case, with the inverse frequencies that every later stage compares with the model it loads.
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
from longyarn.rope.extend import extended_record
from longyarn.rope.record import RopeRecord


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="manifest of the base model")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="config section `rope`, as JSON"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()

    base = manifest.read(arguments.base)
    model_directory = arguments.base.parent / base["facts"]["directory"]
    trust = base["facts"]["trust_remote_code"]
    config = loading.read_base_config(model_directory, trust)
    rope = extended_record(config, arguments.settings)
    warn_of_changes(rope, config)
    patched = rope.patched(read_json(model_directory / "config.json"))
    check_accepted(type(config), patched, rope.method)
    files = []
    with new_directory(arguments.output) as directory:
        if arguments.settings["write_config"]:
            write_json(directory / "config.json", patched)
            files.append(arguments.output / "config.json")
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings=arguments.settings,
        inputs={"base": arguments.base},
        files=files,
        facts=rope.facts(),
    )
    # Read back what was written, as every later stage will: transformers fills in defaults silently.
    loading.load_config(model_directory, arguments.manifest, trust)


def check_accepted(config_class: type, patched: dict, method: str) -> None:
    """Stop unless transformers reads the patched ``config.json`` and keeps its RoPE as written."""
    from huggingface_hub.errors import StrictDataclassError

    wanted = patched["rope_parameters"]
    try:
        read = config_class.from_dict(copy.deepcopy(patched))
    except (ValueError, KeyError, TypeError, StrictDataclassError):
        read = None
    # Mixtral is such a model. For the other methods transformers fills in head_dim by itself.
    if wanted["rope_type"] == "yarn" and getattr(read, "head_dim", 0) is None:
        raise UserError(
            "the model's config.json does not state head_dim, and without it transformers cannot build YaRN "
            f'for models of type {patched["model_type"]!r}; write "head_dim": '
            f"{read.hidden_size // read.num_attention_heads} there, in a local copy that model.source names"
        )
    if read is None or read.rope_parameters != wanted:
        raise UserError(
            f"transformers accepts no RoPE of type {wanted['rope_type']!r} for models of type "
            f"{patched['model_type']!r}, so rope.method {method} is impossible for them; set it to ntk, "
            "which changes rope_theta alone"
        )


def warn_of_changes(rope: RopeRecord, config) -> None:
    """Tell the user what the extension removes from the model, because training must make up for it."""
    if rope.replaced:
        print(
            f"{rope.method} replaces the model's own RoPE scaling {json.dumps(rope.replaced)}; the model was "
            "trained with those frequencies, so training must undo them as well, and untrained variants "
            "start lower",
            file=sys.stderr,
        )
    if rope.full_attention:
        print(
            f"the model's sliding window of {config.sliding_window} tokens is removed: every token attends "
            "to all tokens before it, which the model learns in training",
            file=sys.stderr,
        )


if __name__ == "__main__":
    program(main)()
