"""Where an externally trained model comes from: a local directory or the Hugging Face hub."""

from pathlib import Path

from longyarn.core.errors import UserError
from longyarn.core.files import located
from longyarn.models import hub
from longyarn.models.source_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def local(name: str) -> Path:
    """Return the directory that training.source names; stop where nothing lies there."""
    source = located(name)
    if not any((source / file).is_file() for file in (ADAPTER_CONFIG, "config.json")):
        raise UserError(
            f"training.source {name} is no directory with an {ADAPTER_CONFIG} or a config.json; mend the path"
        )
    return source


def locate(repository: str, revision: str, cache: Path) -> hub.Found:
    """Find what was trained on the hub: an adapter or a model."""
    try:
        found = hub.locate(repository, revision, cache)
        if ADAPTER_CONFIG not in found.files:
            hub.check_it_is_a_model(found)
    except UserError as error:  # it speaks of the base's keys
        words = str(error).replace("model.source", "training.source")
        raise UserError(words.replace("model.revision", "training.revision")) from None
    if ADAPTER_CONFIG in found.files and ADAPTER_WEIGHTS not in found.files:
        raise UserError(
            f"{repository} at {found.commit} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; Longyarn "
            "reads safetensors only, so choose a revision that has them"
        )
    return found


def download(repository: str, revision: str, cache: Path) -> tuple[Path, str]:
    """Return the directory and the commit of what was trained, brought whole from the hub."""
    found = locate(repository, revision, cache)
    brought = (
        hub.bring_adapter(found) if ADAPTER_CONFIG in found.files else hub.bring(found, code=False)
    )
    return brought, found.commit
