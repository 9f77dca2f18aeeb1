"""Checks before the first job: a problem that would stop a run hours later, or in the queue, is reported now.

A check returns what it found, or raises: UserError for what must be fixed, NotChecked for what does not
apply or cannot be seen from here.
"""

import sys
from collections.abc import Callable, Iterable

from longyarn import stages
from longyarn.cluster import preflight_local, preflight_slurm, slurm_requests
from longyarn.cluster.preflight_run import NotChecked, Run
from longyarn.config import sweep_cells
from longyarn.core.errors import UserError

IS_OK, NOT_CHECKED, IS_WRONG = "ok", "not checked", "error"


def check(run: Run) -> Iterable[tuple[str, str, str]]:
    """Yield each check's name, its outcome and a sentence."""
    for function in CHECKS:
        try:
            yield function.__name__, IS_OK, function(run)
        except NotChecked as reason:
            yield function.__name__, NOT_CHECKED, str(reason)
        except UserError as error:
            yield function.__name__, IS_WRONG, str(error)


def look(run: Run) -> None:
    """Exit with one sentence for each problem; if the target is `preflight`, print every check and exit."""
    asked = run.has("preflight")
    wrong = []
    for name, outcome, sentence in check(run):
        if outcome == IS_WRONG:
            wrong.append(sentence)
        elif asked:
            print(f"{name}: {outcome}: {sentence}", file=sys.stderr)
    # Last, because the SLURM plugin prints messages of its own before.
    for sentence in wrong:
        print(f"error: {sentence}", file=sys.stderr)
    if wrong or asked:
        sys.exit(1 if wrong else 0)


# What can run during training to evaluate one of its checkpoints.
AFTER_CHECKPOINT = (stages.MERGE.name, *stages.INSTRUMENTS)


def command(run: Run) -> str:
    """The command line fits this workflow. Snakemake itself would wait forever or stay silent."""
    if run.cores == 0 and not run.slurm:
        raise UserError("--cores is 0, so no job could ever start; give at least 1")
    first = [
        job for job in run.jobs if job.rule.name not in (stages.CHECKPOINT.name, *AFTER_CHECKPOINT)
    ]
    if run.has(stages.CHECKPOINT.name) and first:
        raise UserError(
            "the run of this checkpoint has not come so far: "
            f"{slurm_requests.job_name(first[0])} would have to run first; wait until the run trains its "
            "last phase"
        )
    if run.has("sweep") and len(sweep_cells.all_changes(run.config)) < 2:
        raise UserError(
            "sweep.factors has no value that differs from the configuration; state some, as in "
            "docs/sweeps.md"
        )
    if run.unknown_rules:
        raise UserError(
            f"set-resources names {run.unknown_rules[0]}, but no rule has that name; fix the profile"
        )
    return "cores and rules"


CHECKS: tuple[Callable[[Run], str], ...] = (
    command,
    preflight_local.image,
    preflight_local.gpus,
    preflight_local.disk,
    preflight_local.hub,
    preflight_local.elsewhere,
    preflight_local.corpus,
    preflight_local.destination,
    preflight_local.archive,
    preflight_local.lm_eval,
    preflight_slurm.slurm,
    preflight_slurm.walltime,
)
