"""Attempts at one training run: how one continues another, and why they never write to the same place.

When a run is stopped, Snakemake or SLURM starts it again, and the earlier attempt may still be alive: when a
node loses contact with its controller, SLURM restarts the job elsewhere while the old processes keep
writing. So each attempt takes a number higher than all before it (making a directory is atomic, also on
network file systems) and writes only below its own ``attempt-<number>``. It resumes from the newest
complete checkpoint of any attempt. An attempt that finds a higher number than its own has been replaced, and
stops. This is a fencing token: there is no lock that a crash could leave behind.
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
    """Return the work directory of a run. Its name is a hash of everything that defines the run."""
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return root / name


def claim(work: Path) -> Path:
    """Create the directory of a new attempt, numbered higher than every other, and return it."""
    work.mkdir(parents=True, exist_ok=True)
    while True:
        directory = work / f"attempt-{newest(work) + 1:04d}"
        with contextlib.suppress(FileExistsError):  # another attempt was faster
            directory.mkdir()
            return directory


def newest(work: Path) -> int:
    """Return the highest number of an attempt, 0 if there is none."""
    return max((number(path) for path in work.glob("attempt-*")), default=0)


def number(attempt: Path) -> int:
    """Return the number of an attempt, 0 for a directory with another name."""
    name = re.fullmatch(r"attempt-(\d+)", attempt.name)
    return int(name.group(1)) if name else 0


def superseded(attempt: Path) -> bool:
    """Tell whether a newer attempt has taken over."""
    return newest(attempt.parent) > number(attempt)


def mark_whole(checkpoint: Path) -> None:
    """Mark a checkpoint as complete: list its files, once every process has written its part."""
    sizes = {
        file.relative_to(checkpoint).as_posix(): file.stat().st_size
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file()
    }
    write_json(checkpoint / MARKER, sizes)


def is_whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was marked as complete and its files still have their sizes."""
    if not (checkpoint / MARKER).is_file():
        return False
    sizes = read_json(checkpoint / MARKER)
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size
        for name, size in sizes.items()
    )


def last_checkpoint(work: Path, most: int | None = None) -> Path | None:
    """Return the complete checkpoint with the most steps of any attempt, or None.

    ``most`` limits the steps. The checkpoint stays in place while it is read: an attempt removes older
    attempts only after a save of its own, and only while it is the newest (so a later attempt finds that
    save). Of its own checkpoints it keeps two or more.
    """
    found = [path for path in checkpoints(work) if is_whole(path)]
    if most is not None:
        found = [path for path in found if steps(path) <= most]
    return max(found, key=steps, default=None)


def last_name(work: Path) -> str | None:
    """Return the name of the last complete checkpoint, as it stands in the log, or None."""
    last = last_checkpoint(work)
    return describe(last) if last else None


def skipped(work: Path) -> list[str]:
    """Return a sentence for each checkpoint that is skipped because it is incomplete."""
    return [
        f"{describe(path)} is incomplete and is skipped"
        for path in sorted(checkpoints(work), key=steps)
        if not is_whole(path)
    ]


def checkpoints(work: Path) -> list[Path]:
    """Return the checkpoints of all attempts, complete or not."""
    return [path for path in work.glob("attempt-*/checkpoint-*") if number(path.parent)]


def steps(checkpoint: Path) -> int:
    """Return the steps of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def record(work: Path, identity: dict) -> None:
    """Write what defines the run into its work directory, so that a person can tell whose it is."""
    write_json(work / IDENTITY, identity)


@dataclass(frozen=True)
class Other:
    """A work directory of the same run with another placement and a complete checkpoint."""

    work: Path
    placement: dict
    steps: int


def other_placement(work: Path, identity: dict) -> Other | None:
    """Return an unfinished run beside ``work`` that differs only in its placement."""
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
    """Tell whether two identities differ only in their placement."""
    return one | {"placement": None} == other | {"placement": None}


def remove_older(attempt: Path) -> None:
    """Remove all earlier attempts, whose checkpoints are no longer needed."""
    for other in attempt.parent.glob("attempt-*"):
        if 0 < number(other) < number(attempt):
            # A lost attempt may still write there; the next attempt removes what it leaves.
            shutil.rmtree(other, ignore_errors=True)


def describe(checkpoint: Path) -> str:
    """Return the name of a checkpoint as it stands in the log."""
    return os.path.join(checkpoint.parent.name, checkpoint.name)
