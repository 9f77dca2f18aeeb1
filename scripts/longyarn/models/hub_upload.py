"""Uploads a model to the Hugging Face hub in one commit, and compares what is there afterwards."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from longyarn.core.errors import UserError, first_line
from longyarn.core.files import sha256
from longyarn.models import hub

# Of an earlier push: weights that are not part of this model any more would be found beside it.
STALE = (".safetensors", ".safetensors.index.json")


def check_destination(repository: str | None) -> None:
    """Stop where no repository is named, or there is no token to write to it with."""
    from huggingface_hub import get_token

    if not repository:
        raise UserError("export.repository is null; set it to owner/name on the hub to push there")
    if not get_token():
        raise UserError(
            f"there is no token to push to {repository} with; log in with `hf auth login`, or set HF_TOKEN"
        )


def upload(repository: str, private: bool, directory: Path, files: dict) -> str:
    """Make the repository where it is missing, commit the files to it, and return the commit.

    Where nothing has changed it is the commit that was there before.
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
    # Not upload_folder, which may make several commits.
    return api.create_commit(
        repository,
        [*added, *map(CommitOperationDelete, stale)],
        commit_message="A model made by Longyarn",
    ).oid


def check(repository: str, commit: str, directory: Path, files: dict) -> None:
    """Stop where the hub has not each file with the size and the hash of the manifest.

    Of a file outside LFS it knows git's hash alone, which is compared with that of the file here.
    """
    from huggingface_hub import HfApi

    info = HfApi().model_info(repository, revision=commit, files_metadata=True)
    there = {one.rfilename: one for one in info.siblings}
    for name, entry in files.items():
        found = there.get(Path(name).name)
        if found is None or found.size != entry["size"] or not same(found, directory, entry):
            raise UserError(
                f"{Path(name).name} of {repository} at {commit} is not the one of this run; push again"
            )


def same(found, directory: Path, entry: dict) -> bool:
    """Tell whether a file on the hub has the hash of the manifest's entry."""
    if found.lfs:
        return found.lfs.sha256 == entry["sha256"]
    file = directory / found.rfilename
    return sha256(file) == entry["sha256"] and hub.is_as_recorded(file, found)


@contextlib.contextmanager
def errors(repository: str) -> Iterator[None]:
    """Turn what the hub refuses, and its absence, into one sentence."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise UserError(
            f"export.repository {repository} is no name that the hub takes ({first_line(error)}); mend it"
        ) from None
    except ValueError as error:
        words = " ".join(str(error).split())
        if "README.md" not in words:  # an answer that is none
            raise UserError(f"the hub did not take {repository} ({words}); push again") from None
        raise UserError(  # with the hub's own words on the card
            f"the hub does not take the model card ({words}); mend section export"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise UserError(
                f"the hub does not let this token write to {repository} ({status}); make one with the right "
                "to write there, log in with `hf auth login`, or mend export.repository"
            ) from None
        raise UserError(
            f"the hub did not take {repository} ({first_line(error)}); push again, or mend export.repository"
        ) from None
    except PermissionError as error:
        if error.errno is not None:
            raise  # the disk's, not the storage's of the hub
        raise UserError(
            f"the hub does not let this token write to {repository} ({first_line(error)}); log in again with "
            "`hf auth login`, and push again"
        ) from None
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"the hub is out of reach ({first_line(error)}); push where there is a network"
        ) from None
