"""What each job asks of SLURM: Snakemake builds the DAG, and its executor plugin writes the commands."""

import contextlib
import io
import json
import re
import tempfile
from collections import Counter
from pathlib import Path

from longyarn.cluster import plan_table
from longyarn.config.phases import parts
from longyarn.core.errors import UserError, first_line
from longyarn.core.files import ROOT

DEFAULT_PROFILE = Path("profiles/slurm")


def job_name(job) -> str:
    """Return the name of a Snakemake job's rule, behind its phase or cell if any: phase-1/train."""
    return job.wildcards.get("phase", "") + job.rule.name


def job_config(job, config: dict) -> dict:
    """Return the configuration of a Snakemake job's phase or cell."""
    return parts(config).get(job.wildcards.get("phase", ""), config)


def sbatch_call(job, settings, **given) -> str:
    """Return the command that SLURM's executor submits a Snakemake job with, without what it wraps.

    ``settings`` are the executor's; ``given`` is what it knows beside the job's resources. Snakemake's
    WorkflowError tells of a resource that the executor refuses.
    """
    from snakemake_executor_plugin_slurm.submit_string import get_submit_command
    from snakemake_executor_plugin_slurm.utils import set_gres_string

    given["comment_str"] = f"rule_{job.rule.name}"
    return get_submit_command(job, given, settings=settings) + set_gres_string(job)


def submissions(config: dict, profile: Path) -> list[tuple[str, str]]:
    """Return each rule and the sbatch command that the executor plugin would submit it with.

    Snakemake builds the DAG of the whole run, the profile's resources and overrides included, and the
    plugin writes the command. RUN, LOG and DIRECTORY stand for what differs from start to start.
    Local rules have none.
    """
    from snakemake_interface_common.exceptions import ApiError, WorkflowError
    from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry

    settings = ExecutorPluginRegistry().get_plugin("slurm").get_settings(read_profile(profile))
    found = {}
    try:
        every, local = jobs(config, profile)
    except (WorkflowError, ApiError) as error:
        # It may be wrapped: names of errors, the reason, the wildcards.
        lines = str(error).partition("\nWildcards:")[0].splitlines()
        said = [line.strip() for line in lines if not line.endswith(":")]
        raise refused(profile, " ".join(said).rstrip(".")) from None
    count = Counter(map(job_name, every))
    for job in every:
        name = job_name(job)
        name = f"{name} × {count[name]}".removesuffix(" × 1")
        if job.rule.name in local:
            found[name] = "runs where Snakemake runs, on the login node"
            continue
        account, partition = (job.resources.get(f"slurm_{k}") for k in ("account", "partition"))
        call = sbatch_call(
            job,
            settings,
            run_uuid="RUN",
            slurm_logfile="LOG",
            account=f"-A {account}" if account else "",
            partition=f"-p {partition}" if partition else "",
            workdir="DIRECTORY",
        )
        found[name] = re.sub(" +", " ", call)
    return list(found.items())


def document(profile: Path) -> str:
    """Return docs/requests.md: the requests of the default and of each preset."""
    text = [
        "# Requests to SLURM\n",
        "The sbatch command of each rule at the first attempt, with `profiles/slurm` unchanged. A retry asks",
        "for 1.5 times the memory and time. `python scripts/plan.py --document > docs/requests.md` writes",
        "this file, and a test compares it. RUN, LOG and DIRECTORY stand for what differs between starts.",
        "The command in `--wrap` follows them. We have run no preset on a GPU.",
    ]
    for file in [None, *sorted((ROOT / "presets").glob("*.yaml"))]:
        title = f"presets/{file.name}" if file else "The default"
        text.append(f"\n## {title}\n\n| rule | request |\n| --- | --- |")
        rows = submissions(plan_table.planned([file] if file else []), profile)
        text += [
            f"| {rule} | {f'`{call}`' if call.startswith('sbatch') else call} |"
            for rule, call in rows
        ]
    return "\n".join(text) + "\n"


def jobs(config: dict, profile: Path) -> tuple[list, set[str]]:
    """Return Snakemake's jobs of a whole run, in the order of the rules, and the local rules' names."""
    from snakemake import api
    from snakemake.settings.enums import Quietness

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        stated = read_profile(profile)
        with api.SnakemakeApi(api.OutputSettings(quiet={Quietness.ALL})) as snakemake:
            workflow = snakemake.workflow(
                api.ResourceSettings(
                    nodes=stated.jobs,
                    default_resources=stated.default_resources,
                    overwrite_resources=stated.set_resources,
                    overwrite_threads=stated.set_threads,
                ),
                config_settings=api.ConfigSettings(configfiles=[file]),
                snakefile=ROOT / "Snakefile",
            )
            dag = workflow.dag(api.DAGSettings(forceall=True))
            dag.execute_workflow(executor="slurm", pseudo_executor="dryrun")
            order = [rule.name for rule in workflow._workflow.rules]
            found = list(workflow._workflow.dag.jobs)
            local = set(workflow._workflow._localrules)
    found = [job for job in found if job.rule.name != "all"]
    return sorted(found, key=lambda job: (order.index(job.rule.name), str(job.wildcards))), local


def read_profile(profile: Path):
    """Return Snakemake's settings as a profile states them."""
    from snakemake import cli
    from snakemake.exceptions import CliException

    if not (profile / "config.yaml").is_file():
        raise UserError(f"{profile} has no config.yaml; fix --profile")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return cli.parse_args(["--workflow-profile", str(profile), "--dry-run"])[1]
    except SystemExit:
        raise refused(profile, said.getvalue().strip().splitlines()[-1].strip()) from None
    except (CliException, ValueError, TypeError) as error:  # such as `set-resources: text`
        raise refused(profile, first_line(error)) from None


def refused(profile: Path, reason: str) -> UserError:
    """Return the sentence on a profile that Snakemake does not take."""
    return UserError(
        f"{profile}/config.yaml is refused by Snakemake ({reason}); fix it as in {DEFAULT_PROFILE}"
    )
