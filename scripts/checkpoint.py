"""Take what was trained by some step out of a checkpoint, also while training goes on.

The result is as that of training itself, so that it can be merged and evaluated.
"""

import argparse
from pathlib import Path

from longyarn.core import attempts, manifest
from longyarn.core.errors import UserError, program
from longyarn.core.files import new_directory
from longyarn.models import lora
from longyarn.training import engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    engine.add_arguments(parser)
    parser.add_argument(
        "--trained", type=Path, required=True, help="manifest that the training will write"
    )
    parser.add_argument("--step", type=int, required=True, help="step of the checkpoint")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()

    base = manifest.read(arguments.base)["facts"]
    inputs = engine.inputs(arguments)
    identity = engine.identity(arguments.settings, inputs, arguments.trained)
    work = attempts.directory(arguments.work, identity)
    mode = arguments.settings["mode"]
    with new_directory(arguments.output) as directory:
        source = whole(work, arguments.step)
        try:
            lora.copy_trained(source, directory, mode, base)
            there = attempts.is_whole(source)
        except FileNotFoundError:
            there = False
        if not there:
            raise UserError(
                f"the checkpoint of step {arguments.step} made room for a later one while it was "
                "copied; ask for a later step"
            )
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings=arguments.settings,
        inputs=inputs,
        files=sorted(arguments.output.iterdir()),
        facts={
            "directory": arguments.output.name,
            "work": work.name,
            "mode": mode,
            "steps": arguments.step,
        },
    )


def whole(work: Path, step: int) -> Path:
    """Return the whole checkpoint of a step in a work directory."""
    found = {
        attempts.steps(path): path for path in attempts.checkpoints(work) if attempts.is_whole(path)
    }
    if step not in found:
        there = (
            f"there are those of {', '.join(map(str, sorted(found)))}" if found else "there is none"
        )
        raise UserError(
            f"{work} has no whole checkpoint of step {step} of this run ({there}); ask for one that is "
            "there, and set training.save_steps by what you want to look at"
        )
    return found[step]


if __name__ == "__main__":
    program(main)()
