"""Merges what was trained into the base model's shards, a block of rows at a time.

A LoRA update is added in float32, and the sum is cast once. A tensor that was trained whole replaces the
base's. Memory holds some rows of one tensor, or one whole tensor where that was trained whole, whatever
the size of the model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longyarn.core import tensorfile
from longyarn.core.errors import UserError
from longyarn.core.files import read_json, write_json
from longyarn.models import lora_files
from longyarn.models.source_files import tensor_files

KINDS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


@dataclass(frozen=True)
class RoundingError:
    """The relative rounding error of an update, ‖new − wanted‖ / ‖wanted − old‖, and of which tensor.

    An update of less than half the last bit is lost completely, so 1 means that nothing was learned.
    """

    relative: float = 0.0
    tensor: str | None = None


def worst(errors: list[RoundingError]) -> RoundingError:
    """Return the largest rounding error; its tensor is None if nothing was lost."""
    return max([RoundingError(), *errors], key=lambda error: error.relative)


def is_written(shard: Path) -> bool:
    """Tell whether an earlier attempt completed a shard: its record is written last, and has its size."""
    record = shard.with_suffix(".json")
    return (
        record.is_file() and shard.is_file() and read_json(record)["size"] == shard.stat().st_size
    )


@dataclass(frozen=True)
class Merge:
    """The ``changes`` of the tensors of the ``base``, both by name, and the ``dtype`` of the result.

    Without a dtype, each tensor keeps its type in the base, if the base has the tensor.
    """

    changes: dict[str, lora_files.Lazy]
    base: tensorfile.Tensors
    dtype: str | None

    @classmethod
    def of(cls, base: Path, trained: Path, mode: str, dtype: str | None) -> "Merge":
        """Return the merge of a ``trained`` directory, adapter or whole model, into a ``base``."""
        of_base = tensorfile.tensors(tensor_files(base))
        if mode == "lora":
            shapes = {name: place.shape for name, (_, place) in of_base.items()}
            changes = lora_files.read(trained, shapes)
        else:
            changes = lora_files.replacements(tensorfile.tensors(tensor_files(trained)), of_base)
        for name in changes:
            if (kind := of_base[name][1].kind) not in tensorfile.TORCH:
                raise UserError(
                    f"{name} of the base has type {kind}, to which no change can be added; use a base that "
                    "is not quantized"
                )
        return cls(changes, of_base, dtype)

    def kind(self, name: str, place: tensorfile.Place) -> str:
        """Return the type of a merged tensor; only types that training can have are cast."""
        old = self.base[name][1] if name in self.changes else place
        return KINDS[self.dtype] if self.dtype and old.kind in tensorfile.TORCH else old.kind

    def size(self, shard: Path) -> int:
        """Return the size of a shard after the cast, in bytes."""
        return sum(
            tensorfile.WIDTHS[self.kind(name, place)] * math.prod(place.shape)
            for name, place in tensorfile.header(shard).items()
        )

    def write_once(self, source: Path, target: Path) -> RoundingError:
        """Write a shard unless an earlier attempt did; return the largest rounding error in it."""
        record = target.with_suffix(".json")
        if not is_written(target):
            error = self.write(source, target)
            size = target.stat().st_size
            write_json(record, {"share": error.relative, "tensor": error.tensor, "size": size})
        found = read_json(record)
        return RoundingError(found["share"], found["tensor"])

    def write(self, source: Path, target: Path) -> RoundingError:
        """Write the merged form of a shard; return the largest rounding error in it."""
        errors: list[RoundingError] = []
        streams = {
            name: tensorfile.Stream(
                self.kind(name, place), place.shape, self.parts(name, source, place, errors)
            )
            for name, place in tensorfile.header(source).items()
        }
        tensorfile.write(target, streams, tensorfile.metadata(source))
        return worst(errors)

    def parts(
        self, name: str, file: Path, place: tensorfile.Place, errors: list[RoundingError]
    ) -> Iterator:
        """Yield the bytes of a merged tensor, some rows at a time; append its rounding error."""
        import torch

        kind, change = self.kind(name, place), None
        if name in self.changes:
            file, place = self.base[name]
            change = self.changes[name]()
        elif kind == place.kind:
            yield from tensorfile.blocks(file, place)
            return
        lost = changed = 0.0
        for begin, old in tensorfile.row_blocks(file, place):
            wanted = old.float()
            if change:
                wanted, delta = change(wanted, begin)
                changed += float(delta.norm()) ** 2
            new = wanted.to(getattr(torch, tensorfile.TORCH[kind]))
            if kind == "F16" and new.isinf().any() and not wanted.isinf().any():
                raise UserError(
                    f"{name} has numbers that are too large for fp16; set merge.dtype to bf16 or fp32"
                )
            if change:
                lost += float((new.float() - wanted).norm()) ** 2
            yield new.contiguous().reshape(-1).view(torch.uint8).numpy()
        if changed:
            errors.append(RoundingError(math.sqrt(lost / changed), name))
