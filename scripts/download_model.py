"""Bring the base model: from a local directory, or from the Hugging Face hub at a pinned revision.

Only safetensors, the configuration and the tokenizer are taken. Every file is checked: against the
hub's SHA-256 where the hub gives one, and for being whole in any case.
"""

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from longyarn import manifest, models
from longyarn.cli import UserError, first_line, program, require_space

WANTED = (
    "*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "chat_template*", "LICENSE*", "*.py",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, help="local directory or hub repository")
    parser.add_argument("--revision", default="", help="hub commit, 40 hexadecimal digits")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="keep the model's own code"
    )
    parser.add_argument("--cache", type=Path, required=True, help="directory of hub downloads")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()

    if is_local(arguments.source):
        source = Path(arguments.source).expanduser()
        if not source.is_dir():
            raise UserError(f"model.source {arguments.source} is not a directory; mend the path")
    else:
        source = from_hub(arguments.source, arguments.revision, arguments.cache)
    files = wanted_files(source, arguments.trust_remote_code)
    check_whole(source, files)
    config = manifest.read_json(source / "config.json")
    if arguments.trust_remote_code:
        check_code(source)
    with manifest.new_directory(arguments.output) as directory:
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
            "revision": arguments.revision or None,
            "trust_remote_code": arguments.trust_remote_code,
            "model_type": config.get("model_type"),
            "bytes": sum(file.stat().st_size for file in files),
        },
    )


def is_local(source: str) -> bool:
    """Tell whether a model source names a directory; a hub repository is owner/name."""
    return Path(source).expanduser().exists() or source.startswith(("/", ".", "~"))


def from_hub(repository: str, revision: str, cache: Path) -> Path:
    """Download what is wanted of a hub repository, resuming, and return the snapshot's directory."""
    from huggingface_hub import snapshot_download

    info = hub_info(repository, revision)
    with hub_errors(repository, revision):
        snapshot = Path(
            snapshot_download(
                repository, revision=revision, cache_dir=cache / "hub", allow_patterns=list(WANTED)
            )
        )
    for sibling in info.siblings:
        file = snapshot / sibling.rfilename
        if (
            sibling.lfs is not None
            and file.is_file()
            and manifest.sha256(file) != sibling.lfs.sha256
        ):
            file.resolve().unlink()
            raise UserError(
                f"{file} differs from the hub's SHA-256; run again, and if it differs again do not trust "
                "the source"
            )
    return snapshot


def hub_info(repository: str, revision: str):
    """Return the hub's record of a repository at a revision, with the size of each file."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    if not revision:
        raise UserError(
            f"model.revision is needed for the hub repository {repository}: the 40 hexadecimal digits "
            "of a commit, so that the run can be repeated (or is model.source a mistyped directory?)"
        )
    with hub_errors(repository, revision):
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=10)
        if any(sibling.rfilename == "config.json" for sibling in info.siblings):
            # Anyone sees the record of a gated repository; a file of it tells whether we may have it.
            get_hf_file_metadata(
                hf_hub_url(repository, "config.json", revision=revision), timeout=10
            )
    return info


@contextlib.contextmanager
def hub_errors(repository: str, revision: str) -> Iterator[None]:
    """Turn what the hub refuses, and its absence, into one sentence."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"the hub gates {repository}: accept its licence on its page, then log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"the hub has no {repository}, or it is private: mend model.source, or log in with "
            "`hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"the hub's {repository} has no revision {revision}; mend model.revision"
        ) from None
    except HFValidationError:
        raise UserError(
            f"model.source {repository} is neither a directory that exists nor owner/name on the hub; "
            "mend it"
        ) from None
    except (HTTPError, ConnectionError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"the hub did not give {repository} at {revision} ({first_line(error)}); run `snakemake "
            "prefetch` where there is a network, or let model.source name a directory"
        ) from None


def wanted_files(source: Path, code: bool) -> list[Path]:
    """Return the files of a model directory that a run needs."""
    files = {file for pattern in WANTED for file in source.glob(pattern) if file.is_file()}
    if not code:
        files = {file for file in files if file.suffix != ".py"}
    if not any(file.name == "config.json" for file in files):
        raise UserError(f"{source} has no config.json; model.source must name a model directory")
    return sorted(files)


def check_whole(source: Path, files: list[Path]) -> None:
    """Stop when a tensor file is missing, cut short or not safetensors, or a JSON file is broken."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        if file.suffix == ".json" and not isinstance(manifest.read_json(file), dict):
            raise UserError(f"{file} is not a JSON object; restore it from where the model came")
    for file in models.tensor_files(source):
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
        for reference in manifest.read_json(source / name).get("auto_map", {}).values():
            for part in [reference] if isinstance(reference, str) else reference:
                if part and "--" in part:
                    raise UserError(
                        f"auto_map in {source / name} names code of another repository, {part}; copy that "
                        f"code beside the model and write {part.rpartition('--')[2]}"
                    )


def link_or_copy(source: Path, target: Path) -> None:
    """Link a file into the run, which costs no disk, or copy it from another file system."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


if __name__ == "__main__":
    program(main)()
