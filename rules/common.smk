"""What the stages share: the checked configuration, the run's directory, and small functions."""

import json
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir) / "scripts"))

from longyarn.cluster import (
    container_images,
    estimate,
    job_resources,
    preflight,
)
from longyarn.config import sweep_cells, variants
from longyarn.config.load import complete
from longyarn.config.phases import parts, phases
from longyarn.core import job_record, manifest
from longyarn.core.code_hash import code_hash
from longyarn.core.errors import UserError
from longyarn.data import chat_templates, local_files
from longyarn.models.source_files import BASE_MODEL_FILES, EXTERNAL_MODEL_FILES
from longyarn.training import identity
from snakemake.settings.types import DeploymentMethod

try:
    config = complete(config, Path(workflow.basedir) / "schemas" / "config.schema.yaml")
    job_resources.check(config)
except UserError as error:
    # Snakemake would print a WorkflowError with a piece of traceback.
    sys.exit(f"error: {error}")

RUN = f"{config['paths']['results']}/{config['run']}"

# What a run is asked for. The stage provenance seals it, so it runs after all of these.
PRODUCTS = [
    f"{RUN}/report.html",
    f"{RUN}/merged.json",
    f"{RUN}/merged",
    f"{RUN}/export.json",
    f"{RUN}/export",
    f"{RUN}/verified.json",
]

IMAGE = container_images.resolve(config, Path(workflow.basedir))
IN_APPTAINER = (
    DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method
)
if IN_APPTAINER:
    try:
        os.environ.update(container_images.environment(config))
    except UserError as error:
        sys.exit(f"error: {error}")

# Where each job ran, for its record. A Snakemake inside a job has them from the one that submitted it.
if workflow.is_main_process or job_record.COMMIT not in os.environ:
    os.environ.update(
        job_record.variables(Path(workflow.basedir), IMAGE if IN_APPTAINER else None)
    )

# Each phase's whole configuration by its directory; the run itself, without one, comes last. Each
# cell's likewise, the run itself first; there are no cells beside phases.
PHASES = phases(config)
CELLS = sweep_cells.cells(config)
PLACES = sweep_cells.places(config)  # the changes of each cell, and of what cells share
PARTS = parts(config)  # the configuration of the jobs in each of all these directories
PART = f"phase-[0-9]+/|{sweep_cells.DIRECTORY}/[^/]+/"


def rope_of(settings):
    """Return the RoPE variant that training with these settings starts from."""
    method = settings["rope"]["method"]
    return "base" if method == "none" else method


TRAINED_ROPE = rope_of(config)
FROM_ELSEWHERE = bool(config["training"]["source"])
TRAINED_BY = "adopt" if FROM_ELSEWHERE else "train"
VARIANTS = config["evaluation"]["variants"]
MORE_VARIANTS = config["evaluation"]["more_variants"]
PUBLISHED = [name for name in VARIANTS if "source" in MORE_VARIANTS.get(name, {})]
try:
    # The merged model of another run, and the RoPE that it was made with.
    OTHER_RUNS = {
        name: Path(config["paths"]["results"]) / MORE_VARIANTS[name]["run"]
        for name in VARIANTS
        if "run" in MORE_VARIANTS.get(name, {})
    }
    ROPE_OF_OTHER_RUNS = {
        name: variants.of_run(run, name) for name, run in OTHER_RUNS.items()
    }
except UserError as error:
    sys.exit(f"error: {error}")


def gpus_of_each_node():
    """Return SLURM's option for the GPUs of each machine, with their type where one is stated."""
    kind, gpus = config["hardware"]["slurm_gpu_type"], config["training"]["gpus"]
    return f"--gpus-per-node={kind}:{gpus}" if kind else f"--gpus-per-node={gpus}"


# Training on several machines calls srun and, inside, the image: srun is not in the image itself.
NODES = config["training"]["nodes"]
TRAINING_THREADS = config["training"]["threads"] * max(1, config["training"]["gpus"])
TRAINING_IMAGE = IMAGE if NODES == 1 else None
TRAINING_PLACE = {"nodes": NODES}
if NODES > 1:
    TRAINING_PLACE |= {"mpi": "srun", "tasks": NODES, "tasks_per_gpu": 0}
    if config["training"]["gpus"]:
        # SLURM could also spread the sum unevenly.
        TRAINING_PLACE["slurm_extra"] = gpus_of_each_node()

# Only for rules that use GPUs: with a type, SLURM's plugin asks for a GPU.
GPU_TYPE = {}
if config["training"]["gpus"] and config["hardware"]["slurm_gpu_type"]:
    GPU_TYPE["gpu_model"] = config["hardware"]["slurm_gpu_type"]


wildcard_constraints:
    variant="|".join([*variants.BUILT_IN, "step-[0-9]+", *MORE_VARIANTS]),
    phase=f"({PART})?",
    step="[0-9]+",


