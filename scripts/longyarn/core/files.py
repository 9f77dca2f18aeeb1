"""Files: written atomically, hashed, linked, and checked for room on the disk."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from longyarn.core.errors import UserError

ROOT = Path(__file__).resolve().parents[3]  # of the workflow: Snakefile, scripts/, resources/ …


def link_or_copy(source: Path, target: Path) -> None:
    """Link a file, or what a symbolic link leads to, to a new place; copy it from another file system."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def link_weights(source: Path, directory: Path) -> None:
    """Put a model's files into a directory: the weights linked, and the small ones copied.

    Linked, a small file that is edited here would change there too.
    """
    files = sorted(file for file in source.glob("[!.]*") if file.is_file())
    disk = directory.stat().st_dev
    copied = [file for file in files if file.suffix != ".safetensors" or file.stat().st_dev != disk]
    require_space(directory, sum(file.stat().st_size for file in copied), "the model")
    for file in files:
        put = shutil.copyfile if file.suffix != ".safetensors" else link_or_copy
        put(file, directory / file.name)


def require_space(directory: Path, size: int, what: str) -> None:
    """Stop before the work starts when ``directory``'s disk cannot hold ``size`` more bytes."""
    existing = directory.resolve()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(
            f"no space left for {what}: {directory} has {free / 1e9:.2f} GB free and "
            f"{size / 1e9:.2f} GB are needed; free some or move the results to another disk"
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
    # An attempt that is taken for lost may still be writing the same file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict:
    """Read a JSON file, with one sentence when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run the stage that makes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore or rebuild it") from None


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Give a temporary directory that replaces ``path`` at once when the block ends without error."""
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
