"""What is checked of a model that was trained elsewhere: all that would be wrong in silence.

Adapters are in PEFT's form; a whole model is a directory that transformers loads. Both must be of this
run's base, whose RoPE this run extended: a model that was trained with other frequencies evaluates badly,
and nothing else says why.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from longyarn.core import tensorfile
from longyarn.core.console import progress
from longyarn.core.errors import UserError, first_line
from longyarn.core.files import read_json, sha256
from longyarn.models import lora_files
from longyarn.models.source_files import tensor_files
from longyarn.rope.frequencies import attention_factor
from longyarn.rope.parameters import KNOWN_PARAMETERS, check_parameters
from longyarn.rope.record import RopeRecord

# Kinds of LoRA that the merge does not do, by their keys in adapter_config.json; deltas.py has the others.
UNKNOWN = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip
# Starts of an adapter that leave the base's weights as they are.
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
DEFAULTS = {"partial_rotary_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
OF_THE_MODEL = ("model_type", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
HEADS = ("lm_head.weight", "embed_out.weight")  # where tied, a second name of the embedding
BLOCK = 1 << 22  # elements in memory at once


def check_rope(config, rope: RopeRecord, source: Path) -> None:
    """Stop where a transformers configuration has another RoPE than the manifest; name each key."""
    check_parameters(dict(config.rope_parameters))
    theirs = _comparable(config.rope_parameters, config.max_position_embeddings)
    ours = _comparable(rope.rope_parameters, rope.max_position_embeddings)
    if rope.full_attention:
        ours["sliding_window"], theirs["sliding_window"] = None, config.sliding_window
    odd = [key for key in ours if not _same(theirs.get(key), ours[key])]
    if "rope_type" in odd:  # the others differ with it
        odd = ["rope_type"]
    if "factor" in odd and "attention_factor" in odd:  # which follows from it
        odd.remove("attention_factor")
    if odd:
        said = ", ".join(f"{key} {_shown(theirs.get(key))}, not {_shown(ours[key])}" for key in odd)
        raise UserError(
            f"{source / 'config.json'} says that the model was trained with another RoPE than this run's "
            f"({said}); train it from this run's export, with no RoPE option of the framework, or set "
            "section rope to what it was trained with"
        )


def _comparable(parameters: dict, length: int) -> dict:
    """Return RoPE settings with what is left out filled in, so that equal ones compare as equal."""
    known = KNOWN_PARAMETERS[parameters["rope_type"]] - {"mscale", "mscale_all_dim"}
    found = {key: parameters.get(key, DEFAULTS.get(key)) for key in sorted(known)}
    if "attention_factor" in known:
        found["attention_factor"] = attention_factor(parameters)
    return found | {"max_position_embeddings": length}


def _same(one, other) -> bool:
    if isinstance(one, float | int) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _shown(value) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def check_version(record: dict, rope: RopeRecord, source: Path) -> None:
    """Stop where transformers 4 saved a config.json with a RoPE that it does not read, but keeps."""
    scaled = rope.rope_parameters["rope_type"] != "default"
    old = str(record.get("transformers_version", "")).startswith("4.")
    if scaled and old and not record.get("rope_scaling"):
        raise UserError(
            f"{source / 'config.json'} is of transformers {record['transformers_version']} and has no "
            "rope_scaling, so the model was trained without this run's RoPE; train it from this run's "
            "export, with transformers 5 where that says so"
        )


def check_model(config, base, source: Path) -> None:
    """Stop where a transformers configuration is of another model than the base's."""
    for key in OF_THE_MODEL:
        own, expected = getattr(config, key, None), getattr(base, key, None)
        if own != expected:
            raise UserError(
                f"{source / 'config.json'} has {key} {own} where the base has {expected}; it is another "
                "model, so mend training.source or model.source"
            )


def check_tokenizer(source: Path, base: Path, trust_remote_code: bool) -> None:
    """Stop where a tokenizer lies beside what was trained, and its vocabulary is not the base's."""
    file = source / "tokenizer.json"
    same = (base / "tokenizer.json").is_file() and file.is_file()
    if same and sha256(file) == sha256(base / "tokenizer.json"):
        return
    if not file.is_file() and not list(source.glob("tokenizer*.model*")):
        return
    # Not through models.load_tokenizer: an adapter has no model's config.json beside it.
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code).get_vocab()
    try:
        own = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code).get_vocab()
    except Exception as error:  # the tokenizers library raises nothing more special
        raise UserError(
            f"the tokenizer in {source}, which training.source names, cannot be loaded "
            f"({first_line(error)}); restore its files there, or take them away if it is the base's"
        ) from None
    if own != expected:
        raise UserError(
            f"the tokenizer in {source} has another vocabulary than the base ({len(own)} and "
            f"{len(expected)} tokens), so what was trained read other tokens; train from this run's export, "
            "and add no token"
        )


