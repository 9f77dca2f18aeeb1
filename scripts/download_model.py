"""Take the base model from a local directory, or download it from the Hugging Face hub.

    python scripts/download_model.py --source resources/micro-base --cache .cache \
        --manifest results/micro/base.json --output results/micro/base

Only safetensors, the configuration and the tokenizer are taken. Every file is checked for completeness. A
file from the hub is also compared with the hub's hash.
"""

import argparse
import sys
from pathlib import Path

from longyarn.core import manifest
from longyarn.core.errors import UserError, program
from longyarn.core.files import link_or_copy, located, new_directory, read_json, require_space
from longyarn.models import hub
from longyarn.models.source_files import check_code, check_complete, is_local, needed_files


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="local directory or hub repository")
    parser.add_argument("--revision", default="", help="hub commit, or a branch or tag of it")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="keep the model's own code"
    )
    parser.add_argument("--cache", type=Path, required=True, help="directory of hub downloads")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()

    commit = None
    if is_local(arguments.source):
        source = located(arguments.source)
        if not source.is_dir():
            raise UserError(f"model.source {arguments.source} is not a directory; correct the path")
    else:
        source, commit = from_hub(
            arguments.source, arguments.revision, arguments.cache, arguments.trust_remote_code
        )
    files = needed_files(source, arguments.trust_remote_code)
    check_complete(source, files)
    config = read_json(source / "config.json")
    if arguments.trust_remote_code:
        check_code(source)
    with new_directory(arguments.output) as directory:
        disk = directory.stat().st_dev
        copied = sum(file.stat().st_size for file in files if file.stat().st_dev != disk)
        require_space(arguments.output.parent, copied, "the base model")
        for file in files:
            link_or_copy(file, directory / file.name)
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings={"source": arguments.source, "revision": arguments.revision or None},
        inputs={},
        files=[arguments.output / file.name for file in files],
        facts={
            "directory": arguments.output.name,
            "source": arguments.source,
            "revision": commit,
            "trust_remote_code": arguments.trust_remote_code,
            "model_type": config.get("model_type"),
            "bytes": sum(file.stat().st_size for file in files),
        },
    )


def from_hub(repository: str, revision: str, cache: Path, code: bool) -> tuple[Path, str]:
    """Download a model from the hub into the cache; return its directory and its commit."""
    found = hub.find(repository, revision, cache)
    if found.commit != revision:
        print(
            f"model.revision {revision} of {repository} is commit {found.commit} today, and this run uses "
            "it; to use the same commit again, write it in place of the name",
            file=sys.stderr,
        )
    if not found.online:
        print(f"the hub is out of reach; {repository} is taken from {cache}", file=sys.stderr)
    return hub.download(found, code), found.commit


if __name__ == "__main__":
    program(main)()
