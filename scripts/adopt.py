"""Take an externally trained model, an adapter or all weights, in place of training.

    python scripts/adopt.py --base results/micro/base.json --rope results/micro/rope/yarn.json \
        --source trained-elsewhere --cache .cache \
        --manifest results/micro/trained.json --output results/micro/trained

The stages after this one run as if the model had been trained here. So this stage checks what would raise
no error later: safetensors only, names and shapes of the base, finite numbers, the base's tokenizer, and the
RoPE of this run. Facts that only training here would show, such as steps, are null in the manifest.
"""

import argparse
import sys
from pathlib import Path

from longyarn.core import manifest
from longyarn.core.errors import program
from longyarn.core.files import link_or_copy, new_directory, read_json, require_space, write_json
from longyarn.models import external_source
from longyarn.models.source_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_complete,
    is_local,
    tensor_files,
)
from longyarn.rope.record import RopeRecord


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="manifest of the base model")
    parser.add_argument("--rope", type=Path, required=True, help="manifest of the RoPE settings")
    parser.add_argument("--source", required=True, help="local directory or hub repository")
    parser.add_argument("--revision", default="", help="hub commit, or a branch or tag of it")
    parser.add_argument("--cache", type=Path, required=True, help="directory of hub downloads")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()

    base = manifest.read(arguments.base)["facts"]
    rope = RopeRecord.read(arguments.rope)
    if is_local(arguments.source):
        source, commit = external_source.local(arguments.source), None
    else:
        source, commit = external_source.download(
            arguments.source, arguments.revision, arguments.cache
        )
    found = check(source, arguments.base.parent / base["directory"], base, rope)
    with new_directory(arguments.output) as directory:
        publish(source, directory, base)
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings={"source": arguments.source, "revision": arguments.revision or None},
        inputs={"base": arguments.base, "rope": arguments.rope},
        files=sorted(arguments.output.iterdir()),
        facts=found
        | {
            "directory": arguments.output.name,
            "source": arguments.source,
            "revision": commit,
            "steps": None,
            "sequences_seen": None,
            "tokens_seen": None,
            "epochs": None,
            "world_size": None,
            "gradient_accumulation_steps": None,
            "loss": [],
            "held_out": [],
            "guards": {},
        },
    )


def check(source: Path, directory: Path, base: dict, rope: RopeRecord) -> dict:
    """Check what was trained against the base in ``directory``; return the facts that this shows.

    ``base`` holds the facts of the base's manifest.
    """
    from transformers.utils import logging

    from longyarn.models import external, external_weights
    from longyarn.models.loading import read_base_config

    logging.set_verbosity_error()
    trust = base["trust_remote_code"]
    config = read_base_config(directory, trust)
    rope_is_known = (source / "config.json").is_file()
    if rope_is_known:
        own = read_base_config(source, trust)
        external.check_model(own, config, source)
        external.check_version(read_json(source / "config.json"), rope, source)
        external.check_rope(own, rope, source)
    external.check_tokenizer(source, directory, trust)
    if (source / ADAPTER_CONFIG).is_file():
        adapter = external_weights.check_adapter(source, directory, config)
        parameters = adapter.pop("parameters")
    else:
        check_complete(source, [])
        adapter, parameters = None, external_weights.check_whole(source, directory, config)
    if not rope_is_known:
        print(
            "adopt: warning: there is no config.json beside the adapter, so the RoPE that it was trained "
            "with is unknown",
            file=sys.stderr,
        )
    return {
        "mode": "lora" if adapter else "full",
        "adapter": adapter,
        "rope_is_known": rope_is_known,
        "trainable_parameters": parameters,
    }


def publish(source: Path, directory: Path, base: dict) -> None:
    """Put what was trained where training would have put it. ``base`` holds the base's facts."""
    if not (source / ADAPTER_CONFIG).is_file():
        files = [*tensor_files(source), *source.glob("model.safetensors.index.json")]
    else:
        files = [source / ADAPTER_WEIGHTS]
        record = read_json(source / ADAPTER_CONFIG)
        # A path of another machine has no meaning here.
        record["base_model_name_or_path"] = base["source"]
        record["revision"] = base["revision"]
        write_json(directory / ADAPTER_CONFIG, record)
    disk = directory.stat().st_dev
    copied = sum(file.stat().st_size for file in files if file.stat().st_dev != disk)
    require_space(directory, copied, "what was trained")
    for file in files:
        link_or_copy(file, directory / file.name)


if __name__ == "__main__":
    program(main)()
