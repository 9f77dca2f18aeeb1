"""What each stage asks of a machine: memory, minutes and GPUs, derived from the config.

It reads only small YAML and JSON files, because Snakemake starts again in every job.
"""

import math
from dataclasses import replace

from longyarn.cluster import estimate, hardware, model_shapes
from longyarn.cluster.model_shapes import Shape
from longyarn.config.phases import configurations
from longyarn.core.errors import UserError
from longyarn.stages import BY_NAME

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


def known_shape(config: dict) -> Shape | None:
    """Return the model's shape, or None where it is unknown or of another kind than ours."""
    try:
        return model_shapes.find(config)
    except UserError:
        return None


def memory(config: dict, stage: str, shape: Shape | None) -> float | None:
    """Return the bytes of host memory that a stage needs, or None if the config does not tell."""
    kind = BY_NAME[stage].memory
    if kind == "libraries":
        return PROCESS
    if kind == "workers":
        return PROCESS + TOKENISE_WORKERS * WORKER
    if kind == "rows":  # the stage streams; of a data set it holds one group of rows
        return PROCESS + (ROW_GROUP if config["corpus"]["datasets"] else 0)
    if shape is None:
        return None
    if kind == "tensor":
        # The largest tensor is the embedding, read in 32 bits twice if it was trained.
        return PROCESS + 300 * MIB + 2 * 4 * shape.vocab_size * shape.hidden_size
    if kind == "training":
        return training_memory(config, shape)
    on_gpu = config["training"]["gpus"] > 0
    weights, work = estimate.evaluation_memory(shape, config, on_gpu)
    if on_gpu:  # the weights pass through host memory
        return GPU_PROCESS + 1.2 * weights
    return PROCESS + 1.2 * (weights + work)


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
    """Return about how many minutes a stage takes, or None if the config does not tell."""
    row = BY_NAME[stage]
    if row.time == "short":
        return 0.0
    if row.time == "text":
        tokens = estimate.packed_tokens(config)
        workers = TOKENISE_WORKERS if row.memory == "workers" else 1
        return None if tokens is None else tokens / TOKENS / workers / 60
    if shape is None:
        return None
    moved = 2 * shape.parameters / DISK / 60  # the weights read once
    if row.time == "weights":
        return row.passes * moved
    if row.time == "all_weights":
        # The base and what was trained, the merged models of phases or cells, and published models.
        models = 2 + len(configurations(config)) + len(config["evaluation"]["more_variants"])
        return models * moved * row.passes
    if row.time == "evaluation":
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
    return flops / (hardware.gpu_rate(config, training["precision"]) * setup.processes) / 3600


def evaluation_hours(config: dict, shape: Shape, instrument: str) -> float:
    """Return the hours of one instrument on one variant; layers over several GPUs take turns."""
    evaluation = config["evaluation"]
    flops = estimate.evaluation_flops(shape, config, instrument)
    if config["training"]["gpus"]:
        return flops / hardware.gpu_rate(config, evaluation["precision"]) / 3600
    return flops / (CPU_RATE * evaluation["threads"]) / 3600


def evaluation_gpus(config: dict, shape: Shape | None) -> int:
    """Return the GPUs of an evaluation job: none, one, or as many as the model's weights need.

    A power of two, up to those of a machine.
    """
    if not config["training"]["gpus"] or shape is None:
        return min(1, config["training"]["gpus"])
    size, count = hardware.gpu(config)["gib"] * estimate.GIB, 1
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
    peak = hardware.gpu_peak(config, setup.precision) * setup.processes
    return (
        f"--flops-per-token {estimate.training_flops(shape, setup, 1):.6g} --peak-flops {peak:.6g}"
    )