def check_adapter(source: Path, base: Path, config) -> dict:
    """Check a LoRA adapter against the base; return its ``rank``, ``alpha``, ``rslora`` and what it changes.

    ``config`` is the base's transformers configuration.
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
    shapes = {name: place.shape for name, (_, place) in tensors(base).items()}
    changes = lora_files.read(source, shapes)
    odd = next((name for name, place in places.items() if place.kind not in tensorfile.TORCH), None)
    if odd:
        raise UserError(
            f"{file} has {odd} of type {places[odd].kind}, which is not a float's; save it as one"
        )
    low_rank = {_target(name) for name in places if ".lora_A." in name}
    whole = sorted(changes.keys() - low_rank)
    vocabulary = [name for name in whole if shapes[name][0] == config.vocab_size]
    if vocabulary and config.tie_word_embeddings and not record.get("ensure_weight_tying"):
        raise UserError(
            f"the adapter trained {vocabulary[0]} apart from the output head, which in this base is the same "
            "tensor; train without the embeddings, or with PEFT's ensure_weight_tying"
        )
    for name, place in progress(places.items(), len(places), "adopt"):
        norm = math.hypot(*(float(rows.float().norm()) for rows in _blocks(file, place)))
        if not math.isfinite(norm) or norm == 0:
            raise UserError(
                f"{file} has {name} of norm {norm:g}, so nothing was learnt there, or too much; train longer "
                "or with another learning rate"
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
            f"{file} is of an adapter of type {record.get('peft_type')}; Longyarn merges LoRA, so train one"
        )
    for key in UNKNOWN:
        if record.get(key):
            raise UserError(f"the adapter uses {key}, which Longyarn's merge does not know")
    start = record.get("init_lora_weights", True)
    if start not in STARTS:
        raise UserError(
            f"the adapter started from init_lora_weights {start!r}, which changed the base's weights, so it "
            "does not fit the base; train from PEFT's default"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(record.get(key), int | float) or record[key] <= 0:
            raise UserError(
                f"{file} has {key} {record.get(key)!r}, where a positive number is needed"
            )


def _check_pairs(places: dict[str, tensorfile.Place], rank: int, file: Path) -> None:
    """Stop unless each low-rank tensor is an A of this rank with its B, or the other way round."""
    for name, place in places.items():
        if "lora_" not in name:
            continue
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise UserError(
                f"{file} has {name}, which is no low-rank change of a linear layer and unknown to Longyarn's "
                "merge; train linear layers alone"
            )
        a = ".lora_A." in name
        other = name.replace(".lora_A.", ".lora_B.") if a else name.replace(".lora_B.", ".lora_A.")
        if other not in places:
            raise UserError(
                f"{file} has {name} but not {other}; it was saved wrongly, so save it again"
            )
        if len(place.shape) != 2 or place.shape[0 if a else 1] != rank:
            raise UserError(
                f"{file} has {name} of shape {place.shape}, which is not of the rank {rank} in "
                "adapter_config.json; it was saved wrongly, so save it again"
            )


def _target(name: str) -> str:
    return name.removeprefix(lora_files.PREFIX).replace(".lora_A.", ".")


def _leaves(names) -> list[str]:
    """Return the last part of the modules' names: q_proj for model.layers.0.self_attn.q_proj.weight."""
    return sorted({name.split(".")[-2] for name in names})


def check_whole(source: Path, base: Path, config) -> int:
    """Check a whole model tensor by tensor against the base; return how many parameters it has.

    ``config`` is the base's transformers configuration.
    """
    own, expected = (
        {name: found for name, found in tensors(place).items() if not is_computed(name, config)}
        for place in (source, base)
    )
    for name in sorted(own.keys() ^ expected.keys()):
        where = "lacks" if name in expected else "has"
        raise UserError(
            f"the model in {source} {where} {name}, which the base {'has' if name in expected else 'lacks'}; "
            "it is another model, or was saved wrongly"
        )
    for name, (file, place) in own.items():
        if place.shape != expected[name][1].shape:
            raise UserError(
                f"{file} has {name} of shape {place.shape} where the base has {expected[name][1].shape}; it "
                "is another model, or tokens were added"
            )
        if (place.kind in tensorfile.TORCH) != (expected[name][1].kind in tensorfile.TORCH):
            raise UserError(
                f"{file} has {name} of type {place.kind} where the base has {expected[name][1].kind}; save "
                "it unquantised"
            )
    changed = False
    for name, (file, place) in progress(own.items(), len(own), "adopt"):
        if place.kind in tensorfile.TORCH:
            changed |= _compare(name, file, place, *expected[name], looked=changed)
    if not changed:
        raise UserError(f"the model in {source} is the base itself; mend training.source")
    return sum(math.prod(place.shape) for _, place in own.values())


def is_computed(name: str, config) -> bool:
    """Tell whether a model has a tensor whether or not it is saved: it follows from others, or the RoPE."""
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
    """Stop at a number that is not finite; tell whether a tensor differs, unless one was ``looked`` at."""
    changed = looked
    for rows, old in zip(_blocks(file, place), _blocks(base_file, base), strict=True):
        if not rows.isfinite().all():
            raise UserError(
                f"{file} has numbers in {name} that are not finite, so training diverged; train again with a "
                "lower learning rate"
            )
        changed = changed or not rows.equal(old.to(rows.dtype))
    return changed


def _blocks(file: Path, place: tensorfile.Place) -> Iterator:
    """Yield a tensor some rows at a time."""
    count, *rest = place.shape or (1,)
    step = max(1, BLOCK // max(1, math.prod(rest)))
    for begin in range(0, count, step):
        yield tensorfile.torch_rows(file, place, begin, min(step, count - begin))


def tensors(directory: Path) -> dict[str, tuple[Path, tensorfile.Place]]:
    """Return where each tensor of a model lies, its file and its place there, by name."""
    return {
        name: (file, place)
        for file in tensor_files(directory)
        for name, place in tensorfile.header(file).items()
    }
