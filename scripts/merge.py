"""Merge what was trained into the base model: safetensors in, safetensors out, a block at a time.

A LoRA delta is added in float32 and the sum cast once; a tensor that was trained whole replaces the
base's. In memory are some rows of one tensor, or the whole of one that was trained whole, whatever the
model's size. What the cast takes of a change is measured. The merged directory carries its RoPE, tokenizer
and generation settings, and loads with plain transformers. A merge that was killed goes on with the shards
that are not written yet.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longyarn.core import attempts, manifest, tensorfile
from longyarn.core.code_hash import code_hash
from longyarn.core.console import progress
from longyarn.core.errors import UserError, program
from longyarn.core.files import (
    link_or_copy,
    new_directory,
    read_json,
    require_space,
    sha256,
    write_json,
)
from longyarn.core.torch_setup import set_up_torch
from longyarn.models import lora_files
from longyarn.models.source_files import tensor_files
from longyarn.rope.record import RopeRecord

BLOCK = 1 << 22  # elements that are in memory at once, in float32
KINDS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="manifest of the base model")
    parser.add_argument("--rope", type=Path, required=True, help="manifest of the RoPE settings")
    parser.add_argument("--train", type=Path, required=True, help="manifest of what was trained")
    parser.add_argument("--dtype", choices=KINDS, help="of the weights; default: the base's own")
    parser.add_argument("--threads", type=int, required=True, help="CPU threads")
    parser.add_argument("--work", type=Path, required=True, help="root of work directories")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()
    set_up_torch(arguments.threads)

    base = manifest.read(arguments.base)
    rope = RopeRecord.read(arguments.rope)
    train = manifest.read(arguments.train)
    source = arguments.base.parent / base["facts"]["directory"]
    trained = arguments.train.parent / train["facts"]["directory"]
    base_tensors = tensors(tensor_files(source))
    weights = source if train["facts"]["mode"] == "lora" else trained
    shards = tensor_files(weights)
    if weights == source:
        shapes = {name: place.shape for name, (_, place) in base_tensors.items()}
        changes = lora_files.read(trained, shapes)
    else:
        changes = lora_files.replacements(tensors(shards), base_tensors)
    for name in changes:
        if base_tensors[name][1].kind not in tensorfile.TORCH:
            raise UserError(
                f"{name} of the base is of type {base_tensors[name][1].kind}, to which no change can be "
                "added; take a base that is not quantised"
            )
    merge = Merge(changes, base_tensors, arguments.dtype)

    work = attempts.directory(arguments.work, identity(arguments))
    work.mkdir(parents=True, exist_ok=True)
    attempts.record(work, identity(arguments))
    missing = [shard for shard in shards if not written(work / shard.name)]
    require_space(work, sum(map(merge.size, missing)), "the merged model")
    if work.stat().st_dev != arguments.output.parent.stat().st_dev:
        require_space(arguments.output.parent, sum(map(merge.size, shards)), "the merged model")
    loss = Loss()
    for shard in progress(shards, len(shards), "merge"):
        loss = loss.or_worse(merge.once(shard, work / shard.name))
    with new_directory(arguments.output) as directory:
        for shard in shards:
            link_or_copy(work / shard.name, directory / shard.name)
        copy_index(weights, directory)
        copy_rest(source, directory, rope, arguments.dtype)
    files = sorted(arguments.output.glob("[!.]*"))
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings={"dtype": arguments.dtype},
        inputs={"base": arguments.base, "rope": arguments.rope, "train": arguments.train},
        files=files,
        facts={
            "directory": arguments.output.name,
            # What a later phase is trained from; the run's directory tells which model this is.
            "source": f"{arguments.output.parent.name}/{arguments.output.name}",
            "revision": None,
            "mode": train["facts"]["mode"],
            "merge_error": loss.share,
            "merge_error_tensor": loss.tensor,
            "trust_remote_code": base["facts"]["trust_remote_code"],
            "bytes": sum(file.stat().st_size for file in files),
        },
    )
    shutil.rmtree(work, ignore_errors=True)  # linked from the payload, or copied there


def identity(arguments: argparse.Namespace) -> dict:
    """Return what defines the merged shards, and the run, whose attempts share a work directory."""
    return {
        "run": str(arguments.manifest),
        "code": code_hash(Path(__file__)),
        "base": sha256(arguments.base),
        "train": sha256(arguments.train),
        "dtype": arguments.dtype,
    }


def tensors(files: list[Path]) -> dict[str, tuple[Path, tensorfile.Place]]:
    """Return where each tensor of a model lies, its file and its place there, by name."""
    return {
        name: (file, place) for file in files for name, place in tensorfile.header(file).items()
    }


@dataclass(frozen=True)
class Loss:
    """The share of a change that the cast took, ‖new − wanted‖ / ‖wanted − old‖, and in which tensor.

    A change of less than half the last bit is lost whole, so 1 means that nothing was learnt.
    """

    share: float = 0.0
    tensor: str | None = None

    def or_worse(self, other: "Loss") -> "Loss":
        """Return the larger of two losses."""
        return other if other.share > self.share else self


def written(shard: Path) -> bool:
    """Tell whether an attempt before has written a shard: its record comes last, and has its size."""
    record = shard.with_suffix(".json")
    return (
        record.is_file() and shard.is_file() and read_json(record)["size"] == shard.stat().st_size
    )


@dataclass(frozen=True)
class Merge:
    """What becomes of a model's shards: ``changes`` of the ``base`` by name, cast to ``dtype``.

    Without a dtype each tensor has its type in the base, where that has it.
    """

    changes: dict[str, lora_files.Lazy]
    base: dict[str, tuple[Path, tensorfile.Place]]
    dtype: str | None

    def kind(self, name: str, place: tensorfile.Place) -> str:
        """Return the type that a tensor is cast to; only what training could have is cast."""
        old = self.base[name][1] if name in self.changes else place
        return KINDS[self.dtype] if self.dtype and old.kind in tensorfile.TORCH else old.kind

    def size(self, shard: Path) -> int:
        """Return the bytes of a shard when it is cast."""
        return sum(
            tensorfile.WIDTHS[self.kind(name, place)] * math.prod(place.shape)
            for name, place in tensorfile.header(shard).items()
        )

    def once(self, source: Path, target: Path) -> Loss:
        """Write a shard that is not written yet; return the largest share lost in it."""
        record = target.with_suffix(".json")
        if not written(target):
            loss = self.shard(source, target)
            size = target.stat().st_size
            write_json(record, {"share": loss.share, "tensor": loss.tensor, "size": size})
        found = read_json(record)
        return Loss(found["share"], found["tensor"])

    def shard(self, source: Path, target: Path) -> Loss:
        """Write a shard of what is merged; return the largest share of a change that was lost in it."""
        losses: list[Loss] = []
        streams = {
            name: tensorfile.Stream(
                self.kind(name, place), place.shape, self.rows(name, source, place, losses)
            )
            for name, place in tensorfile.header(source).items()
        }
        tensorfile.write(target, streams, tensorfile.metadata(source))
        return max(losses, key=lambda loss: loss.share, default=Loss())

    def rows(self, name: str, file: Path, place: tensorfile.Place, losses: list[Loss]) -> Iterator:
        """Yield the bytes of a tensor, changed and cast, some rows at a time; put its loss into a list."""
        import torch

        kind, change = self.kind(name, place), None
        if name in self.changes:
            file, place = self.base[name]
            change = self.changes[name]()
        elif kind == place.kind:
            yield from tensorfile.blocks(file, place)
            return
        lost = changed = 0.0
        count, *rest = place.shape or (1,)
        step = max(1, BLOCK // max(1, math.prod(rest)))
        for begin in range(0, count, step):
            old = tensorfile.torch_rows(file, place, begin, min(step, count - begin))
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
            losses.append(Loss(math.sqrt(lost / changed), name))


def copy_index(source: Path, directory: Path) -> None:
    """Write the index of a model in shards, with the size that they have now."""
    name = "model.safetensors.index.json"
    if not (source / name).is_file():
        return
    record = read_json(source / name)
    places = [
        place
        for shard in directory.glob("*.safetensors")
        for place in tensorfile.header(shard).values()
    ]
    record["metadata"] = record.get("metadata", {}) | {"total_size": sum(p.size for p in places)}
    write_json(directory / name, record)


def copy_rest(source: Path, directory: Path, rope: RopeRecord, dtype: str | None) -> None:
    """Copy tokenizer and settings beside the weights and write the config with its RoPE."""
    for file in sorted(source.glob("[!.]*")):
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, directory / file.name)
    config = rope.patched(read_json(source / "config.json"))
    if dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = tensorfile.TORCH[KINDS[dtype]]
    write_json(directory / "config.json", config)
    tokenizer = directory / "tokenizer_config.json"
    if tokenizer.is_file():
        record = json.loads(tokenizer.read_text(encoding="utf-8"))
        record["model_max_length"] = rope.max_position_embeddings
        write_json(tokenizer, record)


if __name__ == "__main__":
    program(main)()
