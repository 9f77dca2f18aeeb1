"""Manifests: the small JSON file that is a stage's target and says what the stage made, from what.

A manifest lists each payload file with size and SHA-256, the settings, the SHA-256 of the input
manifests, the hash of the code and the versions of the libraries. It holds no time, host or
absolute path, so that two equal runs have equal manifests.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from longyarn import environment
from longyarn.cli import UserError, disk_is_full, first_line

LIBRARIES = (
    "torch", "transformers", "deepspeed", "peft", "accelerate", "safetensors", "tokenizers", "numpy",
)  # fmt: skip

# Keys of settings and facts whose value may be a path of this machine.
PATHS = ("source", "files", "chat_template")


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_hash(script: Path) -> str:
    """Return a hash of what a script does: its syntax tree and those of the modules it imports.

    Comments, docstrings and layout do not count, so that improving them never retrains a model.
    Only our own modules count (those that lie beside the script); libraries have versions.
    """
    root = Path(script).resolve().parent
    digest = hashlib.sha256()
    for path, syntax in sorted(_local_sources(Path(script).resolve(), root).items()):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(syntax.encode())
    return digest.hexdigest()[:16]


def _local_sources(script: Path, root: Path) -> dict[Path, str]:
    """Return what the script and, transitively, the modules under ``root`` that it imports say."""
    found: dict[Path, str] = {}
    pending = [script]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found[path], names = _syntax(path.read_text(encoding="utf-8"), str(path))
        candidates = (root / (name.replace(".", "/") + ".py") for name in names)
        pending.extend(candidate for candidate in candidates if candidate.is_file())
    return found


@functools.cache  # Snakemake's start hashes each rule's code, and most modules are of many rules
def _syntax(text: str, path: str) -> tuple[str, list[str]]:
    """Return a source's syntax tree without docstrings, as text, and the names that it imports."""
    tree = ast.parse(text, filename=path)
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            body[0] = ast.Pass()
    return ast.dump(tree), names


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


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

    Before it goes the record of where and when the stage ran (longyarn/environment.py).

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
    write_environment(path)
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


def write_environment(path: Path) -> None:
    """Write where and when this process ran beside its result ``path``, a manifest or the report.

    A record that cannot be made is said and fails no stage; a full disk does.
    """
    record = environment.path_of(path)
    try:
        write_json(record, environment.record())
    except Exception as error:
        if disk_is_full(error):
            raise
        print(f"{record} is not written ({first_line(error)})", file=sys.stderr)


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
