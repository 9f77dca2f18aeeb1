"""SHA256SUMS: one line for each file of a run, in the form that `sha256sum` of coreutils reads and writes."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from longyarn.core import run_directory
from longyarn.core.console import progress
from longyarn.core.errors import UserError, first_line
from longyarn.core.files import sha256

LINE = re.compile(r"(\\?)([0-9a-f]{64})  (.+)")
ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
LETTERS = {escape: letter for letter, escape in ESCAPES.items()}


def render(hashes: dict[str, str]) -> str:
    """Return the text of SHA256SUMS: one line for each name, sorted."""
    return "".join(f"{line(name, hashes[name])}\n" for name in sorted(hashes))


def line(name: str, digest: str) -> str:
    """Return one line; a line end or a backslash in a name is escaped in the way of coreutils."""
    escaped = "".join(ESCAPES.get(letter, letter) for letter in name)
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}"


def parse(text: str) -> dict[str, str]:
    """Return the SHA-256 of each name; raise ``ValueError`` unless ``render`` could have written the text."""
    found = {}
    for number, text_line in enumerate(text.split("\n")[:-1], start=1):
        match = LINE.fullmatch(text_line)
        if not match:
            raise ValueError(f"line {number}")
        name = match[3]
        if match[1]:
            name = re.sub(r"\\.", lambda pair: LETTERS.get(pair[0], pair[0]), name)
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"line {number}, with a path that leads out of the run")
        found[name] = match[2]
    if render(found) != text:
        raise ValueError("the order of lines, or the last of them")
    return found


def hashes(run: Path, names: Iterable[str], label: str) -> dict[str, str]:
    """Return the SHA-256 of each of these files of a run; hard links to one file are read once.

    ``label`` names the progress line. Raise ``UserError`` if a file changes meanwhile.
    """
    names = list(names)
    sizes = {name: state(run / name).st_size for name in names}
    known: dict[tuple[int, int], str] = {}
    found = {}
    for name in progress(names, sum(sizes.values()), label, size=sizes.__getitem__):
        status = state(run / name)
        inode = (status.st_dev, status.st_ino)
        if inode not in known:
            known[inode] = unchanged_sha256(run / name, status)
        found[name] = known[inode]
    return found


def unchanged_sha256(path: Path, before: os.stat_result) -> str:
    """Return a file's SHA-256; raise ``UserError`` if it changed since its state ``before``."""
    try:
        digest = sha256(path)
    except FileNotFoundError:
        raise changed(path) from None
    after = state(path)
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise changed(path)
    return digest


def state(path: Path) -> os.stat_result:
    """Return a file's size, time and inode; raise ``UserError`` if it is gone."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        raise changed(path) from None


def changed(path: Path) -> UserError:
    """Return the error for a file that changed while it was read."""
    return UserError(
        f"{path} changed while it was read; run again when nothing else writes to this run"
    )


def read(run: Path) -> dict[str, str]:
    """Return the SHA-256 of each sealed file; raise ``UserError`` if the seal is missing or broken."""
    path = run / run_directory.SEAL
    try:
        return parse(path.read_bytes().decode())
    except FileNotFoundError:
        if (run / run_directory.MARK).is_file():
            raise UserError(
                f"{path} is missing, because this run misses a threshold ({run / run_directory.MARK} says "
                "which), and such a run is not sealed; train longer or on more data, or loosen the threshold"
            ) from None
        raise UserError(
            f"{path} is missing; run `snakemake` with the run's configuration, so that it is sealed"
        ) from None
    except ValueError as error:  # also raised for text that is not UTF-8
        raise UserError(
            f"{path} is not what provenance wrote ({first_line(error)}); restore it, or seal the run again "
            "with `snakemake --forcerun provenance`"
        ) from None
