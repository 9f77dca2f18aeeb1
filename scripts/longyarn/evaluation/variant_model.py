"""What all evaluations share: loading a variant's model, and writing the results."""

import argparse
from pathlib import Path

from longyarn.config import derived
from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.core.files import read_json
from longyarn.core.torch_setup import set_up_torch
from longyarn.models import loading


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a variant and say how to load it."""
    parser.add_argument("--variant", required=True, help="name of the variant")
    parser.add_argument("--model", type=Path, required=True, help="manifest of the model's weights")
    parser.add_argument(
        "--base", type=Path, help="manifest of the base model; its vocabulary must be the variant's"
    )
    parser.add_argument("--rope", type=Path, required=True, help="manifest of the RoPE settings")
    parser.add_argument("--precision", choices=["bf16", "fp16", "fp32"], required=True)
    parser.add_argument("--attention", required=True, help="transformers' attn_implementation")
    parser.add_argument("--threads", type=int, required=True, help="CPU threads")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to spread the layers over")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")


def add_length_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that the lengths of the evaluation follow from if they are not stated."""
    parser.add_argument("--target", type=int, help="target length, to derive the lengths from")
    parser.add_argument("--original", type=int, help="original length; default: that of --base")


def lengths(arguments: argparse.Namespace, stated: list[int] | None, least: int = 1) -> list[int]:
    """Return the lengths to evaluate at: the stated ones, or those that follow from --target and --base."""
    if stated:
        return stated
    if not arguments.target or not arguments.base:
        raise UserError("no lengths are stated; give --lengths, or --target and --base")
    base = arguments.base.parent / manifest.read_facts(arguments.base)["directory"]
    original = arguments.original or read_json(base / "config.json")["max_position_embeddings"]
    return derived.evaluation_lengths(None, original, arguments.target, least)


def load(arguments: argparse.Namespace):
    """Return the variant's model in evaluation mode, on the GPU if there is one, or over several.

    A merged model must carry its own RoPE; an untrained variant gets its RoPE from the manifest.
    """
    import torch

    set_up_torch(arguments.threads)
    if arguments.base:
        check_tokenizer(arguments)
    weights = manifest.read(arguments.model)
    try:
        model = loading.load_model(
            model_directory(arguments),
            arguments.rope,
            dtype=arguments.precision,
            attention=arguments.attention,
            own_config=weights["stage"] == "merge",
            trust_remote_code=weights["facts"]["trust_remote_code"],
        )
    except ImportError as error:
        raise UserError(
            f"evaluation.attention {arguments.attention} cannot be used here ({error}); install it or "
            "set sdpa"
        ) from None
    model.eval()
    if arguments.gpus > 1 and torch.cuda.is_available():
        return spread(model, arguments.gpus)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def check_tokenizer(arguments: argparse.Namespace) -> None:
    """Raise ``UserError`` if the variant's vocabulary differs from the base's."""
    both = [(path, read_json(path)) for path in (arguments.base, arguments.model)]
    files = [
        entry["sha256"]
        for _, found in both
        for name, entry in found["files"].items()
        if name.endswith("/tokenizer.json")
    ]
    if len(files) == 2 and files[0] == files[1]:
        return
    base, own = (
        loading.load_tokenizer(
            path.parent / found["facts"]["directory"], found["facts"]["trust_remote_code"]
        ).get_vocab()
        for path, found in both
    )
    if own != base:
        raise UserError(
            f"the variant {arguments.variant} has another vocabulary than the base ({len(own)} and "
            f"{len(base)} tokens), so the two cannot be compared on identical tokens; remove it from "
            "evaluation.variants"
        )


def spread(model, gpus: int):
    """Return the model with its layers spread over GPUs; a batch passes from one GPU to the next."""
    import torch
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = {"no_split_module_classes": list(model._no_split_modules)}
    free = {number: torch.cuda.mem_get_info(number)[0] for number in range(gpus)}
    room = get_balanced_memory(model, free, **whole)
    return dispatch_model(model, infer_auto_device_map(model, max_memory=room, **whole))


def model_directory(arguments: argparse.Namespace) -> Path:
    """Return the directory of the variant's weights and tokenizer."""
    return arguments.model.parent / manifest.read(arguments.model)["facts"]["directory"]


def write(
    arguments: argparse.Namespace,
    *,
    script: Path,
    settings: dict,
    inputs: dict[str, Path],
    facts: dict,
) -> None:
    """Write the manifest of an evaluation. Its facts are the result; there is no other payload."""
    manifest.write(
        arguments.manifest,
        script=script,
        settings={
            "variant": arguments.variant,
            "precision": arguments.precision,
            "attention": arguments.attention,
            "threads": arguments.threads,
            **settings,
        },
        inputs={"model": arguments.model, "rope": arguments.rope, **inputs},
        files=[],
        facts=facts,
    )
