"""Checks before the first job: what would stop a run hours later, or in the queue, is said now.

A check returns what it found, or raises: UserError for what has to be mended, NotChecked for what
does not apply here or cannot be seen from here.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from longyarn.cluster import container_images, job_resources
from longyarn.config import sweep_cells
from longyarn.core.errors import UserError, first_line
from longyarn.core.files import ROOT, located
from longyarn.provenance.archive import check_place
from longyarn.stages import INSTRUMENTS

IS_OK, NOT_CHECKED, IS_WRONG = "ok", "not checked", "error"


class NotChecked(Exception):
    """A check that does not apply, or that cannot be made from here; the message says why."""


@dataclass(frozen=True)
class Run:
    """What is about to run, and where.

    ``jobs`` are Snakemake's, those only that are not done. ``slurm`` is SLURM's executor, None where
    jobs run on this machine. ``gpus`` is the limit that --resources gpu= sets, None without one;
    ``cores`` that of --cores. ``unknown_rules`` are names under set-resources that no rule has.
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
        """Return one job of each rule, and phase, that SLURM is to run, by ``requests.job_name``."""
        return {
            job_resources.job_name(job): job for job in self.jobs if self.slurm and not job.is_local
        }


def of_workflow(workflow, config: dict) -> Run:
    """Return what Snakemake is about to run; to be called from `onstart:`."""
    order = [rule.name for rule in workflow.rules]
    known = {*order, "train", "adopt"}  # of which a workflow has one
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
    """Exit with what is amiss, one sentence each; where `preflight` is the target, say all and exit."""
    asked = run.has("preflight")
    wrong = []
    for name, outcome, sentence in check(run):
        if outcome == IS_WRONG:
            wrong.append(sentence)
        elif asked:
            print(f"{name}: {outcome}: {sentence}", file=sys.stderr)
    # Last, because SLURM's plugin has its own things to say meanwhile.
    for sentence in wrong:
        print(f"error: {sentence}", file=sys.stderr)
    if wrong or asked:
        sys.exit(1 if wrong else 0)


def image(run: Run) -> str:
    """Each image is there. Snakemake has pulled those of a registry before this runs."""
    paths = {str(job.container_img_path) for job in run.jobs if job.container_img_path}
    # Training on several machines enters its image by itself; the last word of its command is the file.
    commands = (job.params.get("inside_image") for job in run.jobs)
    paths |= {shlex.split(command)[-1] for command in commands if command}
    if not paths:
        raise NotChecked("no job to come runs in a container (--sdm apptainer)")
    if run.config["container"]["image"] == "cpu" and run.config["training"]["gpus"]:
        raise UserError(
            "container.image cpu cannot use GPUs, and training.gpus is "
            f"{run.config['training']['gpus']}; set container.image to cuda"
        )
    for path in sorted(paths):
        if not Path(path).exists():
            sentence = container_images.missing(run.config, ROOT)
            raise UserError(
                sentence
                or f"the image {path} was not pulled; run `snakemake prefetch` with the same profile"
            )
    return ", ".join(sorted(paths))


def gpus(run: Run) -> str:
    """This machine has the GPUs that its jobs ask for."""
    asked = {job.rule.name: int(job.resources.get("gpu", 0)) for job in run.jobs if job.is_local}
    if "train" in asked:  # Snakemake lowers what a job asks for to what --resources gives
        asked["train"] = run.config["training"]["gpus"]
    rule = max(asked, key=asked.get, default=None)
    wanted = asked.get(rule, 0)
    if not wanted:
        raise NotChecked("no job to come asks for a GPU of this machine")
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = first_line(getattr(error, "stdout", None) or error)
        raise UserError(
            f"training.gpus is {run.config['training']['gpus']}, but `nvidia-smi -L` fails here "
            f"({said}); install NVIDIA's driver, or set training.gpus to 0 for the CPU"
        ) from None
    found = re.findall(r"^GPU \d+: (.*?) \(", done.stdout, re.M)
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(found) if chosen is None else min(len(found), len(chosen.split(",")) * bool(chosen))
    if count < wanted:
        hidden = f" (CUDA_VISIBLE_DEVICES is {chosen!r})" if count < len(found) else ""
        raise UserError(
            f"{rule} asks for {wanted} GPUs, but this machine shows {count}{hidden}; lower training.gpus, "
            "or use a larger machine"
        )
    if run.gpus is None or run.gpus < wanted:
        raise UserError(
            f"Snakemake was not told of the {count} GPUs of this machine, so jobs would get in each "
            f"other's way; add --resources gpu={count}"
        )
    return f"{count} × {found[0]}"


