"""What each stage asks of a machine: memory, minutes and GPUs, derived from the config.

Cheap, because Snakemake starts anew in every job: nothing is read but small YAML and JSON files.
"""

import functools
import math
from dataclasses import replace

import yaml

from longyarn.cluster import estimate, model_shapes
from longyarn.cluster.model_shapes import Shape
from longyarn.config.phases import configurations, parts, within
from longyarn.core.errors import UserError
from longyarn.core.files import ROOT
from longyarn.stages import INSTRUMENTS

GROWTH = 1.5  # of memory and minutes, with each attempt
MIB = 2**20
# Python, the libraries, and the two Snakemakes that start a job in a job (140 MB each); measured.
PROCESS = 1200 * MIB
GPU_PROCESS = 4000 * MIB  # with CUDA's libraries: an allowance, not measured by us
LEAST_MINUTES = 30  # queues are not cut so fine, and file systems can be slow
DISK = 100e6  # bytes a second of a slow shared disk
TOKENS = 250e3  # tokens a second of a tokenizer on one core, about
TOKENISE_WORKERS = 4  # processes of tokenise, where there are so many cores
ROW_GROUP = 4000 * MIB  # of Parquet, decoded: an allowance; those of books are large
WORKER = 250 * MIB  # of each of them, whatever the size of the corpus
# A thread's operations a second, measured: training in the default run, 1.2e13 of them, took 233 s on one
# thread of an AMD EPYC. Its matrices are small and its attention is masked; other models may reach more.
CPU_RATE = 5.1e10
# Where the model's shape or the number of tokens is unknown: 13B with LoRA, and a day.
UNKNOWN = {"mem_mb": 64_000, "runtime": 24 * 60}
GPUS_OF_A_MACHINE = 8
EXPORTS = ("export_llamafactory", "export_axolotl")  # which stream the packed sequences
# Stages that hold no more than the libraries, whatever the model.
LIGHT = (
    "patch_rope", "report", "gate", "export", "push", "provenance", "bundle", "sweep", "download_model",
    "checkpoint", "adopt", "pack", *EXPORTS,
)  # fmt: skip


def request(config: dict, stage: str, what: str, attempt: int = 1) -> int:
    """Return a stage's ``mem_mb`` (MiB of a machine) or ``runtime`` (minutes) at a 1-based attempt.

    Or ``gpu``, the GPUs of an evaluation job, which do not grow. A stage that needs the model's shape
    gets ``UNKNOWN`` where that is unknown; `make plan` says so.
    """
    shape = known_shape(config)
    if what == "gpu":
        return evaluation_gpus(config, shape)
    if what == "mem_mb":
        size = memory(config, stage, shape)
        first = UNKNOWN[what] if size is None else 100 * math.ceil(size / MIB / 100)
    else:
        found = minutes(config, stage, shape)
        first = UNKNOWN[what] if found is None else LEAST_MINUTES + math.ceil(found)
    return round(first * GROWTH ** (attempt - 1))


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


def check(config: dict) -> None:
    """Refuse a model.shape or a hardware.gpu that is not listed, or that cannot do what is asked."""
    if config["model"]["shape"]:
        model_shapes.named(config["model"]["shape"])
    for name, settings in configurations(config).items():
        try:
            check_hardware(settings)
        except UserError as error:
            raise UserError(f"{within(name)}{error}") from None


def check_hardware(config: dict) -> None:
    """Refuse a GPU that is not listed, or that has not the precision or the attention asked for."""
    for section in ("training", "evaluation"):
        if config["training"]["gpus"]:
            gpu_rate(config, config[section]["precision"])
        if config[section]["attention"] == "flash_attention_2":
            check_flash_attention(config, section)


