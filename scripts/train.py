"""Continue pre-training on the packed sequences, with transformers' Trainer on DeepSpeed.

    python scripts/launch.py 1 --nproc-per-node 1 scripts/train.py --settings '{"mode": "lora", …}' \\
        --base results/micro/base.json --rope results/micro/rope/yarn.json \\
        --pack results/micro/pack.json --tokens results/micro/tokens.json --work work \\
        --metrics results/micro/logs/train.metrics.jsonl --manifest results/micro/trained.json \\
        --output results/micro/trained

--settings is the whole config section `training` as JSON (`snakemake -p` prints it). scripts/launch.py
starts one process per GPU, or one per machine on the CPU.

Checkpoints go to a work directory named by a hash of everything that defines the run. So a rerun resumes
from the last checkpoint, and a run with other settings never does. Each attempt writes into its own
subdirectory. Before the first step two guards check that the model rotates as the RoPE manifest says
and that document masks hide the documents of a sequence from one another.
"""

import argparse
import os
from pathlib import Path

from longyarn.config import derived
from longyarn.core import attempts, manifest
from longyarn.core.code_hash import code_hash
from longyarn.core.errors import UserError, program
from longyarn.core.files import new_directory
from longyarn.core.torch_setup import set_up_torch
from longyarn.data.token_store import held_out_documents
from longyarn.models import lora
from longyarn.models.source_files import tensor_files
from longyarn.training import deepspeed_setup, identity
from longyarn.training.inputs import Inputs


def main() -> None:
    arguments = parse_arguments()
    settings = arguments.settings
    deepspeed_setup.choose_device(settings)
    set_up_torch(settings["threads"])
    import transformers

    from longyarn.training import model_setup, stopping
    from longyarn.training.trainer import training_arguments

    deadline = stopping.deadline(arguments.minutes) if arguments.minutes_are_a_limit else None
    model_setup.require_packages(settings)
    deepspeed_setup.start_process_group(settings)
    inputs = read_inputs(arguments)
    work, attempt = deepspeed_setup.from_first_process(lambda: start_attempt(arguments))
    # Before the model is loaded: under ZeRO-3 these arguments decide how.
    training = training_arguments(settings, attempt)
    transformers.set_seed(settings["seed"])
    model = model_setup.load(inputs)
    stop = stopping.Stopping(attempt, deadline, settings["save_minutes"])
    trainer = make_trainer(arguments, inputs, model, training, work, stop)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(work, settings["steps"]))
    stop.end(training.device)
    # Every process takes part in gathering the weights; the first one writes the payload.
    staged = attempt / "final"
    trainer.save_model(str(staged))
    stop.agree(training.device)  # saving may have taken minutes
    if trainer.is_world_process_zero():
        publish(arguments, inputs, staged, model)
        write_manifest(arguments, inputs, trainer, work)
    deepspeed_setup.end_process_group()


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    identity.add_arguments(parser)
    identity.add_work_argument(parser)
    parser.add_argument("--tokens", type=Path, help="manifest of the tokens, for held-out losses")
    parser.add_argument("--minutes", type=float, default=60, help="run time that the job asked for")
    parser.add_argument(
        "--minutes-are-a-limit", action="store_true", help="the job is killed after --minutes"
    )
    parser.add_argument("--metrics", type=Path, help="JSON lines file to append metrics to")
    parser.add_argument(
        "--flops-per-token", type=float, default=0.0, help="of training this model, for MFU"
    )
    parser.add_argument(
        "--peak-flops", type=float, default=0.0, help="per second, of all GPUs, for MFU"
    )
    return parser.parse_args()


def read_inputs(arguments: argparse.Namespace) -> Inputs:
    """Return what training reads; raise ``UserError`` if there are too few sequences."""
    inputs = Inputs.read(arguments)
    derived.require_enough(
        inputs.pack["sequences"],
        inputs.length,
        (arguments.settings["steps"] or 0) * inputs.tokens_per_step,
        inputs.pack["allow_repeats"],
    )
    return inputs


