"""The configuration: filled with defaults and checked before the DAG is built."""

import difflib
import json
import math
from pathlib import Path

import jsonschema
import yaml

from longyarn.config import derived
from longyarn.config.checks import (
    BESIDE_THE_ADAPTER,
    OF_THE_RUN,
    check,
    check_training,
    collections,
)
from longyarn.config.phases import configurations, within
from longyarn.core.errors import UserError


def _is_whole(checker, value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(checker, value) -> bool:
    return _is_whole(checker, value) or (isinstance(value, float) and math.isfinite(value))


# JSON Schema takes 4096.0 for an integer and .nan for a number; neither is what a stage can use.
Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine_many(
        {"integer": _is_whole, "number": _is_finite}
    ),
)

TYPES = {
    "object": "a mapping",
    "array": "a list",
    "string": "text",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "null": "null",
}


def complete(config: dict, schema_path: Path) -> dict:
    """Return ``config`` with every default of the schema filled in, or raise one clear sentence."""
    schema = yaml.safe_load(Path(schema_path).read_text(encoding="utf-8"))
    filled = _with_defaults(_with_dependent_defaults(config), schema)
    _validate(filled, schema)
    filled = _derived(filled)
    check(filled)
    if filled["sweep"]["factors"] and filled["phases"]:
        raise UserError(
            "a sweep of a run in phases is not known; set phases to [], or sweep.factors to {}"
        )
    for name, part in configurations(filled).items():
        if name:
            try:
                _check_part(part, filled, schema)
            except UserError as error:
                raise UserError(f"{within(name)}{error}") from None
    return filled


def _with_dependent_defaults(config: dict) -> dict:
    """Return a config with the defaults that depend on what else it states.

    It is not validated yet, so a value of the wrong type stays as it is.
    """
    if config.get("gate", {}) is None:
        config = config | {"gate": {}}
    training = config.get("training")
    if not isinstance(training, dict):
        return config
    if training.get("epochs") is not None:
        training = {"steps": None} | training
    if training.get("mode") == "full" and isinstance(lora := training.get("lora", {}), dict):
        # Training of every weight includes these, so they are no additions to an adapter.
        training = training | {"lora": dict.fromkeys(BESIDE_THE_ADAPTER, False) | lora}
    return config | {"training": training}


def _derived(config: dict) -> dict:
    """Return a valid config with the values that follow from others in place of null.

    Lengths of the evaluation stay null: they follow from the model, which may not be downloaded yet.
    """
    corpus, evaluation = config["corpus"], config["evaluation"]
    counts, perplexity = corpus["held_out_documents"], evaluation["perplexity"]
    if counts is None:
        first = [] if corpus["held_out"] else collections(corpus)[:1]
        counts = dict.fromkeys(first, derived.HELD_OUT_DOCUMENTS)
    # A file layered on another takes a collection out with null.
    counts = {name: count for name, count in counts.items() if count is not None}
    if perplexity["tokens_per_document"] is None:
        perplexity = perplexity | {"tokens_per_document": 2 * config["rope"]["target_length"]}
    return config | {
        "corpus": corpus | {"held_out_documents": counts},
        "evaluation": evaluation | {"perplexity": perplexity},
    }


def _check_part(part: dict, run: dict, schema: dict) -> None:
    _validate(part, schema)
    check_training(part)
    for key in OF_THE_RUN:
        if part["training"][key] != run["training"][key]:
            raise UserError(
                f"training.{key} is that of the whole run, {run['training'][key]}; take it out"
            )


def _validate(filled: dict, schema: dict) -> None:
    # An unknown key comes first, because a misspelt one often is missing too.
    first = jsonschema.exceptions.by_relevance(strong={"additionalProperties"})
    error = jsonschema.exceptions.best_match(Validator(schema).iter_errors(filled), key=first)
    if error is not None:
        raise UserError(_sentence(error))


def _with_defaults(value, schema: dict):
    if isinstance(value, dict) and "properties" in schema:
        filled = dict(value)
        for key, sub in schema["properties"].items():
            if key in filled:
                filled[key] = _with_defaults(filled[key], sub)
            elif "default" in sub:
                filled[key] = _with_defaults(sub["default"], sub)
        return filled
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [_with_defaults(item, schema["items"]) for item in value]
    return value


def _sentence(error: jsonschema.ValidationError) -> str:
    """Say a schema violation in one sentence that names the key and the mend."""
    where = error.json_path.removeprefix("$").removeprefix(".")
    if error.validator == "additionalProperties":
        known = list(error.schema["properties"])
        unknown = sorted(set(error.instance) - set(known), key=str)[0]
        name = f"{where}.{unknown}" if where else str(unknown)
        near = difflib.get_close_matches(str(unknown), known, n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"config key {name!r} is unknown; {mend}"
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        name = f"{where}.{missing}" if where else missing
        return f"config key {name!r} is missing; {_purpose(error.schema['properties'][missing])}"
    value, rule = error.instance, error.validator_value
    sentence = {
        "type": lambda: f"must be {_types(rule)}{_type_hint(value, rule)}",
        "enum": lambda: (
            "must be one of " + ", ".join("null" if v is None else str(v) for v in rule)
        ),
        "minimum": lambda: f"must be at least {rule}",
        "maximum": lambda: f"must be at most {rule}",
        "exclusiveMinimum": lambda: f"must be more than {rule}",
        "exclusiveMaximum": lambda: f"must be less than {rule}",
        "pattern": lambda: "is not of the form asked for",
        "minItems": lambda: "must not be empty",
        "minLength": lambda: "must not be empty",
        "uniqueItems": lambda: "must not repeat an entry",
    }[error.validator]()
    purpose = _purpose(error.schema)
    return f"config key {where!r} is {_shown(value)}, but {sentence}" + (
        f" ({purpose})" if purpose else ""
    )


def _types(names: str | list[str]) -> str:
    # null is named last, because a value is what is wanted.
    names = [names] if isinstance(names, str) else sorted(names, key="null".__eq__)
    return " or ".join(TYPES[name] for name in names)


def _type_hint(value, names: str | list[str]) -> str:
    """Return what to do about a value that YAML reads as another type than it looks."""
    if "string" in names and not isinstance(value, dict | list | None):
        return "; put it in quotes"
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return ""
        return "; YAML reads 1e-4 as text, so write 1.0e-4, and numbers without quotes"
    return ""


def _shown(value) -> str:
    """Return a value as the config would have it, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _purpose(schema: dict) -> str:
    return schema.get("description", "").rstrip(".")
