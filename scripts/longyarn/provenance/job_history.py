"""What each job of a run did, from its manifest, its record (longyarn/core/job_record.py) and its timing."""

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from longyarn.core import job_record, run_directory
from longyarn.core.files import read_json
from longyarn.stages import CHECKPOINT, GATE, REPORT

# Stages whose manifests the report does not read.
NOT_REPORTED = (GATE.name, CHECKPOINT.name)


@dataclass(frozen=True)
class Job:
    """A job that ran. ``target`` is the name of its manifest, or that of the report.

    ``inputs`` and ``outputs`` are names of files and of payload directories. ``environment`` is the job's
    record, empty if there is none.
    """

    name: str
    stage: str
    target: str
    code: str
    inputs: list[str]
    outputs: list[str]
    environment: dict
    timing: run_directory.Timing | None
    settings: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)


def jobs_of(run: Path, hashes: dict[str, str], manifests: dict[str, dict]) -> list[Job]:
    """Return the jobs of a run, in the order in which they started.

    ``hashes`` has the SHA-256 of each manifest.
    """
    # If several manifests are equal, the run's own comes last and so wins over those of its cells.
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
    used = [name for name, one in manifests.items() if one["stage"] not in NOT_REPORTED]
    found.append(
        Job(
            **records(run, run_directory.REPORT, REPORT.name), code=report["code"][REPORT.name], inputs=used,
            outputs=[*REPORT.files],
        )
    )  # fmt: skip
    return sorted(found, key=lambda job: (job.environment.get("start", ""), job.name))


def records(run: Path, target: str, stage: str) -> dict:
    """Return a job's name, stage and target, and what was recorded about it when it ran."""
    name, record = run_directory.log_of(target, stage), job_record.path_of(run / target)
    return {
        "name": name,
        "stage": stage,
        "target": target,
        "environment": read_json(record) if record.is_file() else {},
        "timing": run_directory.timing(run / "benchmarks", name),
    }
