"""Turns what the Hugging Face hub refuses into one sentence that names the config key to correct."""

import contextlib
from collections.abc import Iterator

from longyarn.core.errors import UserError, first_line


class Unreachable(UserError):
    """The hub does not answer; the cache may have what is wanted."""


@contextlib.contextmanager
def hub_errors(
    repository: str,
    key: str,
    revision: str | None = None,
    revision_key: str | None = None,
    *,
    dataset: bool = False,
    write: bool = False,
) -> Iterator[None]:
    """Raise a ``UserError`` for each refusal of the hub, and ``Unreachable`` if it does not answer.

    ``key`` and ``revision_key`` are the config keys that name ``repository`` and ``revision``.
    ``dataset``: the repository is a data set. ``write``: the work inside uploads; without it, it
    downloads. Errors of the local disk pass unchanged.
    """
    from httpx2 import HTTPError
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError

    try:
        yield
    except (HTTPError, OSError, ValueError, RevisionResolutionError) as error:
        if write:
            found = _upload_error(error, repository, key)
        else:
            name = f"the data set {repository}" if dataset else repository
            if isinstance(error, HFValidationError):
                found = _invalid_name(repository, key)
            else:
                found = _download_error(error, name, key, revision, revision_key or key)
        if found is None:
            raise
        raise found from None


def _download_error(
    error: Exception, name: str, key: str, revision: str | None, revision_key: str
) -> UserError | None:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        remedy = "log in with `hf auth login` to an account that has access"
        if error.response.status_code == 403:
            remedy = (
                "wait for access, or use the token of an account that has it (your token is valid, but it "
                "has no access)"
            )
        return UserError(f"the hub gates {name}: accept its terms on its page, then {remedy}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"the hub does not have {name}, or it is private: correct {key}, or log in with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{name} has no revision {revision} on the hub; correct {revision_key}")
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return UserError(
            f"the hub does not accept your token for {name}; create one with the right to read it, and log "
            "in with `hf auth login`"
        )
    answers = (ConnectionError, errors.LocalEntryNotFoundError)
    if isinstance(error, ValueError) or (_is_of_disk(error) and not isinstance(error, answers)):
        return None
    return unreachable(name, key, error, revision)


def _invalid_name(repository: str, key: str) -> UserError:
    kinds = "neither an existing directory nor" if key.endswith(".source") else "not"
    return UserError(f"{key} {repository} is {kinds} owner/name on the hub; correct it")


def unreachable(name: str, key: str, error: Exception, revision: str | None = None) -> Unreachable:
    """Return the error for a hub that does not answer a download."""
    wanted = f"{name} at {revision}" if revision else name
    directory = f", or let {key} name a directory" if key.endswith(".source") else ""
    return Unreachable(
        f"the hub did not deliver {wanted} ({first_line(error)}); complete files are kept, so run again, "
        f"or run `snakemake prefetch` on a machine with a network{directory}"
    )


def _upload_error(error: Exception, repository: str, key: str) -> UserError | None:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HFValidationError):
        return UserError(
            f"{key} {repository} is not a name that the hub accepts ({first_line(error)}); correct it"
        )
    if isinstance(error, ValueError):
        words = " ".join(str(error).split())
        if "README.md" in words:  # followed by the hub's own words about the card
            return UserError(
                f"the hub does not accept the model card ({words}); correct section {key.split('.')[0]}"
            )
        # The answer could not be read.
        return UserError(f"the hub did not accept {repository} ({words}); push again")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403, 404):
            return UserError(
                f"the hub does not let this token write to {repository} ({status}); create one with the "
                f"right to write there, log in with `hf auth login`, or correct {key}"
            )
        return UserError(
            f"the hub did not accept {repository} ({first_line(error)}); push again, or correct {key}"
        )
    if isinstance(error, PermissionError) and error.errno is None:  # hf_xet, for a refused token
        return UserError(
            f"the hub does not let this token write to {repository} ({first_line(error)}); log in again "
            "with `hf auth login`, and push again"
        )
    if isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError)):
        return None
    return Unreachable(
        f"the hub is out of reach ({first_line(error)}); push from a machine with a network"
    )


def _is_of_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno is not None
