"""Manifests: the small JSON files that are the stages' targets and say what each stage made, from what.

A manifest lists each payload file with its size and SHA-256, the settings, the SHA-256 of the input
manifests, the hash of the code, and the versions of the libraries. It holds no time, host, or absolute
path, so two equal runs have equal manifests.
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

# Keys of settings and facts whose value may be an absolute path on this machine.
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
    """Write a stage's manifest atomically. A stage does this last, when its payload is complete.

    The record of where and when the stage ran is written first (longyarn/core/job_record.py).

    ``files`` lie below the manifest's directory. ``facts`` are the figures that later stages and the
    report read. Of an absolute path in ``settings`` or ``facts``, only the last part is written.
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
    """Return a copy in which each absolute path under a key of ``PATHS`` is reduced to its last part."""
    if isinstance(value, dict):
        return {name: portable(one, name) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [portable(one, key) for one in value]
    if key in PATHS and isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name
    return value


def read(path: Path) -> dict:
    """Read a manifest and check that its payload is there. Raises ``UserError`` if it is not."""
    manifest = read_json(path)
    broken = problems(path, manifest)
    if broken:
        raise UserError(f"{broken[0]}; delete {path} and run again, so that its stage runs again")
    return manifest


def read_facts(path: Path) -> dict:
    """Read the facts of a manifest, whether or not its payload is still there."""
    return read_json(path)["facts"]


def problems(path: Path, manifest: dict) -> list[str]:
    """Return a sentence for each payload file that is missing or has a different size."""
    found = []
    for name, entry in manifest["files"].items():
        file = Path(path).parent / name
        if not file.is_file():
            found.append(f"{file}, listed in {path}, is missing")
        elif file.stat().st_size != entry["size"]:
            size = file.stat().st_size
            found.append(f"{file} has {size} bytes, but {path} lists {entry['size']}")
    return found


def content_hash(path: Path, facts: Iterable[str] | None = None) -> str:
    """Return a hash of a manifest's payload and of the named facts (all facts by default).

    Two manifests have the same hash if their files are equal, however those files came about.
    """
    manifest = read_json(path)
    kept = {key: value for key, value in manifest["facts"].items() if facts is None or key in facts}
    text = json.dumps([manifest["files"], kept], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
