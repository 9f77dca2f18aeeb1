"""Checks of what the run needs of this machine and of the hub."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from longyarn import stages
from longyarn.cluster import container_images, job_resources, slurm_requests
from longyarn.cluster.preflight_run import NotChecked, Run
from longyarn.core.errors import UserError, first_line
from longyarn.core.files import ROOT, located
from longyarn.provenance.archive import check_place


def image(run: Run) -> str:
    """Every image exists. Snakemake has already pulled those of a registry."""
    paths = {str(job.container_img_path) for job in run.jobs if job.container_img_path}
    # Training on several machines enters its image itself. The last word of that command is the file.
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
    if "train" in asked:  # Snakemake lowers a job's request to the limit of --resources
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
            f"Snakemake does not know of the {count} GPUs of this machine, so jobs would compete for "
            f"them; add --resources gpu={count}"
        )
    return f"{count} × {found[0]}"


def disk(run: Run) -> str:
    """The configured paths are writable and have room for what the jobs will write, as the plan estimates."""
    for key, path in run.config["paths"].items():
        place = _existing(path)
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise UserError(
                f"paths.{key} {path} cannot be made, because {place} is not a directory that you "
                "may write to; choose another"
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


# What each stage writes, by the names of estimate.disk, and below which configured path.
WRITES = {
    stages.DOWNLOAD_CORPUS.name: (("results", "corpus"),),
    stages.TOKENISE.name: (("results", "tokens"),),
    stages.PACK.name: (("results", "packed sequences"),),
    stages.TRAIN.name: (("work", "checkpoints"), ("results", "what is trained")),
    stages.MERGE.name: (("results", "merged model"),),
}


def _to_come(run: Run) -> Iterable[tuple[str, str, float]]:
    """Yield the path, the part and the bytes of everything that the jobs will write."""
    from longyarn.cluster import estimate
    from longyarn.models.source_files import is_local

    config = run.config
    shape = job_resources.known_shape(config)
    if shape is None:
        raise NotChecked("the model's size is unknown yet; set model.shape, or download it first")
    source = config["model"]["source"]
    parts = estimate.disk(shape, config)
    for job in run.jobs:
        sizes = estimate.disk(shape, slurm_requests.job_config(job, config))
        yield from ((key, part, sizes[part]) for key, part in WRITES.get(job.rule.name, ()))
    if run.has(stages.DOWNLOAD_CORPUS.name) and config["corpus"]["datasets"]:
        yield "cache", "data sets", parts["corpus"]
    if run.has(stages.DOWNLOAD_MODEL.name):
        # Files are hard-linked on the same disk and copied to another one.
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
    """The hub serves each model that must be downloaded, or the cache has all of it."""
    from longyarn.models.hub import download, find
    from longyarn.models.source_files import is_local

    wanted = [run.config["model"]] if run.has(stages.DOWNLOAD_MODEL.name) else []
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
                    f"model.source {source} is not a directory with a config.json; correct the path"
                )
            continue
        try:
            cache = Path(run.config["paths"]["cache"])
            found = find(source, model.get("revision"), cache)
            if not found.online:
                download(found, code=False)
        except ModuleNotFoundError as error:
            raise NotChecked(f"{error.name} is not installed beside Snakemake") from None
        told.append(f"{source} at {found.commit}{'' if found.online else ', from the cache'}")
    if not told:
        raise NotChecked("model.source is a directory")
    return ", ".join(told)


def elsewhere(run: Run) -> str:
    """training.source exists, on this machine or on the hub."""
    if not run.has(stages.ADOPT.name):
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
    """The local files of the corpus exist, and the hub has its data sets at their revisions."""
    from longyarn.data import hub_datasets, local_files

    if not run.has(stages.DOWNLOAD_CORPUS.name):
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
    """The repository to push to and a token exist."""
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
    """lm_eval is installed and has the configured tasks. The images have it."""
    if not run.has("harness"):
        raise NotChecked("no task of lm_eval is to come")
    if any(job.container_img_path for job in run.jobs if job.rule.name == "harness"):
        raise NotChecked("the tasks run in the image")
    from longyarn.evaluation import lm_eval_tasks

    tasks = run.config["evaluation"]["harness"]["tasks"]
    lm_eval_tasks.check_tasks(tasks)
    return ", ".join(tasks)