def disk(run: Run) -> str:
    """The config's paths can be written to, and have room for what is to come, by the plan's estimate."""
    for key, path in run.config["paths"].items():
        place = _existing(path)
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise UserError(
                f"paths.{key} {path} cannot be made, because {place} is no directory that you "
                "may write to; mend it"
            )
    disks: dict[int, list[tuple[str, str, float]]] = {}
    for key, part, size in _to_come(run):
        disks.setdefault(_device(run.config["paths"][key]), []).append((key, part, size))
    told = []
    for parts in disks.values():
        keys = dict.fromkeys(f"paths.{key}" for key, _, _ in parts)
        root = Path(run.config["paths"][parts[0][0]])
        needed, free = sum(size for _, _, size in parts), shutil.disk_usage(_existing(root)).free
        if free < needed:
            most = ", ".join(f"{part} {size / 1e9:.2f} GB" for _, part, size in parts)
            raise UserError(
                f"the disk of {' and '.join(keys)} has {free / 1e9:.2f} GB free and about "
                f"{needed / 1e9:.2f} GB are needed ({most}); free some, or set a path on another disk"
            )
        told.append(f"about {needed / 1e9:.2f} of {free / 1e9:.0f} GB free at {' and '.join(keys)}")
    if not told:
        raise NotChecked("nothing to come needs much")
    return ", ".join(told)


# Which stage writes what, by the names of estimate.disk, and below which of the config's paths.
WRITES = {
    "download_corpus": (("results", "corpus"),),
    "tokenise": (("results", "tokens"),),
    "pack": (("results", "packed sequences"),),
    "train": (("work", "checkpoints"), ("results", "what is trained")),
    "merge": (("results", "merged model"),),
}


def _to_come(run: Run) -> Iterable[tuple[str, str, float]]:
    """Yield where, what and how many bytes the jobs to come write."""
    from longyarn.cluster import estimate
    from longyarn.models.source_files import is_local

    config = run.config
    shape = job_resources.known_shape(config)
    if shape is None:
        raise NotChecked("the model's size is unknown yet; set model.shape, or download it first")
    source = config["model"]["source"]
    parts = estimate.disk(shape, config)
    for job in run.jobs:
        sizes = estimate.disk(shape, job_resources.job_config(job, config))
        yield from ((key, part, sizes[part]) for key, part in WRITES.get(job.rule.name, ()))
    if run.has("download_corpus") and config["corpus"]["datasets"]:
        yield "cache", "data sets", parts["corpus"]
    if run.has("download_model"):
        # Files are linked where one disk has both places, and copied elsewhere.
        place = located(source) if is_local(source) else config["paths"]["cache"]
        if not is_local(source):
            yield "cache", "base model", parts["base model"]
        if _device(place) != _device(config["paths"]["results"]):
            yield "results", "base model", parts["base model"]


def _existing(path: str | Path) -> Path:
    """Return a path, or the nearest directory above it that exists."""
    path = Path(path).expanduser().absolute()
    return next(place for place in [path, *path.parents] if place.exists())


def _device(path: str | Path) -> int:
    return _existing(path).stat().st_dev


