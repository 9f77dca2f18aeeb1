"""Merge what was trained into the base model: safetensors in, safetensors out, a block at a time.

    python scripts/merge.py --base results/micro/base.json --rope results/micro/rope/yarn.json \
        --train results/micro/trained.json --threads 1 --work .work \
        --manifest results/micro/merged.json --output results/micro/merged

The merged directory has its RoPE, tokenizer and generation settings, and loads with plain transformers. The
manifest holds the largest relative rounding error of an update. A merge that was killed resumes with the
shards that are not written yet.
"""

import argparse
import json
import shutil
from pathlib import Path

from longyarn.core import attempts, manifest, tensorfile
from longyarn.core.code_hash import code_hash
from longyarn.core.console import progress
from longyarn.core.errors import program
from longyarn.core.files import (
    link_or_copy,
    new_directory,
    read_json,
    require_space,
    sha256,
    write_json,
)
from longyarn.core.torch_setup import set_up_torch
from longyarn.models.merging import KINDS, Merge, RoundingError, is_written, worst
from longyarn.models.source_files import tensor_files
from longyarn.rope.record import RopeRecord


def main() -> None:
    arguments = parse()
    set_up_torch(arguments.threads)
    base, train = manifest.read(arguments.base), manifest.read(arguments.train)
    rope, mode = RopeRecord.read(arguments.rope), train["facts"]["mode"]
    source = arguments.base.parent / base["facts"]["directory"]
    trained = arguments.train.parent / train["facts"]["directory"]
    weights = source if mode == "lora" else trained  # whose shards the merged model has
    merge = Merge.of(source, trained, mode, arguments.dtype)

    work = begin(arguments)
    error = write_shards(merge, tensor_files(weights), work, arguments.output.parent)
    with new_directory(arguments.output) as directory:
        for shard in tensor_files(weights):
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
            # A later phase trains from this model; the run's directory tells which model it is.
            "source": f"{arguments.output.parent.name}/{arguments.output.name}",
            "revision": None,
            "mode": mode,
            "merge_error": error.relative,
            "merge_error_tensor": error.tensor,
            "trust_remote_code": base["facts"]["trust_remote_code"],
            "bytes": sum(file.stat().st_size for file in files),
        },
    )
    shutil.rmtree(work, ignore_errors=True)  # the payload has links or copies of its files


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="manifest of the base model")
    parser.add_argument("--rope", type=Path, required=True, help="manifest of the RoPE settings")
    parser.add_argument("--train", type=Path, required=True, help="manifest of what was trained")
    parser.add_argument("--dtype", choices=KINDS, help="type of the weights; default: the base's")
    parser.add_argument("--threads", type=int, required=True, help="CPU threads")
    parser.add_argument("--work", type=Path, required=True, help="root of work directories")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    return parser.parse_args()


def begin(arguments: argparse.Namespace) -> Path:
    """Return the work directory, which an earlier attempt at the same merge may have filled.

    It is named by what defines the merged shards, and by the run.
    """
    identity = {
        "run": str(arguments.manifest),
        "code": code_hash(Path(__file__)),
        "base": sha256(arguments.base),
        "train": sha256(arguments.train),
        "dtype": arguments.dtype,
    }
    work = attempts.directory(arguments.work, identity)
    work.mkdir(parents=True, exist_ok=True)
    attempts.record(work, identity)
    return work


def write_shards(merge: Merge, shards: list[Path], work: Path, results: Path) -> RoundingError:
    """Write the merged shards that are missing in ``work``; return the largest rounding error."""
    missing = [shard for shard in shards if not is_written(work / shard.name)]
    require_space(work, sum(map(merge.size, missing)), "the merged model")
    if work.stat().st_dev != results.stat().st_dev:
        require_space(results, sum(map(merge.size, shards)), "the merged model")
    return worst(
        [
            merge.write_once(shard, work / shard.name)
            for shard in progress(shards, len(shards), "merge")
        ]
    )


def copy_index(source: Path, directory: Path) -> None:
    """Write the index of a sharded model, with the size of the merged shards."""
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
    """Copy the tokenizer and the settings beside the weights, and write the config.json with its RoPE."""
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
