"""The Hugging Face hub: a model at one commit, only the files that a run needs, each checked.

The client (huggingface_hub) downloads files side by side, goes on after a cut, and keeps each file that
came whole, so the next attempt brings the rest. Every file is then compared with the hub's hash: SHA-256
for what is in LFS, git's blob hash for all else. The cache keeps the record of these hashes, so that they
are compared without a network too.
"""

import contextlib
import functools
import glob
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longyarn.core.errors import UserError, first_line
from longyarn.core.files import require_space, sha256
from longyarn.models.source_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CODE,
    SAFETENSORS,
    SETTINGS,
    tensor_files,
)

NESTED = ["*/*"]  # a pattern's * matches a slash too


class Unreachable(UserError):
    """The hub does not answer; the cache may have what is wanted."""


@dataclass(frozen=True)
class Found:
    """A model at one commit. ``files``: the hub's record of each, with size and hashes, by name.

    ``online`` is False where the hub is out of reach and the records are those of the last download.
    """

    repository: str
    revision: str  # as it was asked for: a commit, a branch or a tag
    commit: str
    files: dict
    cache: Path
    online: bool


def find(repository: str, revision: str, cache: Path) -> Found:
    """Find a model on the hub, and make sure that it may be downloaded; or find it in the cache."""
    found = locate(repository, revision, cache)
    check_it_is_a_model(found)
    return found


def locate(repository: str, revision: str, cache: Path) -> Found:
    """Find a repository, whatever it holds, on the hub or in the cache."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    if not revision:
        raise UserError(
            f"model.revision is needed for the hub repository {repository}: the 40 hexadecimal digits "
            "of a commit, so that the run can be repeated (or is model.source a mistyped directory?)"
        )
    try:
        commit, files = _record(repository, revision, cache)
        online = True
    except Unreachable as error:
        try:
            commit = _commit(repository, revision, cache, local_files_only=True)
            files = get_cached_repo_tree(repository, revision=commit, cache_dir=cache / "hub")
            online = False
        except (Unreachable, CachedRepoTreeNotFoundError):
            raise error from None
    return Found(repository, revision, commit, {f.rfilename: f for f in files}, cache, online)


def _commit(repository: str, revision: str, cache: Path, **more) -> str:
    """Return the commit that a branch or a tag names; the cache notes it for when there is no network."""
    from huggingface_hub import resolve_revision

    with errors(repository, revision):
        folder = cache / "hub"
        return resolve_revision(repository, revision=revision, cache_dir=folder, **more).resolved


def _record(repository: str, revision: str, cache: Path) -> tuple[str, list]:
    """Return the commit and the hub's record of each file; raise ``UserError`` without access."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    commit = _commit(repository, revision, cache)
    with errors(repository, revision):
        info = HfApi().model_info(repository, revision=commit, files_metadata=True, timeout=10)
        if any(sibling.rfilename == "config.json" for sibling in info.siblings):
            # Anyone sees the record of a gated repository; a file of it tells whether we may have it.
            get_hf_file_metadata(hf_hub_url(repository, "config.json", revision=commit), timeout=10)
    return commit, info.siblings


def check_it_is_a_model(found: Found) -> None:
    """Refuse a repository without safetensors before anything of it is downloaded."""
    where = f"{found.repository} at {found.commit}"
    if "config.json" not in found.files:
        raise UserError(
            f"{where} has no config.json, so it is no model that transformers reads; mend model.source or "
            "model.revision"
        )
    if not found.files.keys() & {"model.safetensors", "model.safetensors.index.json"}:
        raise UserError(
            f"{where} has no model.safetensors; Longyarn loads safetensors only, so choose a revision "
            "that has them, or convert the weights and let model.source name their directory"
        )


