"""Continued pre-training at full length: transformers' Trainer on DeepSpeed, LoRA or full.

Started by scripts/launch.py, one process a GPU, or one a machine on the CPU. Checkpoints go to a work
directory named by the hash of all that defines the run, so a rerun goes on where the last one stopped
and a changed setting never resumes from a stale state; each attempt writes in its own part of it.
Before the first step two guards run: the model rotates as the RoPE manifest says, and document masks
really hide one piece from the next.
"""

import argparse
import os
from pathlib import Path

from longyarn.config import derived
from longyarn.core import attempts, manifest
from longyarn.core.errors import UserError, program
from longyarn.core.files import new_directory
from longyarn.core.torch_setup import set_up_torch
from longyarn.data.packed_dataset import Packed
from longyarn.data.token_store import Tokens, held_out_documents
from longyarn.models import loading, lora
from longyarn.models.source_files import tensor_files
from longyarn.training import chunked_loss, engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    engine.add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=60, help="minutes that the job asked for")
    parser.add_argument(
        "--minutes-are-a-limit", action="store_true", help="the job is ended after its minutes"
    )
    parser.add_argument("--tokens", type=Path, help="manifest of the tokens, of held-out documents")
    parser.add_argument(
        "--metrics", type=Path, help="file to write metrics to, a line of JSON each"
    )
    parser.add_argument("--flops-per-token", type=float, default=0.0, help="the model's, for MFU")
    parser.add_argument("--peak-flops", type=float, default=0.0, help="all GPUs' a second, for MFU")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()
    settings = arguments.settings

    engine.choose_device(settings)
    set_up_torch(settings["threads"])
    import torch
    import transformers

    from longyarn.training import guards, held_out_loss, stopping
    from longyarn.training.metrics import Metrics
    from longyarn.training.trainer import Trainer

    time_limit = stopping.deadline(arguments.minutes) if arguments.minutes_are_a_limit else None
    engine.require_packages(settings)
    engine.start(settings)

    base = manifest.read(arguments.base)
    rope = manifest.read_facts(arguments.rope)
    pack = manifest.read(arguments.pack)
    length = pack["facts"]["sequence_length"]
    batch = settings["batch_size"]
    derived.require_enough(
        pack["facts"]["sequences"],
        length,
        (settings["steps"] or 0) * batch * length,
        pack["facts"]["allow_repeats"],
    )
    work, attempt = engine.chosen_by_one(lambda: begin(arguments))
    data = Packed(
        arguments.pack.parent / next(iter(pack["files"])), pack["facts"]["document_masks"]
    )
    if arguments.metrics and settings["report_to"] == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(arguments.metrics.with_name("tensorboard"))
    training = engine.training_arguments(settings, attempt)
    transformers.set_seed(settings["seed"])
    model = load(arguments, base["facts"], pack["facts"]["document_masks"])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    checks = guards.Guards(
        rope,
        pack["facts"]["document_masks"],
        documents=lambda step: names_of(arguments, data, step),
        last_good=lambda: attempts.last_name(work),
    )
    stop = stopping.Stopping(attempt, time_limit, settings["save_minutes"])
    trainer = Trainer(model=model, args=training, train_dataset=data, guards=checks)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(
        Metrics(
            arguments.metrics,
            tokens_per_step=batch * length,
            flops_per_token=arguments.flops_per_token,
            peak_flops=arguments.peak_flops,
        )
    )
    # Before the held-out losses, which a run that must stop has no time for.
    trainer.add_callback(stop)
    if settings["held_out_steps"]:
        trainer.add_callback(
            held_out_loss.HeldOut(
                list(held_out_documents(arguments.tokens).values()),
                (rope["original_max_position_embeddings"], length),
                settings["held_out_steps"],
                settings["early_stopping"],
                trainer.log,
            )
        )
    last = engine.chosen_by_one(lambda: attempts.last_checkpoint(work, settings["steps"]))
    for note in attempts.skipped(work):
        guards.say(f"train: warning: {note}")
    if last:
        guards.say(f"train: resuming from {attempts.describe(last)}")
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    stop.end(training.device)
    logged = trainer.state.log_history

    # Every process takes part in gathering the weights; the first one writes the payload.
    staged = attempt / "final"
    trainer.save_model(str(staged))
    stop.agree(training.device)  # saving may have taken minutes
    if trainer.is_world_process_zero():
        steps = trainer.state.global_step
        publish(arguments, staged, model, base, settings)
        facts = {
            "directory": arguments.output.name,
            "work": work.name,
            "mode": settings["mode"],
            "steps": steps,
            "sequences_seen": steps * batch,
            "tokens_seen": steps * batch * length,
            "epochs": steps * batch / pack["facts"]["sequences"],
            "trainable_parameters": trainable,
            "world_size": training.world_size,
            "gradient_accumulation_steps": training.gradient_accumulation_steps,
            "loss": [[entry["step"], entry["loss"]] for entry in logged if "loss" in entry],
            "held_out": [
                {key: value for key, value in entry.items() if key == "step" or "held_out" in key}
                for entry in logged
                if any("held_out" in key for key in entry)
            ],
            "guards": checks.passed,
        }
        files = sorted(p for p in arguments.output.iterdir())
        manifest.write(
            arguments.manifest,
            script=Path(__file__),
            settings=settings,
            inputs=engine.inputs(arguments),
            files=files,
            facts=facts,
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def begin(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Return the run's work directory and that of a new attempt in it.

    Refuses to begin anew what stands half done under another placement.
    """
    whole = engine.identity(arguments.settings, engine.inputs(arguments), arguments.manifest)
    work = attempts.directory(arguments.work, whole)
    if other := attempts.other_placement(work, whole):
        raise UserError(
            f"{other.work} holds step {other.steps} of this very run, made with "
            f"{placed(other.placement, whole['placement'])}, which its checkpoints are bound to; set "
            "that back to go on, or delete the directory to begin anew"
        )
    attempt = attempts.claim(work)
    attempts.record(work, whole)
    return work, attempt


def placed(theirs: dict, ours: dict) -> str:
    """Return where another placement differs, in the config's words."""
    return ", ".join(f"training.{key} {theirs[key]}" for key in theirs if theirs[key] != ours[key])


def names_of(arguments: argparse.Namespace, data: Packed, step: int) -> list[str]:
    """Return the documents in the batch of a step, which counts from 1: names, or numbers without them."""
    numbers = data.documents(data.rows(step, arguments.settings["batch_size"]))
    if not arguments.tokens:
        return [f"document {number}" for number in numbers]
    tokens = Tokens(arguments.tokens)
    return [tokens.id(number) for number in numbers]


def load(arguments: argparse.Namespace, base: dict, document_masks: bool):
    """Return the model to train: with its RoPE, its loss and, in mode lora, a fresh adapter."""
    settings = arguments.settings
    try:
        model = loading.load_model(
            arguments.base.parent / base["directory"],
            arguments.rope,
            dtype="fp32" if settings["mode"] == "full" else settings["precision"],
            attention=engine.attention(settings, document_masks),
            trust_remote_code=base["trust_remote_code"],
        )
    except ImportError as error:
        raise UserError(
            f"training.attention {settings['attention']} cannot be used here ({error}); install it or "
            "set sdpa"
        ) from None
    engine.check_heads(settings, model.config.get_text_config())
    model.config.use_cache = False
    if settings["activation_offload"]:
        engine.offload_activations(model)
    if settings["mode"] == "lora":
        model = lora.attach(model, settings["lora"])
    if settings["loss"] == "chunked":
        chunked_loss.attach(model)
    return model


def publish(arguments, staged: Path, model, base: dict, settings: dict) -> None:
    """Copy what was trained from the work directory to the run's payload, checked."""
    with new_directory(arguments.output) as directory:
        lora.copy_trained(staged, directory, settings["mode"], base["facts"])
        if settings["mode"] == "lora":
            lora.check_saved(directory, lora.trained_shapes(model))
        elif not tensor_files(directory):
            raise UserError("training saved no weights; see the log above")


if __name__ == "__main__":
    program(main)()
