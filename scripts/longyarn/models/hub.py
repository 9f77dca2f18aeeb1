"""Downloads a model from the Hugging Face hub: at one commit, only the files that a run needs, checked.

The client (huggingface_hub) downloads several files at once, resumes after an interruption, and keeps each
complete file, so that the next attempt downloads only the rest. Every file is then compared with the hub's
hash: SHA-256 for a file in LFS, git's blob hash for all others. The cache keeps these hashes, so that the
files can be compared without a network too.
"""

import contextlib
import functools
import glob
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from longyarn.core.errors import UserError
from longyarn.core.files import require_space, sha256
from longyarn.models.hub_errors import Unreachable, hub_errors
from longyarn.models.source_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CODE,
    SAFETENSORS,
    SETTINGS,
    tensor_files,
)

NESTED = ["*/*"]  # a pattern's * matches a slash too


@dataclass(frozen=True)
class Found:
    """A repository at one commit."""

    repository: str
    revision: str  # as the user wrote it: a commit, a branch or a tag
    commit: str
    files: dict  # by name: the hub's record of each file, with its size and hashes
    cache: Path
    online: (
        bool  # False if the hub is out of reach; the records are then those of the last download
    )
    section: str  # config section that names the repository, for error messages

    def errors(self):
        """Return the context manager that turns the hub's refusals into one sentence."""
        return errors(self.repository, self.revision, self.section)


def errors(repository: str, revision: str, section: str):
    """Return the context manager for a repository that ``section``.source and .revision name."""
    return hub_errors(repository, f"{section}.source", revision, f"{section}.revision")


def find(repository: str, revision: str, cache: Path) -> Found:
    """Find a model on the hub and check that we may download it; without a network, find it in the cache."""
    found = locate(repository, revision, cache)
    check_is_model(found)
    return found


def locate(repository: str, revision: str, cache: Path, section: str = "model") -> Found:
    """Find a repository on the hub or in the cache, whatever it holds.

    ``section`` is the config section whose keys ``source`` and ``revision`` name it.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    if not revision:
        raise UserError(
            f"{section}.revision is needed for the hub repository {repository}: the 40 hexadecimal digits "
            f"of a commit, so that the run can be repeated (or is {section}.source a mistyped directory?)"
        )
    try:
        commit, files = _record(repository, revision, cache, section)
        online = True
    except Unreachable as error:
        try:
            commit = _commit(repository, revision, cache, section, local_files_only=True)
            files = get_cached_repo_tree(repository, revision=commit, cache_dir=cache / "hub")
            online = False
        except (Unreachable, CachedRepoTreeNotFoundError):
            raise error from None
    records = {file.rfilename: file for file in files}
    return Found(repository, revision, commit, records, cache, online, section)


def _commit(repository: str, revision: str, cache: Path, section: str, **more) -> str:
    """Return the commit that a branch or a tag names; the cache records it for use without a network."""
    from huggingface_hub import resolve_revision

    with errors(repository, revision, section):
        folder = cache / "hub"
        return resolve_revision(repository, revision=revision, cache_dir=folder, **more).resolved


def _record(repository: str, revision: str, cache: Path, section: str) -> tuple[str, list]:
    """Return the commit and the hub's record of each file; raise ``UserError`` without access."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    commit = _commit(repository, revision, cache, section)
    with errors(repository, revision, section):
        info = HfApi().model_info(repository, revision=commit, files_metadata=True, timeout=10)
        if any(sibling.rfilename == "config.json" for sibling in info.siblings):
            # Anyone can read the record of a gated repository. Whether we have access shows at a file.
            get_hf_file_metadata(hf_hub_url(repository, "config.json", revision=commit), timeout=10)
    return commit, info.siblings


def check_is_model(found: Found) -> None:
    """Refuse a repository without safetensors before downloading anything."""
    where = f"{found.repository} at {found.commit}"
    if "config.json" not in found.files:
        raise UserError(
            f"{where} has no config.json, so transformers cannot load it; correct {found.section}.source or "
            f"{found.section}.revision"
        )
    if not found.files.keys() & {"model.safetensors", "model.safetensors.index.json"}:
        raise UserError(
            f"{where} has no model.safetensors; Longyarn loads safetensors only, so choose a revision "
            f"that has them, or convert the weights and let {found.section}.source name their directory"
        )


def download(found: Found, code: bool) -> Path:
    """Download the files of a model that a run needs, and return their directory.

    Files that are in the cache are not downloaded again. ``code``: the model's own Python files too. If
    the hub is out of reach, this only checks that the cache has every file. Raises ``UserError`` if one is
    missing or differs from its hash.
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


def download_adapter(found: Found) -> Path:
    """Download an adapter in PEFT's format and the files beside it, as ``download`` does."""
    remove_leftovers(found)
    snapshot = _fetch(found, [*SETTINGS, ADAPTER_CONFIG, ADAPTER_WEIGHTS])
    check_hashes(found, sorted(file for file in snapshot.iterdir() if file.name in found.files))
    return snapshot


def _fetch(found: Found, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with found.errors():
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
    """Remove partial files of interrupted downloads, because the client does not resume them.

    Another run may be downloading into the same cache, and on some cluster file systems locks do not work.
    So files that were written to within the last hour stay.
    """
    folder = f"models--{found.repository.replace('/', '--')}"
    for partial in (found.cache / "hub" / folder / "blobs").glob("*.incomplete"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > 3600:
                partial.unlink()


def check_hashes(found: Found, files: list[Path]) -> None:
    """Compare files with the hub's hashes; remove a wrong one from the cache and stop."""
    for file in files:
        blob = file.resolve()
        if not is_as_recorded(blob, found.files[file.name]):
            blob.unlink()
            file.unlink(missing_ok=True)
            raise UserError(
                f"{file.name} of {found.repository} differs from the hub's hash and was removed; run again, "
                "and do not trust the source if it differs again"
            )


def is_as_recorded(file: Path, record) -> bool:
    """Tell whether a file has the hash that the hub's record of it gives.

    The record has the SHA-256 of a file in LFS. Where it has none, as in the cache's own records, its blob
    id is git's hash of the file or, for a file in LFS, of the pointer to it, which holds the SHA-256.
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
