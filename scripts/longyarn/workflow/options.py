"""Command lines of the rules: options of the stage programs and settings of jobs, from the configuration."""

import json
import shlex
from collections.abc import Callable

from longyarn.cluster import container_images, estimate
from longyarn.config import variants
from longyarn.workflow.layout import Layout


def unrecorded(value) -> Callable:
    """Return a param that reaches the command but is not part of a job's provenance.

    ``value`` is the param, or a function of the wildcards that returns it.
    """
    # Snakemake runs a job again if a param differs from the recorded one. It does not record a function
    # that takes `output`, because it supposes that the result follows from the output's name. Settings that
    # change no result belong here: where a script lies, how a program is started, what the evaluation will
    # ask for. A job that SLURM starts computes them again from the configuration.
    return lambda wildcards, output: value(wildcards) if callable(value) else value


def as_json(value) -> str:
    """Return settings as one quoted command-line argument."""
    return shlex.quote(json.dumps(value, ensure_ascii=False))


def unless_null(flag: str, value) -> str:
    """Return a command-line option, or nothing if the configuration says null."""
    return "" if value is None else f"{flag} {shlex.quote(str(value))}"


def named(stems: dict[str, str]) -> list[str]:
    """Return NAME=MANIFEST arguments."""
    return [f"{name}={stem}.json" for name, stem in stems.items()]


def manifests(stems: dict[str, str]) -> list[str]:
    """Return the manifests of these results."""
    return [f"{stem}.json" for stem in stems.values()]


def training(config: dict) -> dict:
    """Return config section `training` without the keys that name a model trained elsewhere."""
    settings = config["training"]
    return {key: settings[key] for key in settings if key not in ("source", "revision")}


def training_settings(config: dict) -> str:
    """Return the settings of training as an argument."""
    return as_json(training(config))


def rope_settings(layout: Layout, variant: str, phase: str) -> str:
    """Return the settings of patch_rope for a variant; the base and published models have only their own."""
    if variant in ("base", *layout.published):
        write_config = layout.config["rope"]["write_config"]
        return as_json({"method": "none", "write_config": write_config})
    rope = layout.configuration(phase)["rope"]
    defined = layout.config["evaluation"]["more_variants"].get(variant, {})
    return as_json(variants.rope_settings(rope, variant, defined))


def mix(config: dict) -> str:
    """Return the options of scripts/pack.py for config section `mix`."""
    mix = config["mix"]
    options = [
        unless_null("--sequence-length", mix["sequence_length"]),
        f"--long-share {mix['long_share']}",
        f"--shares {as_json(mix['shares'])}" if mix["shares"] else "",
        f"--short-from {shlex.join(mix['short_from'])}" if mix["short_from"] else "",
        f"--packing {mix['packing']}",
        unless_null("--token-budget", mix["token_budget"]),
        "--allow-repeats" if mix["allow_repeats"] else "",
        "--document-masks" if mix["document_masks"] else "--no-document-masks",
        f"--seed {mix['seed']}",
    ]
    return " ".join(options).strip()


def tokens_to_read(layout: Layout, phase: str) -> str:
    """Return the option of scripts/pack.py for the number of tokens that training will read.

    Empty if training reads epochs, and if several cells read the same sequences: then train checks the
    number.
    """
    settings = layout.configuration(phase)
    shared = phase not in layout.phases | layout.cells
    if shared or settings["training"]["steps"] is None or settings["training"]["source"]:
        return ""
    return f"--read {estimate.training_tokens(settings)}"


def lengths(config: dict, instrument: str) -> str:
    """Return the option with the stated lengths of an instrument, or the options that they follow from."""
    stated = config["evaluation"][instrument]["lengths"]
    return (
        f"--lengths {' '.join(map(str, stated))}" if stated else derived_lengths(config, instrument)
    )


def derived_lengths(config: dict, instrument: str) -> str:
    """Return the options that an instrument's lengths follow from; empty if the lengths are stated.

    The model's own original length is not among them: it can be unknown until the model is downloaded,
    and an option that changed then would make finished jobs run again.
    """
    rope = config["rope"]
    if config["evaluation"][instrument]["lengths"]:
        return ""
    original = unless_null("--original", rope["original_max_position_embeddings"])
    return f"--target {rope['target_length']} {original}".strip()


def evaluation_checks(config: dict) -> str:
    """Return the options of scripts/check_evaluation.py."""
    perplexity, passkey = (config["evaluation"][name] for name in ("perplexity", "passkey"))
    options = {
        "--target": [config["rope"]["target_length"]],
        "--perplexity-lengths": perplexity["lengths"] or [],
        "--tokens-per-document": [perplexity["tokens_per_document"]],
        "--passkey-lengths": passkey["lengths"] or [],
        "--digits": [passkey["digits"]],
        "--thresholds": [as_json(config["gate"])],
        "--needles": [passkey["needles"]],
    }
    if passkey["haystack"]:
        options["--haystack"] = [shlex.quote(passkey["haystack"])]
    return " ".join(
        " ".join(map(str, [name, *values])) for name, values in options.items() if values
    )


def gpu_model(config: dict) -> dict[str, str]:
    """Return SLURM's resource for the type of GPU, only for rules that use GPUs: it makes SLURM give one."""
    kind = config["hardware"]["slurm_gpu_type"]
    return {"gpu_model": kind} if kind and config["training"]["gpus"] else {}


def gpus_of_each_node(config: dict) -> str:
    """Return SLURM's option for the GPUs of each machine, with their type if the configuration has one."""
    kind, gpus = config["hardware"]["slurm_gpu_type"], config["training"]["gpus"]
    return f"--gpus-per-node={kind}:{gpus}" if kind else f"--gpus-per-node={gpus}"


def training_threads(config: dict) -> int:
    """Return the CPU threads of training on each machine."""
    return config["training"]["threads"] * max(1, config["training"]["gpus"])


def training_nodes(config: dict) -> dict:
    """Return the resources by which SLURM gives the training job its machines."""
    nodes, gpus = config["training"]["nodes"], config["training"]["gpus"]
    if nodes == 1:
        return {"nodes": 1}
    several = {"nodes": nodes, "mpi": "srun", "tasks": nodes, "tasks_per_gpu": 0}
    # Without this option SLURM can spread the GPUs unevenly.
    return several | ({"slurm_extra": gpus_of_each_node(config)} if gpus else {})


def on_every_node(config: dict) -> str:
    """Return the command that starts a program once on each machine of a job; empty for one machine."""
    nodes, gpus = config["training"]["nodes"], config["training"]["gpus"]
    if nodes == 1:
        return ""
    return (
        f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1"
        f" --cpus-per-task={training_threads(config)} --kill-on-bad-exit=1"
        + (f" {gpus_of_each_node(config)}" if gpus else "")
    )


def inside_image(image: str, deployment) -> str:
    """Return the command that enters an image, for a rule that calls Apptainer itself.

    ``deployment`` are Snakemake's deployment settings.
    """
    return container_images.exec_command(
        image, deployment.apptainer_args, deployment.apptainer_prefix
    )
