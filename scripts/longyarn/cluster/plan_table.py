"""The table of the plan: tokens, memory, disk, arithmetic and hours."""

from collections import Counter
from pathlib import Path

from longyarn.cluster import estimate, hardware, job_resources, model_shapes
from longyarn.config import derived
from longyarn.config.checks import instruments
from longyarn.config.layers import layered
from longyarn.config.phases import phases
from longyarn.core.errors import UserError


def planned(files: list[Path]) -> dict:
    """Return the complete, checked configuration of these files; of config.yaml without any."""
    config = layered(*files)
    hardware.check(config)
    return config


def shape_of(config: dict) -> model_shapes.Shape:
    """Return the model's shape, or raise UserError: without it nothing can be planned."""
    shape = model_shapes.find(config)
    if shape is None:
        raise UserError(
            f"the shape of {config['model']['source']} is unknown, so nothing can be planned; set "
            "model.shape to an architecture of resources/shapes.yaml, or download the model first "
            "(`snakemake prefetch`)"
        )
    return shape


def costs(config: dict) -> str:
    """Return the table of tokens, memory, disk, arithmetic and hours."""
    shape = shape_of(config)
    setup = estimate.Setup.of(config)
    trained = shape.trained_parameters(setup.mode, setup.lora)
    lines = [
        f"Plan of {config['run']}: {config['model']['source']}",
        f"  parameters  {shape.parameters:,}, trained {trained:,} ({setup.mode})",
    ]
    for name, phase in phases(config).items():
        lines.append(f"  {name.strip('/') or 'tokens':12}{tokens_of(phase)}")
    lines.append(f"  hardware    {machines(config)}")
    if not config["training"]["source"]:
        lines += ["", *memory_table(config, estimate.memory(shape, setup), setup.on_gpu)]
    lines.append("")
    lines.append("Disk, GB")
    written = written_to_disk(shape, config)
    lines += [f"  {name:20}{size / 1e9:9.2f}" for name, size in written.items()]
    lines.append(f"  {'all':20}{sum(written.values()) / 1e9:9.2f}")
    lines.append("")
    lines += hours(config, shape)
    return "\n".join(lines)


def memory_table(config: dict, parts: dict[str, float], on_gpu: bool) -> list[str]:
    """Return the lines on the memory of training, by part in bytes."""
    lines = [f"Memory of each {'GPU' if on_gpu else 'process'} in training, GiB"]
    lines += [f"  {name:20}{size / estimate.GIB:9.2f}" for name, size in parts.items() if size]
    room = f" of {hardware.gpu(config)['gib']:g}" if on_gpu else ", and the libraries' 0.5"
    return [*lines, f"  {'most at once':20}{estimate.peak(parts) / estimate.GIB:9.2f}{room}"]


def tokens_of(config: dict) -> str:
    """Return the tokens that training reads, in words."""
    tokens, training = estimate.training_tokens(config), config["training"]
    if training["source"]:
        return f"none: {training['source']} was trained elsewhere"
    if tokens is None:
        return "as many as the corpus gives: state mix.token_budget to plan them"
    length = derived.sequence_length(config)
    steps = training["steps"] or tokens // length // training["batch_size"]
    return f"{tokens:,}: {steps} steps × {training['batch_size']} sequences × {length}"


def written_to_disk(shape: model_shapes.Shape, config: dict) -> Counter:
    """Return bytes on disk by part; each phase packs, trains and merges again."""
    written = Counter(estimate.disk(shape, config))
    for name, phase in phases(config).items():
        if name:
            parts = estimate.disk(shape, phase)
            written.update({part: parts[part] for part in estimate.OF_EACH_PHASE})
    return written


def machines(config: dict) -> str:
    """Return the machines, the GPUs and the share of their peak that the plan assumes."""
    training = config["training"]
    count = f"{training['nodes']} machine{'s' * (training['nodes'] > 1)}"
    if not training["gpus"]:
        return (
            f"{count} without GPU, {training['threads']} thread(s) at "
            f"{job_resources.CPU_RATE / 1e9:.0f} GFLOP/s, as in our default run on an AMD EPYC"
        )
    share = config["hardware"]["utilisation"]
    peak = hardware.gpu(config)["tflops"][training["precision"]]
    return (
        f"{count} × {training['gpus']} × {config['hardware']['gpu']}, at {share:.0%} of "
        f"{peak:g} TFLOP/s in {training['precision']}"
    )


def hours(config: dict, shape: model_shapes.Shape) -> list[str]:
    """Return the lines on arithmetic and hours."""
    lines = [f"{'Arithmetic and time':22}{'FLOP':>10}{'hours':>10}{'GPU-hours':>12}"]
    gpus, variants = config["training"]["gpus"], len(config["evaluation"]["variants"])
    for name, phase in phases(config).items():
        tokens = estimate.training_tokens(phase)
        if tokens is None:
            continue
        flops = estimate.training_flops(shape, estimate.Setup.of(phase), tokens)
        took = job_resources.training_hours(phase, shape)
        paid = took * derived.processes(phase["training"]) if gpus else 0
        lines.append(f"  {f'{name}train':20}{flops:10.1e}{took:10.2f}{paid:12.1f}")
    for instrument in instruments(config["evaluation"]):
        flops = estimate.evaluation_flops(shape, config, instrument) * variants
        took = job_resources.evaluation_hours(config, shape, instrument) * variants
        paid = took * job_resources.evaluation_gpus(config, shape)
        name = f"{instrument} × {variants}"
        lines.append(f"  {name:20}{flops:10.1e}{took:10.2f}{paid:12.1f}")
    return lines
