"""What is trained: which matrices get a LoRA adapter, and which modules are trained whole."""

import shutil
from pathlib import Path

from longyarn.core.errors import UserError
from longyarn.core.files import read_json, write_json


def chosen(model, settings: dict) -> tuple[list[str], list[str], bool]:
    """Return ``(targets, whole, tied)`` for config section ``training.lora``.

    ``targets``: full names of the modules that get an adapter. ``whole``: last parts of the names of the
    modules that are trained whole. ``tied``: the output head is the input embedding.
    """
    import torch

    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    head = model.get_output_embeddings()
    targets = [name for name in linear if model.get_submodule(name) is not head]
    if settings["targets"] == "attention":
        targets = [name for name in targets if "attn" in name or "attention" in name]
    if not targets:
        raise UserError(
            "training.lora.targets matches no linear layer of this model; choose another value"
        )
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    whole = []
    if settings["train_embeddings"]:
        whole.append(leaf(model, model.get_input_embeddings()))
    if settings["train_norms"]:
        norms = [n for n, part in model.named_modules() if type(part).__name__.endswith("Norm")]
        whole += sorted({name.rpartition(".")[2] for name in norms})
    if settings["train_output_head"] and not tied:
        whole.append(leaf(model, head))
    if settings["train_output_head"] and tied and not settings["train_embeddings"]:
        raise UserError(
            "the model's output head is its input embedding, so training.lora.train_output_head needs "
            "train_embeddings too"
        )
    return targets, whole, tied


def attach(model, settings: dict):
    """Return ``model`` with a new adapter for config section ``training.lora``."""
    from peft import LoraConfig, get_peft_model

    targets, whole, tied = chosen(model, settings)
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=settings["rank"],
            lora_alpha=settings["alpha"],
            lora_dropout=settings["dropout"],
            use_rslora=settings["rslora"],
            target_modules=targets,
            modules_to_save=whole or None,
            ensure_weight_tying=tied and settings["train_embeddings"],
        ),
    )


def leaf(model, module) -> str:
    """Return the last part of a submodule's name."""
    return next(n for n, part in model.named_modules() if part is module).rpartition(".")[2]


def copy_trained(source: Path, directory: Path, mode: str, base: dict) -> None:
    """Copy what was trained, adapter or all weights, from the directory where the Trainer saved it.

    ``base`` holds the facts of the base model. Only safetensors and JSON are copied, not the Trainer's
    pickled arguments.
    """
    for file in [*source.glob("*.safetensors"), *source.glob("*.index.json")]:
        shutil.copyfile(file, directory / file.name)
    if mode == "lora":
        record = read_json(source / "adapter_config.json")
        # PEFT records the path it loaded from; on another machine only the source has a meaning.
        record["base_model_name_or_path"] = base["source"]
        record["revision"] = base["revision"]
        for key in ("target_modules", "modules_to_save"):
            record[key] = sorted(record[key]) if record[key] else record[key]
        write_json(directory / "adapter_config.json", record)


def trained_shapes(model) -> dict[str, tuple[int, ...]]:
    """Return name (as in an adapter file) and shape of each tensor that training changes.

    Under ZeRO-3 a process holds a part of each tensor; ``ds_shape`` is the shape of the whole.
    """
    shapes = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            saved = name.replace(".modules_to_save.default", "").replace(".default", "")
            shapes[saved] = tuple(getattr(parameter, "ds_shape", parameter.shape))
    return shapes


def check_saved(directory: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Stop unless the saved adapter has the expected tensors and each of them learned something.

    ``expected`` maps names to shapes. Training engines have written adapters of a few bytes, with empty
    tensors, or with B still zero, without an error.
    """
    import numpy as np
    from safetensors.torch import load_file

    saved = load_file(directory / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if shapes != expected:
        odd = sorted(set(shapes.items()) ^ set(expected.items()))[0]
        raise UserError(f"the adapter was saved wrongly: tensor {odd[0]} of shape {odd[1]} is off")
    for name, tensor in saved.items():
        norm = float(tensor.float().norm())
        if not np.isfinite(norm) or norm == 0:
            raise UserError(
                f"after training, adapter tensor {name} has norm {norm}; it learned nothing, so "
                "raise training.learning_rate or steps"
            )
