"""What a check before the first job knows of the run."""

from dataclasses import dataclass

from longyarn import stages
from longyarn.cluster import slurm_requests


class NotChecked(Exception):
    """Raised by a check that does not apply or cannot be made from here; the message says why."""


@dataclass(frozen=True)
class Run:
    """What is about to run, and where.

    ``jobs`` are the jobs of Snakemake that are not done yet. ``slurm`` is the executor of SLURM, or None if
    jobs run on this machine. ``gpus`` is the limit of --resources gpu=, None without one; ``cores`` that of
    --cores. ``unknown_rules`` are names under set-resources that no rule has.
    """

    config: dict
    jobs: list
    slurm: object | None
    settings: object | None
    retries: int
    gpus: int | None
    cores: int | None
    unknown_rules: list[str]

    def has(self, rule: str) -> bool:
        """Tell whether a job of a rule is about to run."""
        return any(job.rule.name == rule for job in self.jobs)

    def submitted(self) -> dict[str, object]:
        """Return one job that SLURM will run for each rule and phase, by ``job_name``."""
        return {
            slurm_requests.job_name(job): job
            for job in self.jobs
            if self.slurm and not job.is_local
        }


def of_workflow(workflow, config: dict) -> Run:
    """Return what Snakemake is about to run; call it from `onstart:`."""
    order = [rule.name for rule in workflow.rules]
    known = {*order, stages.TRAIN.name, stages.ADOPT.name}  # of which a workflow has one
    # Snakemake has no public way to its executor.
    return Run(
        config=config,
        jobs=sorted(workflow.dag.needrun_jobs(), key=lambda job: order.index(job.rule.name)),
        slurm=workflow.scheduler._executor if workflow.executor_plugin.name == "slurm" else None,
        settings=workflow.executor_settings,
        retries=workflow.execution_settings.retries,
        gpus=workflow.global_resources.get("gpu"),
        cores=workflow.global_resources.get("_cores"),
        unknown_rules=sorted(set(workflow.resource_settings.overwrite_resources) - known),
    )
