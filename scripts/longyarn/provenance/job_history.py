"""What each job of a run did: from its manifest, the record of where it ran, and Snakemake's benchmarks."""

import csv
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from longyarn.core import job_record, run_directory
from longyarn.core.files import read_json


@dataclass(frozen=True)
class Job:
    """A job that ran; ``target`` is the name of its manifest, or of the report.

    ``inputs`` and ``outputs`` are names of files and of payload directories. ``environment`` and ``usage``
    (seconds, and peak memory in MB) are empty where no record is there.
    """

    name: str
    stage: str
    target: str
    code: str
    inputs: list[str]
    outputs: list[str]
    environment: dict
    usage: dict
    settings: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)


def jobs_of(run: Path, hashes: dict[str, str], manifests: dict[str, dict]) -> list[Job]:
    """Return the jobs of a run by the time that they started.

    ``hashes`` has the SHA-256 of each manifest.
    """
    # Of equal manifests, that of the run itself comes last, so it is the one that counts.
    deepest_first = sorted(manifests, key=lambda name: -name.count("/"))
    by_hash = {hashes[name]: name for name in deepest_first}
    directories = {
        name: run_directory.payload_directories(name, manifests[name]) for name in manifests
    }
    found = []
    for name, one in manifests.items():
        sources = [by_hash[digest] for digest in one["inputs"].values() if digest in by_hash]
        inputs = [part for source in sources for part in (source, *directories[source])]
        place = PurePosixPath(name).parent
        lone = [str(place / file) for file in one["files"] if "/" not in file]
        outputs = [name, *directories[name], *lone]
        found.append(
            Job(
                **records(run, name, one["stage"]), code=one["code"], inputs=inputs, outputs=outputs,
                settings=one["settings"], versions=one["versions"],
            )
        )  # fmt: skip
    report = read_json(run / run_directory.REPORT)
    used = [name for name, one in manifests.items() if one["stage"] not in ("gate", "checkpoint")]
    found.append(
        Job(
            **records(run, run_directory.REPORT, "report"), code=report["code"]["report"], inputs=used,
            outputs=[run_directory.REPORT, "report.html", "figures"],
        )
    )  # fmt: skip
    return sorted(found, key=lambda job: (job.environment.get("start", ""), job.name))


def records(run: Path, target: str, stage: str) -> dict:
    """Return of a job its name, its stage, and what is recorded beside its target."""
    name, record = run_directory.log_of(target, stage), job_record.path_of(run / target)
    return {
        "name": name,
        "stage": stage,
        "target": target,
        "environment": read_json(record) if record.is_file() else {},
        "usage": usage(run / "benchmarks" / f"{name}.tsv"),
    }


def usage(path: Path) -> dict:
    """Return seconds and peak memory of Snakemake's benchmark of a job, as it writes them."""
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {key: rows[-1][key] for key in ("s", "max_rss") if rows and rows[-1].get(key)}