def code(stage):
    """Return the hash of a stage's code: as a param it reruns the stage when the code changes.

    Comments, docstrings and layout do not count. To accept a change of code that changes no result,
    see docs/reruns.md.
    """
    return code_hash(Path(workflow.basedir) / "scripts" / f"{stage}.py")


def phase_name(wildcards):
    """Return the directory of a job's phase or cell; a checkpoint at some step is one of the run itself."""
    name = getattr(wildcards, "phase", "")
    return "" if name.startswith("step-") else name


def phase_of(wildcards):
    """Return the configuration of a job's phase or cell."""
    return PARTS[phase_name(wildcards)]


def owner(name, stage):
    """Return the directory where a stage of a phase or cell lies: cells share what is the same."""
    return (
        sweep_cells.directory(sweep_cells.shared(PLACES[name], stage))
        if name in PLACES
        else name
    )


def training_of(wildcards):
    """Return what config section `training` says of training itself, for a job's phase or cell."""
    training = phase_of(wildcards)["training"]
    return {k: v for k, v in training.items() if k not in ("source", "revision")}


def before(wildcards):
    """Return the model that a phase starts from, without ending: the base, or the last phase's own."""
    names, name = list(PHASES), phase_name(wildcards)
    number = names.index(name) if name in names else 0
    return f"{RUN}/{names[number - 1]}merged" if number else f"{RUN}/base"


def start_of_phase(wildcards):
    """Return the manifests and payloads of the model and the RoPE that a phase starts from."""
    model, rope = before(wildcards), trained_rope(wildcards)
    return {
        "base": f"{model}.json",
        "model": ancient(model),
        "rope": f"{rope}.json",
        "rope_files": ancient(rope),
    }


def trained_rope(wildcards):
    """Return the RoPE variant that a phase or cell trains with, without ending."""
    place = owner(phase_name(wildcards), "patch_rope")
    return f"{RUN}/{place}rope/{rope_of(phase_of(wildcards))}"


def pack_of(wildcards):
    """Return the training sequences of a phase or cell, without ending."""
    return f"{RUN}/{owner(phase_name(wildcards), 'pack')}pack"


def as_json(value):
    """Return settings as one quoted command-line argument."""
    return shlex.quote(json.dumps(value, ensure_ascii=False))


def unless_null(flag, value):
    """Return a command-line option, or nothing where the config says null."""
    return "" if value is None else f"{flag} {shlex.quote(str(value))}"


def by_name(directory, names):
    """Return NAME=manifest arguments for manifests of one kind."""
    return [f"{name}={RUN}/{directory}/{name}.json" for name in names]


def source_of(wildcards):
    """Return source and revision of the model that a job downloads: the base, or a published variant."""
    return MORE_VARIANTS.get(getattr(wildcards, "variant", None), config["model"])


def local_model_files(wildcards):
    """Return the files of a local source, so that a changed model is noticed; none for the hub."""
    source = Path(source_of(wildcards)["source"]).expanduser()
    return sorted(
        {str(file) for pattern in BASE_MODEL_FILES for file in source.glob(pattern)}
    )


def local_trained_files(wildcards):
    """Return the files of a local training.source, so that a changed one is noticed; none for the hub."""
    source = Path(config["training"]["source"]).expanduser()
    return sorted(
        {str(file) for pattern in EXTERNAL_MODEL_FILES for file in source.glob(pattern)}
    )


def local_corpus_files(wildcards):
    """Return the local files of the corpus, so that a changed one is noticed."""
    entries = config["corpus"]["files"]
    return [
        str(file) for entry in entries for file in local_files.matches(entry["files"])
    ]


def rope_settings(wildcards):
    """Return the config keys that a variant depends on; the base and published models depend on none."""
    variant = wildcards.variant
    if variant in ("base", *PUBLISHED):
        return as_json(
            {"method": "none", "write_config": config["rope"]["write_config"]}
        )
    return as_json(
        variants.rope_settings(
            phase_of(wildcards)["rope"], variant, MORE_VARIANTS.get(variant, {})
        )
    )


def request(stage, what):
    """Return a resource of a stage, mem_mb, runtime or gpu, as a function of the attempt."""
    return lambda wildcards, attempt: job_resources.request(
        phase_of(wildcards), stage, what, attempt
    )


def inside_image():
    """Return the command that enters the image, where a rule has to call it by itself."""
    if NODES == 1 or not IN_APPTAINER:
        return ""
    settings = workflow.deployment_settings
    return container_images.exec_command(
        IMAGE, settings.apptainer_args, settings.apptainer_prefix
    )


def on_every_node():
    """Return the command that starts a program once on each machine of a job."""
    if NODES == 1:
        return ""
    gpus = config["training"]["gpus"]
    return (
        f"srun --nodes={NODES} --ntasks={NODES} --ntasks-per-node=1 --cpus-per-task={TRAINING_THREADS}"
        " --kill-on-bad-exit=1" + (f" {gpus_of_each_node()}" if gpus else "")
    )


