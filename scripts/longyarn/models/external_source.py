"""Where an externally trained model comes from: a local directory or the Hugging Face hub."""

from pathlib import Path

from longyarn.core.errors import UserError
from longyarn.core.files import located
from longyarn.models import hub
from longyarn.models.source_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def local(name: str) -> Path:
    """Return the directory that training.source names; stop unless it holds an adapter or a model."""
    source = located(name)
    if not any((source / file).is_file() for file in (ADAPTER_CONFIG, "config.json")):
        raise UserError(
            f"training.source {name} is not a directory with an {ADAPTER_CONFIG} or a config.json; correct "
            "the path"
        )
    return source


def locate(repository: str, revision: str, cache: Path) -> hub.Found:
    """Find an adapter or a model on the hub."""
    found = hub.locate(repository, revision, cache, section="training")
    if ADAPTER_CONFIG not in found.files:
        hub.check_is_model(found)
    elif ADAPTER_WEIGHTS not in found.files:
        raise UserError(
            f"{repository} at {found.commit} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; Longyarn "
            "reads safetensors only, so choose a revision that has them"
        )
    return found


def download(repository: str, revision: str, cache: Path) -> tuple[Path, str]:
    """Download an adapter or a model from the hub; return its directory and its commit."""
    found = locate(repository, revision, cache)
    if ADAPTER_CONFIG in found.files:
        return hub.download_adapter(found), found.commit
    return hub.download(found, code=False), found.commit