def hub(run: Run) -> str:
    """The hub gives each model that is still to be downloaded, or the cache has it whole."""
    from longyarn.models.hub import bring, find
    from longyarn.models.source_files import is_local

    wanted = [run.config["model"]] if run.has("download_model") else []
    defined = run.config["evaluation"]["more_variants"]
    wanted += [
        defined[job.wildcards.variant] for job in run.jobs if job.rule.name == "download_variant"
    ]
    if not wanted:
        raise NotChecked("the model is here already")
    told = []
    for model in wanted:
        source = model["source"]
        if is_local(source):
            if not (located(source) / "config.json").is_file():
                raise UserError(
                    f"model.source {source} is no directory with a config.json; mend the path"
                )
            continue
        try:
            cache = Path(run.config["paths"]["cache"])
            found = find(source, model.get("revision"), cache)
            if not found.online:
                bring(found, code=False)
        except ModuleNotFoundError as error:
            raise NotChecked(f"{error.name} is not installed beside Snakemake") from None
        told.append(f"{source} at {found.commit}{'' if found.online else ', from the cache'}")
    if not told:
        raise NotChecked("model.source is a directory")
    return ", ".join(told)


def elsewhere(run: Run) -> str:
    """What training.source names is there, or the hub gives it."""
    if not run.has("adopt"):
        raise NotChecked("no model trained elsewhere is to come")
    from longyarn.models import external_source
    from longyarn.models.source_files import is_local

    training = run.config["training"]
    if is_local(training["source"]):
        return str(external_source.local(training["source"]))
    try:
        cache = Path(run.config["paths"]["cache"])
        found = external_source.locate(training["source"], training["revision"], cache)
    except ModuleNotFoundError as error:
        raise NotChecked(f"{error.name} is not installed beside Snakemake") from None
    return f"{found.repository} at {found.commit}"


def corpus(run: Run) -> str:
    """Local files of the corpus are there, and the hub has its data sets at their revisions."""
    from longyarn.data import hub_datasets, local_files

    if not run.has("download_corpus"):
        raise NotChecked("the corpus is here already")
    settings = run.config["corpus"]
    for entry in settings["files"]:
        local_files.check(entry)
    for entry in settings["datasets"]:
        hub_datasets.check(entry)
    try:
        cache = Path(run.config["paths"]["cache"]) / "datasets"
        for entry in settings["datasets"]:
            if not hub_datasets.is_fetched(entry, settings["skip_bad"], cache):
                hub_datasets.check_access(entry)
    except ModuleNotFoundError as error:
        raise NotChecked(f"{error.name} is not installed beside Snakemake") from None
    told = [entry["files"] for entry in settings["files"]]
    told += [f"{entry['repository']} at {entry['revision']}" for entry in settings["datasets"]]
    if not told:
        raise NotChecked("the corpus has no local files and no data sets of the hub")
    return ", ".join(told)


def destination(run: Run) -> str:
    """There is a repository to push to, and a token."""
    if not run.has("push"):
        raise NotChecked("nothing is to be pushed")
    from longyarn.models.hub_upload import check_destination

    repository = run.config["export"]["repository"]
    try:
        check_destination(repository)
    except ModuleNotFoundError as error:
        raise NotChecked(f"{error.name} is not installed beside Snakemake") from None
    return repository


def archive(run: Run) -> str:
    """The run lies where an archive can hold it."""
    if not run.has("bundle"):
        raise NotChecked("no archive is to be made")
    place = Path(run.config["paths"]["results"]) / run.config["run"]
    check_place(place)
    return f"{place}.tar"


def lm_eval(run: Run) -> str:
    """lm_eval is installed and has the tasks asked for; the images have it."""
    if not run.has("harness"):
        raise NotChecked("no task of lm_eval is to come")
    if any(job.container_img_path for job in run.jobs if job.rule.name == "harness"):
        raise NotChecked("the tasks run in the image")
    from longyarn.evaluation import lm_eval_tasks

    tasks = run.config["evaluation"]["harness"]["tasks"]
    lm_eval_tasks.check_tasks(tasks)
    return ", ".join(tasks)


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
            raise UserError("`sbatch --test-only` is silent for 60 s; wait for SLURM") from None
        if done.returncode:
            raise UserError(_refusal(rule, job, done.stderr))
    return f"accepts the requests of {', '.join(run.submitted())}"


