"""The reference of all keys in docs/configuration.md, written from the schema: `make reference`."""

import json
from collections.abc import Iterator

import yaml

from longyarn.config.layers import SCHEMA
from longyarn.config.validation import TYPES
from longyarn.core.files import ROOT

PAGE = ROOT / "docs" / "configuration.md"
HEADING = "## Reference"
INTRODUCTION = """
Written from `schemas/config.schema.yaml` by `make reference`. `[]` stands for each entry of a list.
"""


def page() -> str:
    """Return docs/configuration.md with its last section, the reference, written from the schema."""
    before, heading, _ = PAGE.read_text(encoding="utf-8").partition(HEADING)
    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    return before + heading + "\n" + INTRODUCTION + "".join(sections(schema))


def sections(schema: dict) -> Iterator[str]:
    """Yield the text of each section of the config, with a table of its keys."""
    for name, section in schema["properties"].items():
        yield f"\n### {name}\n\n{section['description']}\n\n"
        yield "| key | type and range | default | meaning |\n| --- | --- | --- | --- |\n"
        if not section.get("properties") and "items" not in section:
            yield row(name, section, name in schema["required"])
        for key, sub, required in keys(section, name):
            yield row(key, sub, required)


def keys(schema: dict, path: str) -> Iterator[tuple[str, dict, bool]]:
    """Yield the dotted path, the schema and whether it is required, of each key that takes a value."""
    required = schema.get("required", [])
    for key, sub in schema.get("properties", {}).items():
        where = f"{path}.{key}"
        if sub.get("type") != "object" or "properties" not in sub:
            yield where, sub, key in required
        yield from keys(sub, where)
    items = schema.get("items")
    if isinstance(items, dict):
        yield from keys(items, f"{path}[]")
    entries = schema.get("additionalProperties")
    if isinstance(entries, dict) and "properties" in entries:
        # A variant takes every key of section rope too, which has a table of its own.
        named = {key: entries["properties"][key] for key in ("run", "source", "revision")}
        yield from keys({"properties": named}, f"{path}.<name>")


def row(key: str, schema: dict, required: bool) -> str:
    """Return a key's line of the table."""
    default = schema.get("default", "" if not required else "required")
    if "default" in schema:
        default = f"`{json.dumps(schema['default'], ensure_ascii=False)}`"
    cells = f"`{key}`", kind(schema), default, schema["description"]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def kind(schema: dict) -> str:
    """Return the type and the range of a value in words."""
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`".replace('"', "") for value in schema["enum"])
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    words = " or ".join(TYPES[name].removeprefix("a ") for name in types if name != "null")
    items = schema.get("items", {})
    if "array" in types and isinstance(items.get("type"), str) and items["type"] != "object":
        words = f"list of: {kind(items)}"
    elif bounds := limits(schema):
        words = f"{words}, {bounds}"
    return words + (" or null" if "null" in types else "")


def limits(schema: dict) -> str:
    """Return the range of a number in words; empty without one."""
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{low} to {high}"
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "more than",
        "maximum": "at most",
        "exclusiveMaximum": "less than",
    }
    return ", ".join(f"{word} {schema[key]}" for key, word in words.items() if key in schema)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
