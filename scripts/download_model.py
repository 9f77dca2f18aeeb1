"""Bring the base model: from a local directory, or from the Hugging Face hub at a pinned revision.

Only safetensors, the configuration and the tokenizer are taken. Every file is checked: against the
hub's hash where it comes from there, and for being whole in any case.
"""

import argparse
import sys
from pathlib import Path

from longyarn.core import manifest
from longyarn.core.errors import UserError, program
from longyarn.core.files import link_or_copy, new_directory, read_json, require_space
from longyarn.models import hub
from longyarn.models.source_files import tensor_files

# What a change of a local model is noticed by; of the tensors, those are taken that the index names.
WANTED = (*hub.SMALL, *hub.CODE, f"*{hub.TENSORS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
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
        source = Path(arguments.source).expanduser()
        if not source.is_dir():
            raise UserError(f"model.source {arguments.source} is not a directory; mend the path")
    else:
        source, commit = from_hub(
            arguments.source, arguments.revision, arguments.cache, arguments.trust_remote_code
        )
    files = wanted_files(source, arguments.trust_remote_code)
    check_whole(source, files)
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


def is_local(source: str) -> bool:
    """Tell whether a model source names a directory; a hub repository is owner/name."""
    return Path(source).expanduser().exists() or source.startswith(("/", ".", "~"))


def from_hub(repository: str, revision: str, cache: Path, code: bool) -> tuple[Path, str]:
    """Return the directory and the commit of a model of the hub, brought whole into the cache."""
    found = hub.find(repository, revision, cache)
    if found.commit != revision:
        print(
            f"model.revision {revision} of {repository} is today the commit {found.commit}, which this run "
            "has; to have it again, write it in place of the name",
            file=sys.stderr,
        )
    if not found.online:
        print(f"the hub is out of reach; {repository} is taken from {cache}", file=sys.stderr)
    return hub.bring(found, code), found.commit


def wanted_files(source: Path, code: bool) -> list[Path]:
    """Return the files of a model directory that a run needs."""
    patterns = (*hub.SMALL, *(hub.CODE if code else ()))
    files = {file for pattern in patterns for file in source.glob(pattern) if file.is_file()}
    if not any(file.name == "config.json" for file in files):
        raise UserError(f"{source} has no config.json; model.source must name a model directory")
    # Not every *.safetensors: some publish their tensors twice, under other names.
    return sorted(files | set(tensor_files(source)))


def check_whole(source: Path, files: list[Path]) -> None:
    """Stop when a tensor file is missing, cut short or not safetensors, or a JSON file is broken."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        if file.suffix == ".json" and not isinstance(read_json(file), dict):
            raise UserError(f"{file} is not a JSON object; restore it from where the model came")
    for file in tensor_files(source):
        try:
            with safe_open(file, framework="numpy") as tensors:
                tensors.keys()
        except FileNotFoundError:
            raise UserError(f"{file}, named in the index, is missing; download it again") from None
        except SafetensorError as error:
            raise UserError(
                f"{file} is not a whole safetensors file ({error}); download it again"
            ) from None


def check_code(source: Path) -> None:
    """Stop when the model names code of another repository, which each stage would fetch, unpinned."""
    for name in ("config.json", "tokenizer_config.json"):
        if not (source / name).is_file():
            continue
        for reference in read_json(source / name).get("auto_map", {}).values():
            for part in [reference] if isinstance(reference, str) else reference:
                if part and "--" in part:
                    raise UserError(
                        f"auto_map in {source / name} names code of another repository, {part}; copy that "
                        f"code beside the model and write {part.rpartition('--')[2]}"
                    )


if __name__ == "__main__":
    program(main)()
