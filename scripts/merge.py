"""Merge what was trained into the base model: safetensors in, safetensors out, a block at a time.

A LoRA delta is added in float32 and the sum cast once; a tensor that was trained whole replaces the
base's. Never is more than a part of one tensor in memory, whatever the model's size. What the cast takes of
a change is measured. The merged directory carries its RoPE, tokenizer and generation settings, and loads
with plain transformers. A merge that was killed goes on with the shards that are not written yet.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longyarn import attempts, deltas, manifest, models, storage
from longyarn.cli import program, progress, require_space, set_up_torch

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
    rope = manifest.read_facts(arguments.rope)
    train = manifest.read(arguments.train)
    source = arguments.base.parent / base["facts"]["directory"]
    trained = arguments.train.parent / train["facts"]["directory"]
    weights, changes = source, {}
    if train["facts"]["mode"] == "lora":
        changes = deltas.read(trained, shapes(source))
    else:
        weights = trained
    shards = models.tensor_files(weights)
    require_space(arguments.output.parent, size(shards, arguments.dtype), "the merged model")

    work = attempts.directory(arguments.work, identity(arguments))
    work.mkdir(parents=True, exist_ok=True)
    attempts.record(work, identity(arguments))
    loss = Loss()
    for shard in progress(shards, len(shards), "merge"):
        loss = loss.or_worse(merge_once(shard, work / shard.name, changes, arguments.dtype))
    with manifest.new_directory(arguments.output) as directory:
        for shard in shards:
            attempts.link(work / shard.name, directory / shard.name)
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
        "code": manifest.code_hash(Path(__file__)),
        "base": manifest.sha256(arguments.base),
        "train": manifest.sha256(arguments.train),
        "dtype": arguments.dtype,
    }


def shapes(model_directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors in a model directory by name."""
    files = models.tensor_files(model_directory)
    return {name: place.shape for file in files for name, place in storage.header(file).items()}


def size(shards: list[Path], dtype: str | None) -> int:
    """Return the bytes that shards have when they are cast."""
    places = [place for shard in shards for place in storage.header(shard).values()]
    return sum(storage.WIDTHS[kind_of(place, dtype)] * math.prod(place.shape) for place in places)


def kind_of(place: storage.Place, dtype: str | None) -> str:
    """Return the type that a tensor is cast to; only what training could have is cast."""
    return KINDS[dtype] if dtype and place.kind in storage.TORCH else place.kind


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


def merge_once(
    source: Path, target: Path, changes: dict[str, deltas.Lazy], dtype: str | None
) -> Loss:
    """Write a shard that an attempt before has not written; return the largest share lost in it."""
    record = target.with_suffix(".json")  # written last, so it tells that the shard is whole
    if not record.is_file():
        loss = merge_shard(source, target, changes, dtype)
        manifest.write_json(record, {"share": loss.share, "tensor": loss.tensor})
    return Loss(**manifest.read_json(record))


def merge_shard(
    source: Path, target: Path, changes: dict[str, deltas.Lazy], dtype: str | None
) -> Loss:
    """Write one shard with ``changes`` applied; return the largest share of one that was lost."""
    losses: list[Loss] = []
    streams = {}
    for name, place in storage.header(source).items():
        kind = kind_of(place, dtype)
        change = changes.get(name)
        parts = merged(source, name, place, kind, change, losses)
        streams[name] = storage.Stream(kind, place.shape, parts)
    storage.write(target, streams, storage.metadata(source))
    return max(losses, key=lambda loss: loss.share, default=Loss())


def merged(
    file: Path,
    name: str,
    place: storage.Place,
    kind: str,
    lazy: deltas.Lazy | None,
    losses: list[Loss],
) -> Iterator:
    """Yield the bytes of a tensor, changed and cast, some rows at a time; put its loss into ``losses``."""
    import torch

    if lazy is None and kind == place.kind:
        yield from storage.blocks(file, place)
        return
    change = lazy and lazy()
    lost = changed = 0.0
    rows, *rest = place.shape or (1,)
    step = max(1, BLOCK // max(1, math.prod(rest)))
    for begin in range(0, rows, step):
        old = storage.torch_rows(file, place, begin, min(step, rows - begin))
        wanted = old.float()
        if change:
            wanted, delta = change(wanted, begin)
            changed += float(delta.norm()) ** 2
        new = wanted.to(getattr(torch, storage.TORCH[kind]))
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
    record = manifest.read_json(source / name)
    places = [
        place
        for shard in directory.glob("*.safetensors")
        for place in storage.header(shard).values()
    ]
    record["metadata"] = record.get("metadata", {}) | {"total_size": sum(p.size for p in places)}
    manifest.write_json(directory / name, record)


def copy_rest(source: Path, directory: Path, rope: dict, dtype: str | None) -> None:
    """Copy tokenizer and settings beside the weights and write the config with its RoPE."""
    from longyarn.rope import patched_config

    for file in sorted(source.glob("[!.]*")):
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, directory / file.name)
    config = manifest.read_json(source / "config.json")
    config = patched_config(
        config, rope["rope_parameters"], rope["max_position_embeddings"], rope["full_attention"]
    )
    if dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = storage.TORCH[KINDS[dtype]]
    manifest.write_json(directory / "config.json", config)
    tokenizer = directory / "tokenizer_config.json"
    if tokenizer.is_file():
        record = json.loads(tokenizer.read_text(encoding="utf-8"))
        record["model_max_length"] = rope["max_position_embeddings"]
        manifest.write_json(tokenizer, record)


if __name__ == "__main__":
    program(main)()
