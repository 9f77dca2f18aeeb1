"""Files: atomic writing, hashes, hard links, and checks for free disk space."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from longyarn.core.errors import UserError

ROOT = (
    Path(__file__).resolve().parents[3]
)  # the directory of the workflow, with Snakefile, scripts/, and resources/


def located(name: str | Path) -> Path:
    """Return a path that the configuration names.

    A relative path starts at the working directory. If nothing is there, it may name a file that comes with
    the workflow, such as ``resources/micro-base``, and starts at the workflow's directory.
    """
    path = Path(name).expanduser()
    own = ROOT / path
    return from_here(own) if own.exists() and not path.exists() else path


def from_here(path: Path) -> Path:
    """Return a path relative to the working directory if it lies below it.

    So a directory that holds both the workflow and its runs can be moved, and no job runs again.
    """
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file to a new place, or copy it to another file system. Follows symbolic links."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def link_weights(source: Path, directory: Path) -> None:
    """Put the files of a model into a directory: weights are hard-linked, small files are copied.

    A small file is not linked, because editing one copy would change the other.
    """
    files = sorted(file for file in source.glob("[!.]*") if file.is_file())
    disk = directory.stat().st_dev
    copied = [file for file in files if file.suffix != ".safetensors" or file.stat().st_dev != disk]
    require_space(directory, sum(file.stat().st_size for file in copied), "the model")
    for file in files:
        put = shutil.copyfile if file.suffix != ".safetensors" else link_or_copy
        put(file, directory / file.name)


def require_space(directory: Path, size: int, what: str) -> None:
    """Raise ``UserError`` if the disk of ``directory`` cannot hold ``size`` more bytes."""
    existing = directory.resolve()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(
            f"no space left for {what}: {directory} has {free / 1e9:.2f} GB free, and "
            f"{size / 1e9:.2f} GB are needed; free some space, or move the results to another disk"
        )


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically: a reader sees the whole file or none."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a reader sees the whole file or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another attempt at this job may still be alive and write the same file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict:
    """Read a JSON file. Raises ``UserError`` if it is missing or is not valid JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run the stage that makes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore or rebuild it") from None


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces ``path`` at once if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    partial.chmod(0o755)
    try:
        yield partial
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
