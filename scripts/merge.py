"""Merge what was trained into the base model: safetensors in, safetensors out, shard by shard.

A LoRA delta, B·A·alpha/r, is added in float32 and the sum cast to the base's type once; a tensor that
was trained whole replaces the base's. What the cast takes of a change is measured. The merged directory
carries its RoPE, tokenizer and generation settings, and loads with plain transformers.
"""

import argparse
import json
import shutil
from pathlib import Path

from longyarn import manifest, models
from longyarn.cli import UserError, program, progress, require_space, set_up_torch

PREFIX = "base_model.model."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="manifest of the base model")
    parser.add_argument("--rope", type=Path, required=True, help="manifest of the RoPE settings")
    parser.add_argument("--train", type=Path, required=True, help="manifest of what was trained")
    parser.add_argument("--threads", type=int, required=True, help="CPU threads")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()
    set_up_torch(arguments.threads)

    base = manifest.read(arguments.base)
    rope = manifest.read_facts(arguments.rope)
    train = manifest.read(arguments.train)
    source = arguments.base.parent / base["facts"]["directory"]
    trained = arguments.train.parent / train["facts"]["directory"]
    require_space(arguments.output.parent, base["facts"]["bytes"], "the merged model")

    error = 0.0
    with manifest.new_directory(arguments.output) as directory:
        if train["facts"]["mode"] == "lora":
            adapter = read_adapter(trained, tensor_names(source))
            shards = models.tensor_files(source)
            for shard in progress(shards, len(shards), "merge"):
                error = max(error, merge_shard(shard, directory / shard.name, adapter))
            index = source / "model.safetensors.index.json"
            if index.is_file():
                shutil.copyfile(index, directory / index.name)
        else:
            for file in sorted(trained.iterdir()):
                shutil.copyfile(file, directory / file.name)
        copy_rest(source, directory, rope)
    files = sorted(arguments.output.glob("[!.]*"))
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings={},
        inputs={"base": arguments.base, "rope": arguments.rope, "train": arguments.train},
        files=files,
        facts={
            "directory": arguments.output.name,
            # What a later phase is trained from; the run's directory tells which model this is.
            "source": f"{arguments.output.parent.name}/{arguments.output.name}",
            "revision": None,
            "mode": train["facts"]["mode"],
            "merge_error": error,
            "trust_remote_code": base["facts"]["trust_remote_code"],
            "bytes": sum(file.stat().st_size for file in files),
        },
    )


def tensor_names(model_directory: Path) -> set[str]:
    """Return the names of all tensors in a model directory."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in models.tensor_files(model_directory):
        with safe_open(file, framework="pt") as shard:
            names.update(shard.keys())
    return names


def read_adapter(directory: Path, base_names: set[str]) -> dict:
    """Return, by the name of the base's tensor, a function from its old value to its new one, uncast.

    The names and the scale follow PEFT: ``<name>.lora_A.weight`` is A (r, in), ``lora_B`` is B
    (out, r), and the delta is B·A·alpha/r, or alpha/√r with rsLoRA.
    """
    from safetensors.torch import load_file

    record = manifest.read_json(directory / "adapter_config.json")
    for key in ("lora_bias", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"):
        if record.get(key):
            raise UserError(f"the adapter uses {key}, which Longyarn's merge does not know")
    rank = record["r"]
    scale = record["lora_alpha"] / (rank**0.5 if record.get("use_rslora") else rank)
    tensors = load_file(directory / "adapter_model.safetensors")
    if record.get("ensure_weight_tying"):
        # PEFT saves a tied embedding under the head's name too; the base has it once.
        tensors = {k: v for k, v in tensors.items() if not is_second_name(k, tensors, base_names)}
    changes = {}
    for name, tensor in tensors.items():
        target = name.removeprefix(PREFIX)
        if ".lora_B." in target:
            continue
        if ".lora_A." in target:
            other = tensors[name.replace(".lora_A.", ".lora_B.")]
            changes[target.replace(".lora_A.", ".")] = add_delta(tensor, other, scale)
        else:
            changes[target] = replace_by(tensor)
    unknown = sorted(set(changes) - base_names)
    if unknown:
        raise UserError(
            f"the adapter changes {unknown[0]}, which the base model lacks; it was trained on another "
            "model"
        )
    return changes


def is_second_name(name: str, tensors: dict, base_names: set[str]) -> bool:
    """Tell whether a tensor that the base lacks is one that it has, under another name."""
    if "lora_" in name or name.removeprefix(PREFIX) in base_names:
        return False
    return any(
        other != name and tensor.shape == tensors[name].shape and tensor.equal(tensors[name])
        for other, tensor in tensors.items()
    )


def add_delta(a, b, scale: float):
    """Return the change of a matrix W (out, in) to W + scale·B·A, summed in float32."""

    return lambda weight: weight.float() + (b.float() @ a.float()) * scale


def replace_by(tensor):
    """Return the change of a tensor to another one of the same shape."""
    return lambda weight: tensor


def lost(weight, wanted, new) -> float:
    """Return the share of a change that the cast took: ‖new − wanted‖ / ‖wanted − weight‖, in float32.

    A change of less than half the last bit is lost whole, so 1 means that nothing was learnt.
    """
    change = (wanted.float() - weight.float()).norm().item()
    return (new.float() - wanted.float()).norm().item() / change if change else 0.0


def merge_shard(source: Path, target: Path, changes: dict) -> float:
    """Write one shard with ``changes`` applied; return the largest share of one that was lost."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    merged, error = {}, 0.0
    with safe_open(source, framework="pt") as shard:
        metadata = shard.metadata()
        for name in shard.keys():
            weight = shard.get_tensor(name)
            wanted = changes[name](weight) if name in changes else weight
            new = wanted.to(weight.dtype)
            if new.shape != weight.shape:
                raise UserError(
                    f"the adapter's {name} has shape {tuple(new.shape)} where the base model has "
                    f"{tuple(weight.shape)}; it was trained on another model"
                )
            if name in changes:
                error = max(error, lost(weight, wanted, new))
            merged[name] = new.contiguous()
    save_file(merged, target, metadata=metadata)
    return error


def copy_rest(source: Path, directory: Path, rope: dict) -> None:
    """Copy tokenizer and settings beside the weights and write the config with its RoPE."""
    from longyarn.rope import patched_config

    for file in sorted(source.glob("[!.]*")):
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, directory / file.name)
    config = manifest.read_json(source / "config.json")
    config = patched_config(
        config, rope["rope_parameters"], rope["max_position_embeddings"], rope["full_attention"]
    )
    manifest.write_json(directory / "config.json", config)
    tokenizer = directory / "tokenizer_config.json"
    if tokenizer.is_file():
        record = json.loads(tokenizer.read_text(encoding="utf-8"))
        record["model_max_length"] = rope["max_position_embeddings"]
        manifest.write_json(tokenizer, record)


if __name__ == "__main__":
    program(main)()
