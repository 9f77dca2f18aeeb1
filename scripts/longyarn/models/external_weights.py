"""Checks the weights of an externally trained model, an adapter or a whole model, against the base.

An adapter has PEFT's format. A whole model is a directory that transformers loads. These checks find faults
that would raise no error later: tensors of another model, an adapter that learned nothing, numbers that are
not finite.
"""

import math
from pathlib import Path

from longyarn.core import tensorfile
from longyarn.core.console import progress
from longyarn.core.errors import UserError
from longyarn.core.files import read_json
from longyarn.models import lora_files
from longyarn.models.source_files import tensor_files

# Keys of adapter_config.json for kinds of LoRA that the merge cannot do; lora_files.py checks more of them.
UNKNOWN = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip
# Initializations of an adapter that leave the base's weights unchanged.
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
HEADS = ("lm_head.weight", "embed_out.weight")  # if tied, a second name of the embedding


def check_adapter(source: Path, base: Path, config) -> dict:
    """Check a LoRA adapter against the base; return its size, its settings and what it changes.

    ``config`` is the base's transformers configuration. The keys ``low_rank`` and ``whole`` name the
    modules that have a LoRA update and those that were trained whole.
    """
    record = read_json(source / "adapter_config.json")
    _check_kind(record, source)
    file = source / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(
            f"{source} has adapter_config.json but no adapter_model.safetensors; Longyarn reads safetensors "
            "only, so convert the adapter where it was trained"
        )
    places = tensorfile.header(file)
    _check_pairs(places, record["r"], file)
    shapes = {
        name: place.shape for name, (_, place) in tensorfile.tensors(tensor_files(base)).items()
    }
    changes = lora_files.read(source, shapes)
    odd = next((name for name, place in places.items() if place.kind not in tensorfile.TORCH), None)
    if odd:
        raise UserError(
            f"{file} has {odd} of type {places[odd].kind}, which is not a floating-point type; save it as one"
        )
    low_rank = {_target(name) for name in places if ".lora_A." in name}
    whole = sorted(changes.keys() - low_rank)
    vocabulary = [name for name in whole if shapes[name][0] == config.vocab_size]
    if vocabulary and config.tie_word_embeddings and not record.get("ensure_weight_tying"):
        raise UserError(
            f"the adapter trained {vocabulary[0]} apart from the output head, but both are one tensor in "
            "this base; train without the embeddings, or with PEFT's ensure_weight_tying"
        )
    for name, place in progress(places.items(), len(places), "check weights"):
        norm = math.hypot(
            *(float(rows.float().norm()) for _, rows in tensorfile.row_blocks(file, place))
        )
        if not math.isfinite(norm) or norm == 0:
            raise UserError(
                f"{file} has {name} of norm {norm:g}, so it learned nothing or diverged; train longer or "
                "with another learning rate"
            )
    return {
        "parameters": sum(math.prod(place.shape) for place in places.values()),
        "rank": record["r"],
        "alpha": record["lora_alpha"],
        "rslora": bool(record.get("use_rslora")),
        "low_rank": _leaves(low_rank),
        "whole": _leaves(whole),
    }


def _check_kind(record: dict, source: Path) -> None:
    file = source / "adapter_config.json"
    if record.get("peft_type") != "LORA":
        raise UserError(
            f"{file} describes an adapter of type {record.get('peft_type')}; Longyarn merges LoRA "
            "only, so train one"
        )
    for key in UNKNOWN:
        if record.get(key):
            raise UserError(f"the adapter uses {key}, which Longyarn cannot merge")
    start = record.get("init_lora_weights", True)
    if start not in STARTS:
        raise UserError(
            f"the adapter started from init_lora_weights {start!r}, which changed the base's weights, so it "
            "does not fit the base; train with PEFT's default"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(record.get(key), int | float) or record[key] <= 0:
            raise UserError(
                f"{file} has {key} {record.get(key)!r}, but it must be a positive number"
            )


def _check_pairs(places: dict[str, tensorfile.Place], rank: int, file: Path) -> None:
    """Stop unless each low-rank tensor is an A or a B of this rank, and the other one is there too."""
    for name, place in places.items():
        if "lora_" not in name:
            continue
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise UserError(
                f"{file} has {name}, which is not a low-rank update of a linear layer, so Longyarn cannot "
                "merge it; apply LoRA to linear layers only"
            )
        a = ".lora_A." in name
        other = name.replace(".lora_A.", ".lora_B.") if a else name.replace(".lora_B.", ".lora_A.")
        if other not in places:
            raise UserError(
                f"{file} has {name} but not {other}; it was saved wrongly, so save it again"
            )
        if len(place.shape) != 2 or place.shape[0 if a else 1] != rank:
            raise UserError(
                f"{file} has {name} of shape {place.shape}, which does not have the rank {rank} of "
                "adapter_config.json; it was saved wrongly, so save it again"
            )


def _target(name: str) -> str:
    return name.removeprefix(lora_files.PREFIX).replace(".lora_A.", ".")


def _leaves(names) -> list[str]:
    """Return the last part of the modules' names, such as q_proj for layers.0.self_attn.q_proj.weight."""
    return sorted({name.split(".")[-2] for name in names})


def check_whole(source: Path, base: Path, config) -> int:
    """Check a whole model against the base, tensor by tensor; return its number of parameters.

    ``config`` is the base's transformers configuration.
    """
    own, expected = (
        {
            name: found
            for name, found in tensorfile.tensors(tensor_files(place)).items()
            if not is_computed(name, config)
        }
        for place in (source, base)
    )
    for name in sorted(own.keys() ^ expected.keys()):
        where = "lacks" if name in expected else "has"
        raise UserError(
            f"the model in {source} {where} {name}, which the base {'has' if name in expected else 'lacks'}; "
            "it is another model, or it was saved wrongly"
        )
    for name, (file, place) in own.items():
        if place.shape != expected[name][1].shape:
            raise UserError(
                f"{file} has {name} of shape {place.shape}, but the base has {expected[name][1].shape}; it "
                "is another model, or tokens were added"
            )
        if (place.kind in tensorfile.TORCH) != (expected[name][1].kind in tensorfile.TORCH):
            raise UserError(
                f"{file} has {name} of type {place.kind}, but the base has {expected[name][1].kind}; save "
                "it without quantization"
            )
    changed = False
    for name, (file, place) in progress(own.items(), len(own), "check weights"):
        if place.kind in tensorfile.TORCH:
            changed |= _compare(name, file, place, *expected[name], looked=changed)
    if not changed:
        raise UserError(f"the model in {source} is the base itself; correct training.source")
    return sum(math.prod(place.shape) for _, place in own.values())


def is_computed(name: str, config) -> bool:
    """Tell whether a saved tensor is redundant, because it follows from another one or from the RoPE."""
    tied = config.tie_word_embeddings and name in HEADS
    return bool(tied) or name.endswith(".rotary_emb.inv_freq")


def _compare(
    name: str,
    file: Path,
    place: tensorfile.Place,
    base_file: Path,
    base: tensorfile.Place,
    looked: bool,
) -> bool:
    """Stop at a number that is not finite; tell whether the tensor, or one ``looked`` at before, differs."""
    changed = looked
    pairs = zip(
        tensorfile.row_blocks(file, place), tensorfile.row_blocks(base_file, base), strict=True
    )
    for (_, rows), (_, old) in pairs:
        if not rows.isfinite().all():
            raise UserError(
                f"{file} has numbers in {name} that are not finite, so training diverged; train again with a "
                "lower learning rate"
            )
        changed = changed or not rows.equal(old.to(rows.dtype))
    return changed
