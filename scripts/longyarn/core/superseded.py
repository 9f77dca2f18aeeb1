"""Which manifests of a run its report was made from, and which are of an earlier state of it."""

from pathlib import Path

from longyarn.core import run_directory
from longyarn.core.lineage import STAGES, parts
from longyarn.evaluation.variant_model import INSTRUMENTS

# What follows the report and is a part of every run.
AFTER_THE_REPORT = ("gate", "export")


def jobs_of(manifests: dict[str, dict]) -> dict[str, str]:
    """Return the names of manifests by job."""
    return {run_directory.job_of(name, one["stage"]): name for name, one in manifests.items()}


def reported(manifests: dict[str, dict], report: dict) -> dict[str, str]:
    """Return the manifests that a report was made from by job; the name is empty of one that is not here.

    ``report`` is the content of report.json.
    """
    jobs = jobs_of(manifests)
    wanted = [*STAGES.values()]
    wanted += [f"patch_rope.{variant}" for variant in report["rope"]["variants"]]
    for stage in INSTRUMENTS:
        wanted += [f"{stage}.{variant}" for variant in report[stage]]
        models = (f"download_model.{variant}" for variant in report[stage])
        wanted += [job for job in models if job in jobs]
    for phase in report["phases"]:
        name = phase["name"]
        wanted += [job for job in jobs if job.startswith(f"{name}/patch_rope.")]
        wanted += [f"{name}/{stage}" for stage in ("pack", "train", "merge")]
    return {job: jobs.get(job, "") for job in wanted}


def followed(manifests: dict[str, dict], report: dict) -> dict[str, str]:
    """Return the manifests that must fit together, by job: the report's and what follows it.

    What is about another run's model is not among them: that run's own seal follows it further.
    """
    jobs = jobs_of(manifests)
    found = reported(manifests, report)
    found |= {job: jobs[job] for job in AFTER_THE_REPORT if job in jobs}
    return {job: name for job, name in found.items() if name and not is_of_another_run(job, jobs)}


def is_of_another_run(job: str, jobs: dict[str, str]) -> bool:
    """Tell whether a job looks at a model that was made in another run."""
    within, stage, variant = parts(job)
    lone = not within and stage in INSTRUMENTS and not variant.startswith("step-")
    return lone and variant != "trained" and f"patch_rope.{variant}" not in jobs


def outdated(manifests: dict[str, dict], hashes: dict[str, str], report: dict) -> list[str]:
    """Return the manifests that nothing asks for any more and that were made from what is not here now.

    ``hashes`` has the SHA-256 of each file that is looked at.
    """
    jobs, kept = (
        jobs_of(manifests),
        {*followed(manifests, report).values(), run_directory.PROVENANCE},
    )
    there = {*hashes.values()}
    return [
        name
        for job, name in jobs.items()
        if name in hashes and name not in kept and not is_of_another_run(job, jobs)
        if not there.issuperset(manifests[name]["inputs"].values())
    ]


def said(run: Path, name: str) -> str:
    """Return a sentence about an outdated manifest."""
    return f"{run / name} is of an earlier state of the run; make it again, or delete it"