def _training_as_configured(run: Run) -> None:
    """Stop where the profile gives training other machines or GPUs than the config, which counts on them."""
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
    """No attempt asks for more than its partition gives, and the attempts give what a stage needs.

    SLURM itself takes a request that is too long for its partition, and lets it wait for ever.
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
        # Of several partitions, SLURM takes one that fits.
        limit = max(
            (limits.get(name, math.inf) for name in partitions.split(",")), default=math.inf
        )
        if max(asked) > limit:
            raise UserError(
                f"{name} asks for {max(asked)} minutes at attempt {asked.index(max(asked)) + 1}, but "
                f"partition {partitions} gives {limit:.0f}, so it would wait for ever; set `runtime` of "
                f"{rule} under set-resources in the profile: then each attempt asks for that"
            )
        needed = job_resources.minutes(job_resources.job_config(job, run.config), rule, shape)
        # Training goes on in the next attempt; other stages begin anew.
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
        call = job_resources.sbatch_call(
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
            f"SLURM does not know slurm_account {account!r} of the profile ({first_line(error)}); mend it, "
            "or leave it out"
            if account and "account" in str(error)
            else f"the request of {job.rule.name} cannot be made ({first_line(error)}); mend the profile"
        ) from None
    return [*shlex.split(call), "--test-only", "--wrap=true"]


# What SLURM says, and what to do. The first that fits counts.
MENDS = {
    "partition": "mend slurm_partition in the profile; `sinfo` lists the partitions",
    "account": "mend slurm_account in the profile; `sacctmgr show associations user=$USER` lists yours",
    "qos": "mend qos in the profile",
    "time limit": "lower its `runtime`, under set-resources in the profile",
    "feature": "mend constraint in the profile",
    "node configuration": "no machines of the partition have as much, so ask for less memory, fewer GPUs "
    "(training.gpus, gpu_model) or fewer machines (training.nodes), or choose another partition",
    "configuration source": "this machine has no configuration of SLURM; start where jobs are submitted",
    "contact": "wait for SLURM's controller",
}


def _refusal(rule: str, job, said: str) -> str:
    """Return a sentence for a request that SLURM refused."""
    lines = [re.sub("^(sbatch: |error: |allocation failure: )*", "", x) for x in said.splitlines()]
    reason = "; ".join(dict.fromkeys(line for line in lines if line)) or "no reason given"
    mend = next((v for k, v in MENDS.items() if k in reason.lower()), "mend the profile")
    asked = {
        "slurm_partition": "partition", "nodes": "nodes", "gpu": "GPUs", "mem_mb": "MB",
        "runtime": "minutes",
    }  # fmt: skip
    resources = [f"{word} {value}" for k, word in asked.items() if (value := job.resources.get(k))]
    return f"SLURM refuses the job of {rule} ({', '.join(resources)}): {reason}; {mend}"


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


# What may run beside a run that trains, when one of its checkpoints is looked at.
AFTER_CHECKPOINT = ("merge", *INSTRUMENTS)


def command(run: Run) -> str:
    """What Snakemake was told fits this workflow: Snakemake itself waits for ever, or says nothing."""
    if run.cores == 0 and not run.slurm:
        raise UserError("--cores is 0, so no job could ever start; give at least 1")
    first = [job for job in run.jobs if job.rule.name not in ("checkpoint", *AFTER_CHECKPOINT)]
    if run.has("checkpoint") and first:
        raise UserError(
            "the checkpoint asked for is of a run that has not come so far: "
            f"{job_resources.job_name(first[0])} would have to run first, beside the run itself; wait until "
            "it trains its last phase"
        )
    if run.has("sweep") and len(sweep_cells.all_changes(run.config)) < 2:
        raise UserError(
            "sweep.factors has nothing that differs from the configuration; state some values, as in "
            "docs/sweeps.md"
        )
    if run.unknown_rules:
        raise UserError(
            f"set-resources names {run.unknown_rules[0]}, but no rule is called so; mend the profile"
        )
    return "cores and rules"


CHECKS: tuple[Callable[[Run], str], ...] = (
    command,
    image,
    gpus,
    disk,
    hub,
    elsewhere,
    corpus,
    destination,
    archive,
    lm_eval,
    slurm,
    walltime,
)
