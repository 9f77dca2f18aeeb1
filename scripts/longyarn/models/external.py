"""Checks the configuration and the tokenizer of an externally trained model against the base.

A wrong RoPE or tokenizer raises no error when the model is loaded: the model would only evaluate badly, and
nothing would say why.
"""

import math
from pathlib import Path

from longyarn.core.errors import UserError, first_line
from longyarn.core.files import sha256
from longyarn.rope.frequencies import attention_factor
from longyarn.rope.parameters import KNOWN_PARAMETERS, check_parameters
from longyarn.rope.record import RopeRecord

DEFAULTS = {"partial_rotary_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
OF_THE_MODEL = ("model_type", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")


def check_rope(config, rope: RopeRecord, source: Path) -> None:
    """Stop if a transformers configuration has another RoPE than the manifest; name each key that differs."""
    check_parameters(dict(config.rope_parameters))
    theirs = _comparable(config.rope_parameters, config.max_position_embeddings)
    ours = _comparable(rope.rope_parameters, rope.max_position_embeddings)
    if rope.full_attention:
        ours["sliding_window"], theirs["sliding_window"] = None, config.sliding_window
    odd = [key for key in ours if not _same(theirs.get(key), ours[key])]
    if "rope_type" in odd:  # the other keys differ because of it
        odd = ["rope_type"]
    if "factor" in odd and "attention_factor" in odd:  # it follows from factor
        odd.remove("attention_factor")
    if odd:
        said = ", ".join(f"{key} {_shown(theirs.get(key))}, not {_shown(ours[key])}" for key in odd)
        raise UserError(
            f"{source / 'config.json'} says that the model was trained with another RoPE than this run's "
            f"({said}); train it from this run's export, without any RoPE option of the framework, or set "
            "section rope to the RoPE it was trained with"
        )


def _comparable(parameters: dict, length: int) -> dict:
    """Return RoPE settings with defaults filled in, so that equal settings compare as equal."""
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
    """Stop if transformers 4 saved a config.json with rope_parameters, which it keeps but does not read."""
    scaled = rope.rope_parameters["rope_type"] != "default"
    old = str(record.get("transformers_version", "")).startswith("4.")
    if scaled and old and not record.get("rope_scaling"):
        raise UserError(
            f"{source / 'config.json'} was saved by transformers {record['transformers_version']} and has no "
            "rope_scaling, so the model was trained without this run's RoPE; train it from this run's "
            "export, and with transformers 5 if the export says so"
        )


def check_model(config, base, source: Path) -> None:
    """Stop if a transformers configuration belongs to another model than the base."""
    for key in OF_THE_MODEL:
        own, expected = getattr(config, key, None), getattr(base, key, None)
        if own != expected:
            raise UserError(
                f"{source / 'config.json'} has {key} {own}, but the base has {expected}; it is another "
                "model, so correct training.source or model.source"
            )


def check_tokenizer(source: Path, base: Path, trust_remote_code: bool) -> None:
    """Stop if the directory ``source`` has a tokenizer whose vocabulary is not the base's."""
    file = source / "tokenizer.json"
    same = (base / "tokenizer.json").is_file() and file.is_file()
    if same and sha256(file) == sha256(base / "tokenizer.json"):
        return
    if not file.is_file() and not list(source.glob("tokenizer*.model*")):
        return
    # loading.load_tokenizer needs the model's config.json, which an adapter does not have beside it.
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code).get_vocab()
    try:
        own = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code).get_vocab()
    except Exception as error:  # the tokenizers library raises no more specific type
        raise UserError(
            f"the tokenizer in {source}, which training.source names, cannot be loaded "
            f"({first_line(error)}); restore its files there, or remove them if it is the base's tokenizer"
        ) from None
    if own != expected:
        raise UserError(
            f"the tokenizer in {source} has another vocabulary than the base ({len(own)} and "
            f"{len(expected)} tokens), so training saw other tokens; train from this run's export, and do "
            "not add tokens"
        )
