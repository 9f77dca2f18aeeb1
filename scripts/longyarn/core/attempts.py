"""Attempts at one training run: how they go on from each other, and never write into each other.

A run that is stopped is tried again, by Snakemake or by SLURM, and the attempt before it may still be
alive: when a node loses its controller, SLURM starts the job anew elsewhere while the old processes
write on. So each attempt takes a number that is higher than all before it (making a directory is
atomic, on network file systems too) and writes only below its own ``attempt-<number>``. It resumes
from the newest whole checkpoint of any attempt. Who finds a higher number than his own has been
replaced, and stops: a fencing token, with no lock that a crash could leave behind.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from longyarn.core.files import read_json, write_json

MARKER = "whole.json"
IDENTITY = "identity.json"


def directory(root: Path, identity: dict) -> Path:
    """Return a run's work directory, which has a hash of all that defines the run for a name."""
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return root / name


def claim(work: Path) -> Path:
    """Make and return the directory of a new attempt, numbered higher than every other."""
    work.mkdir(parents=True, exist_ok=True)
    while True:
        directory = work / f"attempt-{newest(work) + 1:04d}"
        with contextlib.suppress(FileExistsError):  # another was faster
            directory.mkdir()
            return directory


def newest(work: Path) -> int:
    """Return the highest number of an attempt, 0 where there is none."""
    return max((number(path) for path in work.glob("attempt-*")), default=0)


def number(attempt: Path) -> int:
    """Return an attempt's number, 0 for a directory of another name."""
    name = re.fullmatch(r"attempt-(\d+)", attempt.name)
    return int(name.group(1)) if name else 0


def superseded(attempt: Path) -> bool:
    """Tell whether a newer attempt has taken over."""
    return newest(attempt.parent) > number(attempt)


def mark_whole(checkpoint: Path) -> None:
    """Declare a checkpoint whole: list its files, once every process has written its part."""
    sizes = {
        file.relative_to(checkpoint).as_posix(): file.stat().st_size
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file()
    }
    write_json(checkpoint / MARKER, sizes)


def is_whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was declared whole and its files still have their sizes."""
    if not (checkpoint / MARKER).is_file():
        return False
    sizes = read_json(checkpoint / MARKER)
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size
        for name, size in sizes.items()
    )


def last_checkpoint(work: Path, most: int | None = None) -> Path | None:
    """Return the whole checkpoint of the most steps, at most ``most``, of any attempt, or nothing.

    It stays in place while it is read: an attempt removes older ones only after a save of its own and
    while none is newer (so who comes later finds that save), and of its own it keeps two or more.
    """
    found = [path for path in checkpoints(work) if is_whole(path)]
    if most is not None:
        found = [path for path in found if steps(path) <= most]
    return max(found, key=steps, default=None)


def last_name(work: Path) -> str | None:
    """Return the name of the last whole checkpoint as a log line has it, or nothing."""
    last = last_checkpoint(work)
    return describe(last) if last else None


def skipped(work: Path) -> list[str]:
    """Return a sentence for each checkpoint that is passed over because it is not whole."""
    return [
        f"{describe(path)} is not whole and is passed over"
        for path in sorted(checkpoints(work), key=steps)
        if not is_whole(path)
    ]


def checkpoints(work: Path) -> list[Path]:
    """Return the checkpoints of all attempts, whole or not."""
    return [path for path in work.glob("attempt-*/checkpoint-*") if number(path.parent)]


def steps(checkpoint: Path) -> int:
    """Return the steps of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def record(work: Path, identity: dict) -> None:
    """Write what defines the run into its work directory, for who finds it there."""
    write_json(work / IDENTITY, identity)


@dataclass(frozen=True)
class Other:
    """A work directory of the same run under another placement, with a whole checkpoint."""

    work: Path
    placement: dict
    steps: int


def other_placement(work: Path, identity: dict) -> Other | None:
    """Return a half-done run beside ``work`` that differs in nothing but where it took place."""
    if last_checkpoint(work):
        return None
    for found in sorted(work.parent.glob(f"*/{IDENTITY}")):
        theirs = read_json(found)
        if found.parent == work or not same_run(theirs, identity):
            continue
        if last := last_checkpoint(found.parent):
            return Other(found.parent, theirs["placement"], steps(last))
    return None


def same_run(one: dict, other: dict) -> bool:
    """Tell whether two identities differ in nothing but their placement."""
    return one | {"placement": None} == other | {"placement": None}


def remove_older(attempt: Path) -> None:
    """Remove all attempts before this one, whose checkpoints are no longer needed."""
    for other in attempt.parent.glob("attempt-*"):
        if 0 < number(other) < number(attempt):
            # An orphan may still write there; what it leaves goes with the next attempt.
            shutil.rmtree(other, ignore_errors=True)


def describe(checkpoint: Path) -> str:
    """Return a checkpoint's name as a log line has it."""
    return os.path.join(checkpoint.parent.name, checkpoint.name)
