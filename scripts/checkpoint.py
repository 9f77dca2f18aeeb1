"""Take the weights of one step out of a training checkpoint, even while the training still runs.

    python scripts/checkpoint.py --step 50 --settings '{"mode": "lora", …}' --code b64d6a7e2f9c1350 \\
        --base results/micro/base.json --rope results/micro/rope/yarn.json \\
        --pack results/micro/pack.json --work work --trained results/micro/trained.json \\
        --manifest results/micro/step-50/trained.json --output results/micro/step-50/trained

The result has the form of a finished training, so it can be merged and evaluated like one. --settings and
--code must be those of the training, because they name its work directory (`snakemake -p` prints both).
"""

import argparse
from pathlib import Path

from longyarn.core import attempts, manifest
from longyarn.core.errors import UserError, program
from longyarn.core.files import new_directory
from longyarn.models import lora
from longyarn.training import identity


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    identity.add_arguments(parser)
    identity.add_work_argument(parser)
    parser.add_argument("--code", required=True, help="hash of the code of the stage train")
    parser.add_argument(
        "--trained", type=Path, required=True, help="manifest that the training will write"
    )
    parser.add_argument("--step", type=int, required=True, help="step of the checkpoint")
    arguments = parser.parse_args()

    base = manifest.read(arguments.base)["facts"]
    inputs = identity.input_manifests(arguments)
    defined_by = identity.of_run(arguments.settings, arguments.code, inputs, arguments.trained)
    work = attempts.directory(arguments.work, defined_by)
    mode = arguments.settings["mode"]
    with new_directory(arguments.output) as directory:
        source = whole_checkpoint(work, arguments.step)
        try:
            lora.copy_trained(source, directory, mode, base)
            still_there = attempts.is_whole(source)
        except FileNotFoundError:
            still_there = False
        if not still_there:
            raise UserError(
                f"training removed the checkpoint of step {arguments.step} to make room for a later one "
                "while it was being copied; ask for a later step"
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


def whole_checkpoint(work: Path, step: int) -> Path:
    """Return the complete checkpoint of a step; raise ``UserError`` if a work directory has none."""
    found = {
        attempts.steps(path): path for path in attempts.checkpoints(work) if attempts.is_whole(path)
    }
    if step not in found:
        there = f"it has those of {', '.join(map(str, sorted(found)))}" if found else "it has none"
        raise UserError(
            f"{work} has no whole checkpoint of step {step} of this run ({there}); ask for one that "
            "exists, and set training.save_steps so that the step you want is saved"
        )
    return found[step]


if __name__ == "__main__":
    program(main)()