def evaluation_lengths():
    """Return the options of scripts/check_evaluation.py."""
    perplexity, passkey = (
        config["evaluation"][name] for name in ("perplexity", "passkey")
    )
    options = {
        "--perplexity-lengths": perplexity["lengths"],
        "--tokens-per-document": [perplexity["tokens_per_document"]],
        "--passkey-lengths": passkey["lengths"],
        "--digits": [passkey["digits"]],
        "--thresholds": [as_json(config["gate"])],
        "--needles": [passkey["needles"]],
    }
    if passkey["haystack"]:
        options["--haystack"] = [shlex.quote(passkey["haystack"])]
    return " ".join(
        " ".join(map(str, [name, *values])) for name, values in options.items()
    )


def mix_options(wildcards):
    """Return the options of scripts/pack.py."""
    mix = phase_of(wildcards)["mix"]
    return " ".join(
        [
            unless_null("--sequence-length", mix["sequence_length"]),
            f"--long-share {mix['long_share']}",
            f"--shares {as_json(mix['shares'])}" if mix["shares"] else "",
            (
                f"--short-from {shlex.join(mix['short_from'])}"
                if mix["short_from"]
                else ""
            ),
            f"--packing {mix['packing']}",
            unless_null("--token-budget", mix["token_budget"]),
            "--allow-repeats" if mix["allow_repeats"] else "",
            "--document-masks" if mix["document_masks"] else "--no-document-masks",
            f"--seed {mix['seed']}",
        ]
    ).strip()


def tokens_to_read(wildcards):
    """Return the option of scripts/pack.py that tells how much training will read; none for epochs.

    None either where several cells read it, each as much as its own steps say: train checks that. A
    resource, not a param: with more steps, training goes on with the same sequences.
    """
    settings = phase_of(wildcards)
    if (
        phase_name(wildcards) not in PHASES | CELLS
        or settings["training"]["steps"] is None
        or FROM_ELSEWHERE
    ):
        return ""
    return f"--read {estimate.training_tokens(settings)}"


def chat_template_file():
    """Return the file of the chat template, where one is named: an edited one tokenises anew."""
    name = config["corpus"]["chat_template"]
    return [str(chat_templates.path_of(name))] if name else []


def variant_inputs(wildcards):
    """Return the manifests and payloads of a variant's weights and RoPE, and the base's manifest.

    The base's, because a variant with another tokenizer cannot be compared.
    """
    model, rope = weights_of(wildcards.variant), rope_of_variant(wildcards.variant)
    if part := phase_name(wildcards):  # of which the trained model alone differs
        model, rope = f"{RUN}/{part}merged", trained_rope(wildcards)
    return {
        "base": f"{RUN}/base.json",
        "model": f"{model}.json",
        "weights": ancient(model),
        "rope": f"{rope}.json",
        "rope_files": ancient(rope),
    }


def weights_of(variant):
    """Return a variant's weights, without ending.

    An untrained variant is the base's weights with other RoPE settings; the trained one is merged, and
    so is step-<number>, a checkpoint of it.
    """
    if variant in OTHER_RUNS:
        return f"{OTHER_RUNS[variant]}/merged"
    if variant in PUBLISHED:
        return f"{RUN}/models/{variant}"
    if variant.startswith("step-"):
        return f"{RUN}/{variant}/merged"
    return f"{RUN}/merged" if variant == "trained" else f"{RUN}/base"


def rope_of_variant(variant):
    """Return a variant's RoPE, without ending."""
    if variant in OTHER_RUNS:
        return str(ROPE_OF_OTHER_RUNS[variant].with_suffix(""))
    trained = variant == "trained" or variant.startswith("step-")
    return f"{RUN}/rope/{TRAINED_ROPE if trained else variant}"


def look_before_the_first_job():
    """Stop with a sentence where something is amiss that would be found out late, or in the queue."""
    if workflow.is_main_process and not workflow.touch:
        preflight.look(preflight.of_workflow(workflow, config))


def print_verdict():
    """Say at the end of a run where the report is and what it found."""
    written = Path(RUN) / "report.json"
    if written.is_file():
        verdict = json.loads(written.read_text(encoding="utf-8"))["verdict"]["sentence"]
        print(f"\n{verdict}\nThe report: {Path(RUN) / 'report.html'}", file=sys.stderr)


# A manifest whose payload was purged says what is not there; set aside, its stage is made anew.
if workflow.is_main_process:
    for note in manifest.set_aside_incomplete(
        path for path in Path(RUN).rglob("*.json") if path.with_suffix("").is_dir()
    ):
        print(
            f"{note}; the stage will be made anew where it is needed", file=sys.stderr
        )
