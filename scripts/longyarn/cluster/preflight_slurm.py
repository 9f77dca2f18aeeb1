"""Checks of what the run asks of SLURM."""

import math
import os
import re
import shlex
import shutil
import subprocess

from longyarn.cluster import job_resources, slurm_requests
from longyarn.cluster.preflight_run import NotChecked, Run
from longyarn.core.errors import UserError, first_line


def slurm(run: Run) -> str:
    """SLURM takes each request: `sbatch --test-only` checks it and submits nothing."""
    nodes = run.config["training"]["nodes"]
    if nodes > 1 and run.has("train") and not run.slurm and "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            f"training.nodes is {nodes}, but jobs are not submitted to SLURM; add --workflow-profile "
            "profiles/slurm, or set training.nodes to 1"
        )
    if not run.submitted():
        raise NotChecked("no job to come is submitted to SLURM")
    _training_as_configured(run)
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on this machine; start Snakemake where jobs are submitted")
    for rule, job in run.submitted().items():
        try:
            done = subprocess.run(sbatch_test(run, job), capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            raise UserError(
                "`sbatch --test-only` gave no answer for 60 s; wait for SLURM"
            ) from None
        if done.returncode:
            raise UserError(_refusal(rule, job, done.stderr))
    return f"accepts the requests of {', '.join(run.submitted())}"


def _training_as_configured(run: Run) -> None:
    """Stop if the profile gives training other machines or GPUs than the configuration states."""
    training, job = run.config["training"], run.submitted().get("train")
    if job is None:
        return
    for what, key in (("nodes", "training.nodes"), ("gpu", "training.nodes × training.gpus")):
        wanted = training["nodes"] * (training["gpus"] if what == "gpu" else 1)
        if job.resources.get(what) != wanted:
            raise UserError(
                f"the profile sets {what} of train to {job.resources.get(what)}, but {key} is {wanted}; "
                "take it out of set-resources and set the configuration"
            )
    each = training["nodes"] > 1 and training["gpus"]
    if each and "--gpus-per-node" not in str(job.resources.get("slurm_extra", "")):
        raise UserError(
            "slurm_extra of train, in the profile, replaces the --gpus-per-node that training on several "
            f"machines needs; add --gpus-per-node={training['gpus']} to it"
        )


def walltime(run: Run) -> str:
    """No attempt asks for more time than its partition gives, and the attempts suffice for each stage.

    SLURM itself accepts a request that is too long for its partition and lets it wait forever.
    """
    if not run.submitted():
        raise NotChecked("no job to come is submitted to SLURM")
    limits, shape = _partition_limits(), job_resources.known_shape(run.config)
    told = "the model's size is unknown yet, so the minutes that training needs are too"
    for name, job in run.submitted().items():
        rule, asked = job.rule.name, _minutes_asked(run, job)
        if not asked:
            continue
        _, partitions = shlex.split(run.slurm.get_partition_arg(job)) or ("", "")
        # SLURM chooses a partition that fits.
        limit = max(
            (limits.get(name, math.inf) for name in partitions.split(",")), default=math.inf
        )
        if max(asked) > limit:
            raise UserError(
                f"{name} asks for {max(asked)} minutes at attempt {asked.index(max(asked)) + 1}, but "
                f"partition {partitions} gives {limit:.0f}, so it would wait forever; set `runtime` of "
                f"{rule} under set-resources in the profile: then each attempt asks for that"
            )
        needed = job_resources.minutes(slurm_requests.job_config(job, run.config), rule, shape)
        # Training resumes in the next attempt; other stages start again.
        given = sum(asked) if rule == "train" else max(asked)
        if needed is not None and needed > given:
            raise UserError(
                f"{name} needs about {needed:.0f} minutes, but its attempts give {given}; raise its "
                "`runtime` or `retries` in the profile, or hardware.utilisation if your GPUs do better"
            )
        if needed is not None and rule == "train":
            told = f"training needs about {needed:.0f} minutes, and its attempts give {given}"
    return told


def sbatch_test(run: Run, job) -> list[str]:
    """Return the command that SLURM's executor will submit a job with, told to submit nothing."""
    from snakemake.exceptions import WorkflowError

    try:
        call = slurm_requests.sbatch_call(
            job,
            run.settings,
            run_uuid="preflight",
            slurm_logfile=os.devnull,
            account=next(run.slurm.get_account_arg(job)),
            partition=run.slurm.get_partition_arg(job),
            workdir=None,
        )
    except WorkflowError as error:
        account = job.resources.get("slurm_account")
        raise UserError(
            f"SLURM does not know slurm_account {account!r} of the profile ({first_line(error)}); fix it, "
            "or leave it out"
            if account and "account" in str(error)
            else f"the request of {job.rule.name} cannot be made ({first_line(error)}); fix the profile"
        ) from None
    return [*shlex.split(call), "--test-only", "--wrap=true"]


# Words in SLURM's message, and the fix. The first match counts.
FIXES = {
    "partition": "fix slurm_partition in the profile; `sinfo` lists the partitions",
    "account": "fix slurm_account in the profile; `sacctmgr show associations user=$USER` lists yours",
    "qos": "fix qos in the profile",
    "time limit": "lower its `runtime`, under set-resources in the profile",
    "feature": "fix constraint in the profile",
    "node configuration": "no machines of the partition have as much, so ask for less memory, fewer GPUs "
    "(training.gpus, gpu_model) or fewer machines (training.nodes), or choose another partition",
    "configuration source": "this machine has no configuration of SLURM; start where jobs are submitted",
    "contact": "wait for SLURM's controller",
}


def _refusal(rule: str, job, said: str) -> str:
    """Return a sentence for a request that SLURM refused."""
    lines = [re.sub("^(sbatch: |error: |allocation failure: )*", "", x) for x in said.splitlines()]
    reason = "; ".join(dict.fromkeys(line for line in lines if line)) or "no reason given"
    fix = next((v for k, v in FIXES.items() if k in reason.lower()), "fix the profile")
    asked = {
        "slurm_partition": "partition", "nodes": "nodes", "gpu": "GPUs", "mem_mb": "MB",
        "runtime": "minutes",
    }  # fmt: skip
    resources = [f"{word} {value}" for k, word in asked.items() if (value := job.resources.get(k))]
    return f"SLURM refuses the job of {rule} ({', '.join(resources)}): {reason}; {fix}"


def _minutes_asked(run: Run, job) -> list[int]:
    """Return the minutes that each attempt of a job asks for; none where it states no time."""
    asked, now = [], job.attempt
    for attempt in range(1, run.retries + 2):
        job.attempt = attempt
        asked.append(job.resources.get("runtime"))
    job.attempt = now
    return [minutes for minutes in asked if minutes]


def _partition_limits() -> dict[str, float]:
    """Return the longest job of each partition in minutes, infinite where it has no limit."""
    command = ["sinfo", "--noheader", "--format=%R|%l"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"`sinfo` fails here ({first_line(error)}); start Snakemake where jobs are submitted"
        ) from None
    lines = [line.rpartition("|") for line in done.stdout.splitlines()]
    return {name: minutes_of(limit) for name, _, limit in lines}


def minutes_of(limit: str) -> float:
    """Return the minutes of SLURM's [days-][[hours:]minutes:]seconds; infinity for all else."""
    days, _, clock = limit.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        seconds = sum(part * 60**power for power, part in enumerate(reversed(parts)))
        return (86400 * int(days or 0) + seconds) / 60
    except ValueError:  # infinite, n/a
        return math.inf
