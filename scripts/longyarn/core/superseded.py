"""Which manifests of a run its report was made from, and which belong to an earlier state of the run."""

from pathlib import Path

from longyarn.core import run_directory
from longyarn.core.lineage import parts
from longyarn.stages import (
    AFTER_THE_REPORT,
    DOWNLOAD_MODEL,
    INSTRUMENTS,
    MERGE,
    PACK,
    PATCH_ROPE,
    REPORTED,
    TRAIN,
)


def jobs_of(manifests: dict[str, dict]) -> dict[str, str]:
    """Return the file name of each manifest by its job."""
    return {run_directory.job_of(name, one["stage"]): name for name, one in manifests.items()}


def reported(manifests: dict[str, dict], report: dict) -> dict[str, str]:
    """Return the manifests that a report was made from, by job; the name is empty if one is not here.

    ``report`` is the content of report.json.
    """
    jobs = jobs_of(manifests)
    wanted = [*REPORTED.values()]
    wanted += [f"{PATCH_ROPE.name}.{variant}" for variant in report["rope"]["variants"]]
    for stage in INSTRUMENTS:
        wanted += [f"{stage}.{variant}" for variant in report[stage]]
        models = (f"{DOWNLOAD_MODEL.name}.{variant}" for variant in report[stage])
        wanted += [job for job in models if job in jobs]
    for phase in report["phases"]:
        name = phase["name"]
        wanted += [job for job in jobs if job.startswith(f"{name}/{PATCH_ROPE.name}.")]
        wanted += [f"{name}/{stage.name}" for stage in (PACK, TRAIN, MERGE)]
    return {job: jobs.get(job, "") for job in wanted}


def followed(manifests: dict[str, dict], report: dict) -> dict[str, str]:
    """Return the manifests that must fit together, by job: the report's, and those made after it.

    Jobs about the model of another run are left out: the seal of that run follows them further.
    """
    jobs = jobs_of(manifests)
    found = reported(manifests, report)
    found |= {job: jobs[job] for job in AFTER_THE_REPORT if job in jobs}
    return {job: name for job, name in found.items() if name and not is_of_another_run(job, jobs)}


def is_of_another_run(job: str, jobs: dict[str, str]) -> bool:
    """Tell whether a job evaluates a model that was made in another run."""
    phase, stage, variant = parts(job)
    lone = not phase and stage in INSTRUMENTS and not variant.startswith("step-")
    return lone and variant != "trained" and f"{PATCH_ROPE.name}.{variant}" not in jobs


def outdated(manifests: dict[str, dict], hashes: dict[str, str], report: dict) -> list[str]:
    """Return the manifests that nothing needs any more and whose inputs are gone or have changed.

    ``hashes`` has the SHA-256 of each file of the run.
    """
    jobs, kept = jobs_of(manifests), {*followed(manifests, report).values()}
    kept.add(run_directory.PROVENANCE)
    there = {*hashes.values()}
    return [
        name
        for job, name in jobs.items()
        if name in hashes and name not in kept and not is_of_another_run(job, jobs)
        if not there.issuperset(manifests[name]["inputs"].values())
    ]


def said(run: Path, name: str) -> str:
    """Return a sentence about an outdated manifest."""
    return f"{run / name} belongs to an earlier state of the run; make it again, or delete it"
