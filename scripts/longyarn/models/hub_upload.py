"""Uploads a model to the Hugging Face hub in one commit, and compares what is there afterwards."""

import sys
from pathlib import Path

from longyarn.core.errors import UserError
from longyarn.core.files import sha256
from longyarn.models import hub

# Weights of an earlier push that are not part of this model. They must not stay beside it.
STALE = (".safetensors", ".safetensors.index.json")


def check_destination(repository: str | None) -> None:
    """Stop unless a repository is named and there is a token to write to it."""
    from huggingface_hub import get_token

    if not repository:
        raise UserError("export.repository is null; set it to owner/name on the hub to push there")
    if not get_token():
        raise UserError(
            f"there is no token to push to {repository}; log in with `hf auth login`, or set HF_TOKEN"
        )


def upload(repository: str, private: bool, directory: Path, files: dict) -> str:
    """Commit the files to the repository, which is created if it is missing, and return the commit.

    If nothing has changed, the hub returns the commit that was there before.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    api.create_repo(repository, private=private, repo_type="model", exist_ok=True)
    names = {Path(name).name for name in files}
    stale = [
        name
        for name in api.list_repo_files(repository)
        if name.endswith(STALE) and "/" not in name and name not in names
    ]
    added = [CommitOperationAdd(name, directory / name) for name in sorted(names)]
    # upload_folder may make several commits.
    return api.create_commit(
        repository,
        [*added, *map(CommitOperationDelete, stale)],
        commit_message="A model made by Longyarn",
    ).oid


def check(repository: str, commit: str, directory: Path, files: dict) -> None:
    """Stop unless the hub has each file with the size and the hash of the manifest.

    For a file outside LFS the hub knows only git's hash, which is compared with that of the local file.
    """
    from huggingface_hub import HfApi

    info = HfApi().model_info(repository, revision=commit, files_metadata=True)
    there = {record.rfilename: record for record in info.siblings}
    for name, entry in files.items():
        found = there.get(Path(name).name)
        if found is None or found.size != entry["size"] or not same(found, directory, entry):
            raise UserError(
                f"{Path(name).name} of {repository} at {commit} differs from the one of this run; push again"
            )


def same(found, directory: Path, entry: dict) -> bool:
    """Tell whether a file on the hub has the hash of the manifest's entry."""
    if found.lfs:
        return found.lfs.sha256 == entry["sha256"]
    file = directory / found.rfilename
    return sha256(file) == entry["sha256"] and hub.is_as_recorded(file, found)