def start_attempt(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Return the run's work directory and that of a new attempt in it."""
    defined_by = identity.of_run(
        arguments.settings,
        code_hash(Path(__file__)),
        identity.input_manifests(arguments),
        arguments.manifest,
    )
    return identity.start_attempt(arguments.work, defined_by)


def make_trainer(arguments: argparse.Namespace, inputs: Inputs, model, training, work: Path, stop):
    """Return the Trainer with its guards and callbacks, in the order in which they must run."""
    import transformers

    from longyarn.training.guards import Guards
    from longyarn.training.metrics import Metrics
    from longyarn.training.trainer import Trainer

    guards = Guards(
        inputs.rope,
        inputs.document_masks,
        documents=lambda step: inputs.documents_of(step, arguments.tokens),
        last_good=lambda: attempts.last_name(work),
    )
    if arguments.metrics and inputs.settings["report_to"] == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(arguments.metrics.with_name("tensorboard"))
    trainer = Trainer(model=model, args=training, train_dataset=inputs.data, guards=guards)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(
        Metrics(
            arguments.metrics,
            tokens_per_step=inputs.tokens_per_step,
            flops_per_token=arguments.flops_per_token,
            peak_flops=arguments.peak_flops,
        )
    )
    # Before the held-out losses: a run that must stop has no time to measure them.
    trainer.add_callback(stop)
    if inputs.settings["held_out_steps"]:
        trainer.add_callback(held_out_losses(arguments.tokens, inputs, trainer.log))
    return trainer


def held_out_losses(tokens: Path, inputs: Inputs, log):
    """Return the callback that measures the loss on held-out documents."""
    from longyarn.training.held_out_loss import HeldOut

    return HeldOut(
        list(held_out_documents(tokens).values()),
        (inputs.rope.original_max_position_embeddings, inputs.length),
        inputs.settings["held_out_steps"],
        inputs.settings["early_stopping"],
        log,
    )


def checkpoint_to_resume(work: Path, steps: int | None) -> str | None:
    """Return the checkpoint to resume from, the same in all processes; None to start at step 0."""
    last = deepspeed_setup.from_first_process(lambda: attempts.last_checkpoint(work, steps))
    for note in attempts.skipped(work):
        deepspeed_setup.say(f"train: warning: {note}")
    if last:
        deepspeed_setup.say(f"train: resuming from {attempts.describe(last)}")
    return str(last) if last else None


def publish(arguments: argparse.Namespace, inputs: Inputs, staged: Path, model) -> None:
    """Copy the trained weights from the work directory to the payload, and check them."""
    mode = inputs.settings["mode"]
    with new_directory(arguments.output) as directory:
        lora.copy_trained(staged, directory, mode, inputs.base)
        if mode == "lora":
            lora.check_saved(directory, lora.trained_shapes(model))
        elif not tensor_files(directory):
            raise UserError("training saved no weights; see the log above")


def write_manifest(arguments: argparse.Namespace, inputs: Inputs, trainer, work: Path) -> None:
    """Write the manifest, with the course of the losses and what the guards checked."""
    steps, logged = trainer.state.global_step, trainer.state.log_history
    sequences_seen = steps * inputs.settings["batch_size"]
    held_out = [
        {key: value for key, value in entry.items() if key == "step" or "held_out" in key}
        for entry in logged
        if any("held_out" in key for key in entry)
    ]
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings=inputs.settings,
        inputs=identity.input_manifests(arguments),
        files=sorted(arguments.output.iterdir()),
        facts={
            "directory": arguments.output.name,
            "work": work.name,
            "mode": inputs.settings["mode"],
            "steps": steps,
            "sequences_seen": sequences_seen,
            "tokens_seen": steps * inputs.tokens_per_step,
            "epochs": sequences_seen / inputs.pack["sequences"],
            "trainable_parameters": trainable_parameters(trainer.model),
            "world_size": trainer.args.world_size,
            "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
            "loss": [[entry["step"], entry["loss"]] for entry in logged if "loss" in entry],
            "held_out": held_out,
            "guards": trainer.guards.passed,
        },
    )


def trainable_parameters(model) -> int:
    """Return how many numbers training changes; under ZeRO-3 a process holds only a part of each tensor."""
    trained = (tensor for tensor in model.parameters() if tensor.requires_grad)
    return sum(getattr(tensor, "ds_numel", tensor.numel()) for tensor in trained)


if __name__ == "__main__":
    program(main)()