def bring(found: Found, code: bool) -> Path:
    """Download what a run needs of a model, and return the directory; files that are here stay.

    ``code``: the model's own Python files too. Where the hub is out of reach this only makes sure that
    nothing is missing. Raises ``UserError`` for that, and for a file that differs from its hash.
    """
    remove_leftovers(found)
    snapshot = _fetch(found, [*SETTINGS, *(CODE if code else ())])
    here = (file for file in snapshot.iterdir() if file.name in found.files)
    check_hashes(found, sorted(file for file in here if file.suffix != SAFETENSORS))
    tensors = [snapshot / "model.safetensors"]
    if (snapshot / "model.safetensors.index.json").exists():
        tensors = tensor_files(snapshot)
    for file in tensors:
        if file.name not in found.files:
            raise UserError(
                f"{found.repository} at {found.commit} lacks {file.name}, which its index names; choose "
                "another revision"
            )
    missing = sum(found.files[file.name].size for file in tensors if not file.exists())
    require_space(found.cache, missing, found.repository)
    _fetch(found, [glob.escape(file.name) for file in tensors])
    check_hashes(found, tensors)
    return snapshot


def bring_adapter(found: Found) -> Path:
    """Download an adapter in PEFT's form with what lies beside it, and return the directory, as ``bring``."""
    remove_leftovers(found)
    snapshot = _fetch(found, [*SETTINGS, ADAPTER_CONFIG, ADAPTER_WEIGHTS])
    check_hashes(found, sorted(file for file in snapshot.iterdir() if file.name in found.files))
    return snapshot


def _fetch(found: Found, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with errors(found.repository, found.revision):
        return Path(
            snapshot_download(
                found.repository,
                revision=found.commit,
                cache_dir=found.cache / "hub",
                allow_patterns=patterns,
                ignore_patterns=NESTED,
                local_files_only=not found.online,
            )
        )


def remove_leftovers(found: Found) -> None:
    """Remove what killed downloads left: the client goes on with whole files only.

    Another run may be downloading into the same cache, and on some cluster file systems locks tell nothing;
    so what was written to within an hour stays.
    """
    folder = f"models--{found.repository.replace('/', '--')}"
    for partial in (found.cache / "hub" / folder / "blobs").glob("*.incomplete"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > 3600:
                partial.unlink()


def check_hashes(found: Found, files: list[Path]) -> None:
    """Compare files with the hub's hashes; a wrong one is taken out of the cache and refused."""
    for file in files:
        blob = file.resolve()
        if not is_as_recorded(blob, found.files[file.name]):
            blob.unlink()
            file.unlink(missing_ok=True)
            raise UserError(
                f"{file.name} of {found.repository} differs from the hub's hash and was removed; run again, "
                "and if it differs again do not trust the source"
            )


def is_as_recorded(file: Path, record) -> bool:
    """Tell whether a file has the hash that the hub's record of it gives.

    The record has the SHA-256 of a file in LFS. Without it, as in the cache's own records, its blob id
    is git's hash of the file or, in LFS, of the pointer to it, which holds the SHA-256.
    """
    digest = sha256(file)
    if record.lfs:
        return digest == record.lfs.sha256
    size = file.stat().st_size
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()
    )
    if record.blob_id == hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest():
        return True
    with open(file, "rb") as content:
        of_content = functools.partial(hashlib.sha1, b"blob %d\0" % size)
        return record.blob_id == hashlib.file_digest(content, of_content).hexdigest()


@contextlib.contextmanager
def errors(repository: str, revision: str) -> Iterator[None]:
    """Turn what the hub refuses, and its absence, into one sentence."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )

    try:
        yield
    except GatedRepoError as error:
        known = error.response.status_code == 403
        raise UserError(
            f"the hub gates {repository}: accept its licence on its page, then "
            + (
                "wait for access, or use the token of an account that has it (your token is valid, but "
                "has none)"
                if known
                else "log in with `hf auth login`"
            )
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
    except (HTTPError, OSError, RevisionResolutionError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise UserError(
                f"the hub does not take your token for {repository}; make a new one with the right to "
                "read it and log in with `hf auth login`"
            ) from None
        if isinstance(error, OSError) and error.errno is not None and not isinstance(
            error, (ConnectionError, LocalEntryNotFoundError)
        ):  # fmt: skip
            raise  # the disk's, not the hub's
        raise Unreachable(
            f"the hub did not give {repository} at {revision} ({first_line(error)}); what came whole is "
            "kept, so run again, run `snakemake prefetch` where there is a network, or let model.source "
            "name a directory"
        ) from None