def check_flash_attention(config: dict, section: str) -> None:
    """Refuse FlashAttention-2 where it cannot run: by its README, on GPUs of Ampere or newer alone.

    Those are the GPUs that compute in bf16.
    """
    name, precision = config["hardware"]["gpu"], config[section]["precision"]
    if not config["training"]["gpus"]:
        reason = "training.gpus is 0"
    elif "bf16" not in gpu(config)["tflops"]:
        reason = f"hardware.gpu is {name}"
    elif precision == "fp32":
        reason = f"{section}.precision is fp32"
    else:
        return
    raise UserError(
        f"{section}.attention flash_attention_2 needs a GPU of the Ampere generation or newer, and "
        f"bf16 or fp16, but {reason}; mend that or choose sdpa"
    )


def known_shape(config: dict) -> Shape | None:
    """Return the model's shape, or None where it is unknown or of another kind than ours."""
    try:
        return model_shapes.find(config)
    except UserError:
        return None


def memory(config: dict, stage: str, shape: Shape | None) -> float | None:
    """Return the bytes of host memory that a stage needs, or None where the config does not tell."""
    training = config["training"]
    if stage in LIGHT:
        return PROCESS
    if stage == "tokenise":
        return PROCESS + TOKENISE_WORKERS * WORKER
    if stage == "download_corpus":  # it streams; of a data set it holds a group of rows
        return PROCESS + (ROW_GROUP if config["corpus"]["datasets"] else 0)
    if shape is None:
        return None
    if stage == "merge":
        # A tensor that was trained whole, read in 32 bits, is the most; the embedding is the largest.
        return PROCESS + 300 * MIB + 2 * 4 * shape.vocab_size * shape.hidden_size
    if stage in INSTRUMENTS:
        on_gpu = training["gpus"] > 0
        weights, work = estimate.evaluation_memory(shape, config, on_gpu)
        if on_gpu:  # the weights pass through host memory
            return GPU_PROCESS + 1.2 * weights
        return PROCESS + 1.2 * (weights + work)
    return training_memory(config, shape)


def training_memory(config: dict, shape: Shape) -> float:
    """Return the bytes of host memory that training needs on each machine.

    On GPUs, each process loads the weights, and copies them to save; under ZeRO-3 the first does. What
    is offloaded comes on top.
    """
    training, setup = config["training"], estimate.Setup.of(config)
    if not setup.on_gpu:
        return PROCESS + 1.2 * estimate.peak(estimate.memory(shape, setup))
    loaded = 4 if setup.mode == "full" else estimate.WIDTH[setup.precision]
    copy = max(loaded * shape.parameters, estimate.saved_copy(shape, setup))
    copies = 1 if setup.zero_stage == 3 else training["gpus"]
    kept = estimate.memory(shape, setup)
    none = replace(setup, offload_weights=False, offload_optimizer=False, offload_activations=False)
    parts = ("weights", "gradients", "master copies", "optimizer state", "activations kept")
    moved = sum(estimate.memory(shape, none)[part] - kept[part] for part in parts)
    return GPU_PROCESS * training["gpus"] + 1.2 * copy * copies + 1.2 * moved * training["gpus"]


def minutes(config: dict, stage: str, shape: Shape | None) -> float | None:
    """Return the minutes that a stage takes, about, or None where the config does not tell."""
    tokens = estimate.packed_tokens(config)
    if stage in ("patch_rope", "report", "gate", "sweep", "checkpoint"):
        return 0.0
    if stage in ("download_corpus", "tokenise", "pack", *EXPORTS):
        workers = TOKENISE_WORKERS if stage == "tokenise" else 1
        return None if tokens is None else tokens / TOKENS / workers / 60
    if shape is None:
        return None
    moved = 2 * shape.parameters / DISK / 60  # the weights read once
    if stage in ("download_model", "adopt", "push"):  # adopt reads the base too
        return 5 * moved
    if stage == "export":
        return 2 * moved  # linked, and read for its hashes
    if stage == "merge":
        return 3 * moved
    if stage in ("provenance", "bundle"):
        # The base and what was trained, the merged models of phases or cells, and published ones.
        models = 2 + len(configurations(config)) + len(config["evaluation"]["more_variants"])
        return models * moved * (1 if stage == "provenance" else 2)
    if stage in INSTRUMENTS:
        return moved + 1.5 * evaluation_hours(config, shape, stage) * 60
    hours = training_hours(config, shape)
    return None if hours is None else 2 * moved + 1.25 * hours * 60


