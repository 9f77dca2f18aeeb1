"""What defines a training run: its settings, its code, and the contents of what it reads.

Two attempts with the same identity share a work directory and resume from each other's checkpoints.
"""

import argparse
import json
from pathlib import Path

from longyarn.core import attempts, manifest
from longyarn.core.errors import UserError

# Settings that only observe or keep things. They change no weight, so a run resumes when they change.
OBSERVING = (
    "logging_steps", "save_steps", "save_minutes", "save_total_limit", "held_out_steps", "report_to",
)  # fmt: skip
# Settings that say where a run takes place. A checkpoint fits only the placement it was saved under.
PLACEMENT = ("nodes", "gpus", "zero_stage", "sp_size", "offload", "threads")
# The facts of each input that training depends on, besides its files; None means all of them.
FACTS_OF_INPUTS = {"base": ("trust_remote_code",), "rope": None, "pack": ("document_masks",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for what training reads, its settings, and what the stage writes."""
    parser.add_argument("--base", type=Path, required=True, help="manifest of the base model")
    parser.add_argument("--rope", type=Path, required=True, help="manifest of the RoPE settings")
    parser.add_argument("--pack", type=Path, required=True, help="manifest of the packed sequences")
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="config section `training`, as JSON"
    )
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")


def add_work_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the directory that holds the work directories of all runs."""
    parser.add_argument("--work", type=Path, required=True, help="config key paths.work")


def input_manifests(arguments: argparse.Namespace) -> dict[str, Path]:
    """Return the manifests of what a run is made from, by name."""
    return {name: getattr(arguments, name) for name in FACTS_OF_INPUTS}


def defining_settings(settings: dict) -> dict:
    """Return the part of config section `training` that defines a run, with the placement set apart.

    With a constant learning rate the number of steps is not part of it, so that a finished run can
    be extended by more steps.
    """
    left_out = {*OBSERVING, *PLACEMENT}
    if settings["scheduler"] == "constant_with_warmup":
        left_out |= {"steps", "epochs"}
    return {
        "settings": {key: value for key, value in settings.items() if key not in left_out},
        "placement": {key: settings[key] for key in PLACEMENT},
    }


def of_run(settings: dict, code: str, inputs: dict[str, Path], trained: Path) -> dict:
    """Return everything that defines a run.

    ``settings``: config section `training`. ``code``: hash of the code of the stage train. ``inputs``:
    manifests of the base, the RoPE settings and the packed sequences; their contents count, not how
    they were made. ``trained``: the manifest that the training will write, which keeps apart two runs
    that differ only in their evaluation.
    """
    return defining_settings(settings) | {
        "code": code,
        "run": str(trained),
        **{
            name: manifest.content_hash(path, FACTS_OF_INPUTS[name])
            for name, path in inputs.items()
        },
    }


def start_attempt(root: Path, identity: dict) -> tuple[Path, Path]:
    """Return a run's work directory below ``root`` and the directory of a new attempt in it.

    Raises ``UserError`` if the run is half done under another placement, whose checkpoints do not fit.
    """
    work = attempts.directory(root, identity)
    if other := attempts.other_placement(work, identity):
        theirs, ours = other.placement, identity["placement"]
        differing = [f"training.{key} {theirs[key]}" for key in theirs if theirs[key] != ours[key]]
        raise UserError(
            f"{other.work} holds step {other.steps} of this run, trained with {', '.join(differing)}; "
            "its checkpoints cannot be resumed with another value, so set that again, or delete the "
            "directory to start over"
        )
    attempt = attempts.claim(work)
    attempts.record(work, identity)
    return work, attempt
