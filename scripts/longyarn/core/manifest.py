"""Manifests: the small JSON file that is a stage's target and says what the stage made, from what.

A manifest lists each payload file with size and SHA-256, the settings, the SHA-256 of the input
manifests, the hash of the code and the versions of the libraries. It holds no time, host or
absolute path, so that two equal runs have equal manifests.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from longyarn.core import job_record
from longyarn.core.code_hash import code_hash
from longyarn.core.errors import UserError
from longyarn.core.files import read_json, sha256, write_json

LIBRARIES = (
    "torch", "transformers", "deepspeed", "peft", "accelerate", "safetensors", "tokenizers", "numpy",
)  # fmt: skip

# Keys of settings and facts whose value may be a path of this machine.
PATHS = ("source", "files", "chat_template")


def write(
    path: Path,
    *,
    script: Path,
    settings: dict,
    inputs: dict[str, Path],
    files: list[Path],
    facts: dict,
) -> dict:
    """Write a stage's manifest, atomically and last, when its payload is complete.

    Before it goes the record of where and when the stage ran (longyarn/core/job_record.py).

    ``files`` lie below the manifest's directory; ``facts`` are the figures that later stages and
    the report read. Of an absolute path in ``settings`` or ``facts`` the last part is written.
    """
    path = Path(path)
    manifest = {
        "stage": Path(script).stem,
        "settings": portable(settings),
        "inputs": {name: sha256(source) for name, source in sorted(inputs.items())},
        "files": {
            Path(os.path.relpath(file, path.parent)).as_posix(): {
                "size": Path(file).stat().st_size,
                "sha256": sha256(file),
            }
            for file in sorted(map(Path, files))
        },
        "facts": portable(facts),
        "code": code_hash(script),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    job_record.write_environment(path)
    write_json(path, manifest)
    return manifest


def portable(value: object, key: str | None = None) -> object:
    """Return a copy in which a path of this machine, under a key of ``PATHS``, is its last part only."""
    if isinstance(value, dict):
        return {name: portable(one, name) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [portable(one, key) for one in value]
    if key in PATHS and isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name
    return value


def read(path: Path) -> dict:
    """Read a manifest and make sure that its payload is there; raise ``UserError`` otherwise."""
    manifest = read_json(path)
    broken = problems(path, manifest)
    if broken:
        raise UserError(f"{broken[0]}; delete {path} and run again, so that it is made anew")
    return manifest


def read_facts(path: Path) -> dict:
    """Read the figures of a manifest; its payload may have been purged since."""
    return read_json(path)["facts"]


def problems(path: Path, manifest: dict) -> list[str]:
    """Return a sentence for each payload file that is missing or has another size."""
    found = []
    for name, entry in manifest["files"].items():
        file = Path(path).parent / name
        if not file.is_file():
            found.append(f"{file}, listed in {path}, is missing")
        elif file.stat().st_size != entry["size"]:
            size = file.stat().st_size
            found.append(f"{file} has {size} bytes where {path} lists {entry['size']}")
    return found


def content_hash(path: Path, facts: Iterable[str] | None = None) -> str:
    """Return a hash of a manifest's payload and of these of its facts, of all where none are named.

    Two manifests that differ in how the same files came about have the same.
    """
    manifest = read_json(path)
    kept = {key: value for key, value in manifest["facts"].items() if facts is None or key in facts}
    text = json.dumps([manifest["files"], kept], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def set_aside_incomplete(manifests: Iterable[Path]) -> list[str]:
    """Rename each manifest whose payload is not whole; return a sentence for each.

    Snakemake sees a deleted directory but not a file deleted inside one, which is how scratch file
    systems purge. Without its manifest the stage counts as not done, and is made anew where needed.
    """
    notes = []
    for path in map(Path, manifests):
        if not path.is_file():
            continue
        try:
            broken = problems(path, read_json(path))
        except (UserError, KeyError, TypeError, AttributeError) as error:
            broken = [f"{path} is not a manifest ({error})"]
        if broken:
            os.replace(path, path.with_name(path.name + ".incomplete"))
            notes.append(broken[0])
    return notes