def training_hours(config: dict, shape: Shape) -> float | None:
    """Return the hours of training without loading and saving, or None where tokens are unknown."""
    tokens = estimate.training_tokens(config)
    if tokens is None:
        return None
    training, setup = config["training"], estimate.Setup.of(config)
    flops = estimate.training_flops(shape, setup, tokens)
    if not setup.on_gpu:
        return flops / (CPU_RATE * training["threads"] * setup.processes) / 3600
    return flops / (gpu_rate(config, training["precision"]) * setup.processes) / 3600


def evaluation_hours(config: dict, shape: Shape, instrument: str) -> float:
    """Return the hours of one instrument on one variant; layers over several GPUs take turns."""
    evaluation = config["evaluation"]
    flops = estimate.evaluation_flops(shape, config, instrument)
    if config["training"]["gpus"]:
        return flops / gpu_rate(config, evaluation["precision"]) / 3600
    return flops / (CPU_RATE * evaluation["threads"]) / 3600


def evaluation_gpus(config: dict, shape: Shape | None) -> int:
    """Return the GPUs of an evaluation job: none, one, or as many as the model's weights need.

    A power of two, up to those of a machine.
    """
    if not config["training"]["gpus"] or shape is None:
        return min(1, config["training"]["gpus"])
    size, count = gpu(config)["gib"] * estimate.GIB, 1
    while evaluation_memory(config, shape, count) > size and count < GPUS_OF_A_MACHINE:
        count *= 2
    return count


def evaluation_memory(config: dict, shape: Shape, gpus: int) -> float:
    """Return the bytes on each of several GPUs; whole layers divide unevenly, so a tenth is added."""
    weights, work = estimate.evaluation_memory(shape, config, True)
    return weights * (1 if gpus == 1 else 1.1 / gpus) + work


def flops_options(config: dict) -> str:
    """Return train.py's options for model FLOPs utilisation (MFU); none on a CPU or without a shape.

    The model's operations do not count what gradient checkpointing computes twice (arXiv 2204.02311,
    appendix B).
    """
    shape = known_shape(config) if config["training"]["gpus"] else None
    if shape is None:
        return ""
    setup = replace(estimate.Setup.of(config), gradient_checkpointing=False)
    peak = gpu_peak(config, setup.precision) * setup.processes
    return (
        f"--flops-per-token {estimate.training_flops(shape, setup, 1):.6g} --peak-flops {peak:.6g}"
    )


@functools.cache
def known_gpus() -> dict:
    """Return resources/gpus.yaml."""
    return yaml.safe_load((ROOT / "resources/gpus.yaml").read_text(encoding="utf-8"))


def gpu(config: dict) -> dict:
    """Return what is known of ``hardware.gpu``."""
    name = config["hardware"]["gpu"]
    if name not in known_gpus():
        raise UserError(
            f"hardware.gpu {name} is not in resources/gpus.yaml, which has {', '.join(known_gpus())}; "
            "choose one, or add yours with its memory and peak"
        )
    return known_gpus()[name]


def gpu_rate(config: dict, precision: str) -> float:
    """Return the operations a second that one GPU is taken to reach at a precision."""
    return gpu_peak(config, precision) * config["hardware"]["utilisation"]


def gpu_peak(config: dict, precision: str) -> float:
    """Return the operations a second that one GPU could do at a precision."""
    peaks = gpu(config)["tflops"]
    if precision not in peaks:
        raise UserError(
            f"hardware.gpu {config['hardware']['gpu']} has no {precision}; choose one of "
            f"{', '.join(peaks)} for training.precision and evaluation.precision, or another GPU"
        )
    return peaks[precision] * 1e12
