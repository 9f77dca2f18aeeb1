"""Reads what training changed as changes of the base's tensors; each is loaded when it is needed.

The names and the scale follow PEFT: ``<name>.lora_A.weight`` is A (r, in), ``lora_B`` is B (out, r), and
the delta is B·A·alpha/r (LoRA, arXiv 2106.09685), or B·A·alpha/√r with rsLoRA (arXiv 2312.03732). A tensor
that was trained whole replaces the base's.
"""

import functools
from collections.abc import Callable
from pathlib import Path

from longyarn.core import tensorfile
from longyarn.core.errors import UserError
from longyarn.core.files import read_json

PREFIX = "base_model.model."

# change(rows of a tensor, number of the first row) returns (new rows, difference), in float32.
Change = Callable
# Returns the change; until it is called, nothing of the adapter is in memory.
Lazy = Callable[[], Change]


def read(directory: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Lazy]:
    """Return the changes of an adapter by the name of the base's tensor.

    ``shapes`` are those of the base's tensors, by name. Raises ``UserError`` for an adapter that was
    trained on another model, and for a kind of adapter that cannot be merged.
    """
    record = read_json(directory / "adapter_config.json")
    for key in ("lora_bias", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"):
        if record.get(key):
            raise UserError(f"the adapter uses {key}, which Longyarn cannot merge")
    rank = record["r"]
    scale = record["lora_alpha"] / (rank**0.5 if record.get("use_rslora") else rank)
    file = directory / "adapter_model.safetensors"
    places = tensorfile.header(file)
    if record.get("ensure_weight_tying"):
        # PEFT saves a tied embedding under the head's name as well; the base has it once.
        places = {k: v for k, v in places.items() if not is_second_name(k, file, places, shapes)}
    changes, sizes = {}, {}
    for name, place in places.items():
        target = name.removeprefix(PREFIX)
        if ".lora_B." in target:
            continue
        if ".lora_A." in target:
            other = places[name.replace(".lora_A.", ".lora_B.")]
            target = target.replace(".lora_A.", ".")
            changes[target] = functools.partial(load_sum, file, place, other, scale)
            sizes[target] = (other.shape[0], place.shape[1])
        else:
            changes[target] = functools.partial(load_replacement, file, place)
            sizes[target] = place.shape
    for name, size in sorted(sizes.items()):
        if name not in shapes:
            raise UserError(
                f"the adapter changes {name}, which the base model lacks; it was trained on another model"
            )
        if size != shapes[name]:
            raise UserError(
                f"the adapter's {name} has shape {size}, but the base model has {shapes[name]}; it was "
                "trained on another model"
            )
    return changes


def replacements(trained: tensorfile.Tensors, base: tensorfile.Tensors) -> dict[str, Lazy]:
    """Return the changes of a model whose weights were all trained, for tensors that the base has too."""
    return {
        name: functools.partial(load_replacement, file, place)
        for name, (file, place) in trained.items()
        if name in base
        and base[name][1].shape == place.shape
        and {place.kind, base[name][1].kind} <= tensorfile.TORCH.keys()
    }


def is_second_name(
    name: str, file: Path, places: dict[str, tensorfile.Place], shapes: dict[str, tuple[int, ...]]
) -> bool:
    """Tell whether a tensor that the base lacks is a copy of another one in the file."""
    if "lora_" in name or name.removeprefix(PREFIX) in shapes:
        return False
    tensor = tensorfile.torch_rows(file, places[name])
    return any(
        other != name
        and place.shape == places[name].shape
        and tensorfile.torch_rows(file, place).equal(tensor)
        for other, place in places.items()
    )


def load_sum(
    file: Path, place_a: tensorfile.Place, place_b: tensorfile.Place, scale: float
) -> Change:
    """Return the change of a matrix W (out, in) to W + scale·B·A."""
    a = tensorfile.torch_rows(file, place_a).float()
    b = tensorfile.torch_rows(file, place_b).float() * scale

    def change(rows, begin: int):
        delta = b[begin : begin + len(rows)] @ a
        return rows + delta, delta

    return change


def load_replacement(file: Path, place: tensorfile.Place) -> Change:
    """Return the change of a tensor to another one of the same shape."""
    tensor = tensorfile.torch_rows(file, place).float()

    def change(rows, begin: int):
        new = tensor[begin : begin + len(rows)]
        return new, new - rows

    return change
