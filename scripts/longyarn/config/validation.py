"""The schema: its defaults, and a sentence for each way to break it."""

import difflib
import json
import math

import jsonschema

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


def validate(filled: dict, schema: dict) -> None:
    """Refuse a config that breaks the schema, with a sentence that names the key and the fix."""
    # An unknown key comes first, because a misspelt one often is missing too.
    first = jsonschema.exceptions.by_relevance(strong={"additionalProperties"})
    error = jsonschema.exceptions.best_match(Validator(schema).iter_errors(filled), key=first)
    if error is not None:
        raise UserError(_sentence(error))


def with_defaults(value, schema: dict):
    """Return a value of a config with every default of its schema filled in."""
    if isinstance(value, dict) and "properties" in schema:
        filled = dict(value)
        for key, sub in schema["properties"].items():
            if key in filled:
                filled[key] = with_defaults(filled[key], sub)
            elif "default" in sub:
                filled[key] = with_defaults(sub["default"], sub)
        return filled
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [with_defaults(item, schema["items"]) for item in value]
    return value


def _sentence(error: jsonschema.ValidationError) -> str:
    """Say a schema violation in one sentence that names the key and the fix."""
    where = error.json_path.removeprefix("$").removeprefix(".")
    if error.validator == "additionalProperties":
        known = list(error.schema["properties"])
        unknown = sorted(set(error.instance) - set(known), key=str)[0]
        name = f"{where}.{unknown}" if where else str(unknown)
        near = difflib.get_close_matches(str(unknown), known, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"config key {name!r} is unknown; {fix}"
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
