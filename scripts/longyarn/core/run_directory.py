"""The directory of a run: its files, its manifests, and the stage that made each file.

Names are paths below the run's directory, with slashes.
"""

import csv
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from longyarn import stages
from longyarn.core import job_record
from longyarn.core.code_hash import code_hash
from longyarn.core.errors import UserError

SEAL = "SHA256SUMS"
CRATE = "ro-crate-metadata.json"
PROVENANCE = "provenance.json"
OWN_RECORD = f"{job_record.DIRECTORY}/{PROVENANCE}"  # of where the seal was made
CONFIG = "config.yaml"
WORKFLOW = "workflow"
REPORT = "report.json"
MARK = "NOT_VERIFIED.txt"
# Snakemake writes this empty file into each directory that is an output, after the job.
TIMESTAMP = ".snakemake_timestamp"
# The logs and timings of stages that run after the seal change later, so the seal leaves them out.
UNSEALED = {f"logs/{stage}.log" for stage in stages.UNSEALED} | {
    f"benchmarks/{stage}.tsv" for stage in stages.UNSEALED
}
# Files that no manifest lists, and the stage that makes each.
UNLISTED = {file: stage.name for stage in stages.STAGES for file in stage.files}


@dataclass(frozen=True)
class Timing:
    """Seconds and peak memory in MB of a job; the memory is None if the job was too short to sample."""

    seconds: float
    peak_memory_mb: float | None


def timing(benchmarks: Path, job: str) -> Timing | None:
    """Return a job's timing from Snakemake's benchmark files, or None if there is none.

    A job that was stopped and resumed has the timing of its last attempt.
    """
    path = benchmarks / f"{job}.tsv"
    if not path.is_file():
        return None
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    seconds = _number(rows[-1].get("s")) if rows else None
    return None if seconds is None else Timing(seconds, _number(rows[-1].get("max_rss")))


def _number(text: str | None) -> float | None:
    """Return a benchmark column's number, or None if it holds none, such as NA."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def require(run: Path) -> None:
    """Raise ``UserError`` if a directory is not a run."""
    if not run.is_dir():
        raise UserError(
            f"{run} is not a directory; name the directory of a run, such as results/micro"
        )
    if not any(run.glob("*.json")):
        raise UserError(
            f"{run} holds no manifest, so it is not a run; name a directory such as results/micro"
        )


def everything(run: Path) -> list[str]:
    """Return the names of all files, sorted, including those in linked directories."""
    found = []
    for directory, below, names in os.walk(run, followlinks=True):
        below[:] = [name for name in below if not leads_back(Path(directory, name), run)]
        inside = PurePosixPath(Path(directory).relative_to(run).as_posix())
        found += [str(inside / name) for name in names if Path(directory, name).is_file()]
    return sorted(found)


def leads_back(path: Path, run: Path) -> bool:
    """Tell whether a directory is a link to a directory that contains it, under any name."""
    if not path.is_symlink():
        return False
    target = path.resolve()
    holders = [path.parent, *path.parent.parents]
    holders = holders[: len(path.relative_to(run).parts)]
    return any(holder.resolve().is_relative_to(target) for holder in holders)


def to_seal(names: Iterable[str]) -> list[str]:
    """Return the names that the seal covers: no hidden or half-written files, and none made later."""
    return [
        name
        for name in names
        if not any(part.startswith(".") for part in name.split("/"))
        and not name.endswith((".partial", ".incomplete"))
        and name != SEAL
        and name not in UNSEALED
    ]


def manifests(run: Path, names: Iterable[str]) -> dict[str, dict]:
    """Return the manifests among these files, by name, including that of the latest seal."""
    found = {}
    for name in names:
        path = PurePosixPath(name)
        inside = path.parts[0] == WORKFLOW or path.parent.name == job_record.DIRECTORY
        if path.suffix == ".json" and not inside:
            try:
                content = json.loads((run / name).read_bytes())
            except (ValueError, FileNotFoundError):
                continue
            if is_manifest(content):
                found[name] = content
    return found


def is_manifest(content: object) -> bool:
    """Tell whether the content of a file has the form that ``manifest.write`` gives it."""
    try:
        texts = [content["stage"], content["code"], *content["inputs"].values()]
        entries = content["files"].values()
        texts += [entry["sha256"] for entry in entries]
        kept = [content["settings"], content["facts"], content["versions"]]
        whole = all(isinstance(entry["size"], int) for entry in entries)
    except (KeyError, TypeError, AttributeError):
        return False
    return (
        whole
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(part, dict) for part in kept)
    )


def job_of(name: str, stage: str) -> str:
    """Return the job that a manifest belongs to. Like ``log_of``, but ``adopt`` stands for ``train``."""
    return log_of(
        name, stages.BY_NAME[stage].replaces or stage if stage in stages.BY_NAME else stage
    )


def log_of(name: str, stage: str) -> str:
    """Return the job that wrote a manifest, named like its log: phase-1/train, passkey.base."""
    path = PurePosixPath(name)
    if path.parent.name in stages.VARIANT_DIRECTORIES:
        return str(path.parent.parent / f"{stage}.{path.stem}")
    return str(path.parent / stage)


def payload(name: str, manifest: dict) -> dict[str, dict]:
    """Return the files that a manifest lists, by their names in the run, each with size and sha256."""
    directory = PurePosixPath(name).parent
    return {str(directory / file): entry for file, entry in manifest["files"].items()}


def payload_directories(name: str, manifest: dict) -> list[str]:
    """Return the directories that hold only the files of a manifest."""
    directory = PurePosixPath(name).parent
    tops = {file.partition("/")[0] for file in manifest["files"] if "/" in file}
    return sorted(str(directory / top) for top in tops)


def other_code(manifests: dict[str, dict], root: Path) -> list[str]:
    """Return a sentence for each stage that was made with other code than the code below ``root``."""
    stages: dict[str, set[str]] = {}
    for one in manifests.values():
        stages.setdefault(one["stage"], set()).add(one["code"])
    found = []
    for stage, codes in sorted(stages.items()):
        script = root / "scripts" / f"{stage}.py"
        if not script.is_file() or codes != {code_hash(script)}:
            found.append(f"{stage} was made with other code than that of {script}")
    return found


class Makers:
    """Which stage made which file."""

    def __init__(self, found: dict[str, dict]) -> None:
        self.stages = {name: manifest["stage"] for name, manifest in found.items()}
        for name, manifest in found.items():
            for file in payload(name, manifest):
                self.stages.setdefault(file, manifest["stage"])

    def stage(self, name: str) -> str | None:
        """Return the stage that made a file, or None if nothing tells."""
        path = PurePosixPath(name)
        if name in self.stages:
            return self.stages[name]
        if path.parent.name == job_record.DIRECTORY:
            return self.stage(str(path.parent.parent / path.name))
        if path.parts[0] in ("logs", "benchmarks") and len(path.parts) > 1:
            return path.name.partition(".")[0]
        if path.parts[0] in (WORKFLOW, CONFIG, CRATE, PROVENANCE):
            return "provenance"
        return UNLISTED.get(path.parts[0])
