"""The variants that a run compares: the built-in ones, and those that the config defines by name.

A defined one (evaluation.more_variants) is one of three: the base with other settings of section rope,
the merged model of another run (``run``), or a published model with the RoPE of its own (``source``).
"""

import re
from pathlib import Path

from longyarn.core.errors import UserError
from longyarn.core.files import read_json, sha256

BUILT_IN = ("base", "linear", "ntk", "yarn", "trained")
NAME = "[a-z0-9][a-z0-9-]*"
OF_YARN = ("beta_fast", "beta_slow", "attention_factor")


def check(config: dict) -> None:
    """Refuse variants that are not defined, or whose definition is ambiguous."""
    evaluation = config["evaluation"]
    defined = evaluation["more_variants"]
    for name, entry in defined.items():
        where = f"evaluation.more_variants.{name}"
        if name in BUILT_IN or re.fullmatch("step-[0-9]+", name):
            raise UserError(f"{where} has the name of a built-in variant; choose another")
        if not re.fullmatch(NAME, name):
            raise UserError(
                f"{where} is not a name of lowercase letters, digits and hyphens; rename it"
            )
        check_entry(where, entry, config)
    for name in evaluation["variants"]:
        if name not in (*BUILT_IN, *defined):
            raise UserError(
                f"evaluation.variants has {name!r}, which is not built in ({', '.join(BUILT_IN)}) and not "
                "in evaluation.more_variants; define it there, or correct the name"
            )


def check_entry(where: str, entry: dict, config: dict) -> None:
    """Refuse a definition that mixes the three kinds, or a revision that can move."""
    kind = next((kind for kind in ("run", "source") if kind in entry), "rope")
    allowed = {"run": {"run"}, "source": {"source", "revision"}, "rope": config["rope"].keys()}
    if not entry or entry.keys() - allowed[kind]:
        raise UserError(
            f"{where} must be one thing: keys of section rope, or run alone, or source with its revision"
        )
    if kind == "rope" and entry.get("method", config["rope"]["method"]) == "none":
        raise UserError(f"{where} has no RoPE of its own, so it is the base; state its method")
    if entry.get("run") == config["run"]:
        raise UserError(f"{where} names this run itself, whose model is the variant trained")
    commit = re.fullmatch("[0-9a-f]{40}", entry.get("revision") or "0" * 40)
    if config["model"]["locked"] and not commit:
        raise UserError(
            f"{where}.revision {entry['revision']} is a branch or a tag, which can move, and model.locked "
            "is true; write the commit's 40 hexadecimal digits"
        )


def rope_settings(rope: dict, variant: str, entry: dict) -> dict:
    """Return the settings of the stage patch_rope for a variant of the base.

    ``entry`` is what the config defines of it, empty for a built-in one. Where it states a factor or a
    target length, the other follows from it.
    """
    settings = rope | ({"method": variant} if not entry else {})
    lengths = ("factor", "target_length")
    entry = {key: value for key, value in entry.items() if value is not None or key not in lengths}
    if {"factor", "target_length"} & entry.keys():
        settings |= {"factor": None, "target_length": None}
    if (settings | entry)["method"] != "yarn":
        settings = {key: value for key, value in settings.items() if key not in OF_YARN}
    return settings | entry


def of_run(directory: Path, name: str) -> Path:
    """Return the RoPE manifest that another run's merged model was made with, found by its hash."""
    merged = Path(directory) / "merged.json"
    if not merged.is_file():
        raise UserError(
            f"evaluation.more_variants.{name} needs {merged}, which is missing; finish that run first, "
            "or fix its name"
        )
    wanted = read_json(merged)["inputs"]["rope"]
    for path in sorted(merged.parent.glob("rope/*.json")):
        if sha256(path) == wanted:
            return path
    raise UserError(
        f"evaluation.more_variants.{name}: no manifest in {merged.parent}/rope is the one that "
        f"{merged} was made with; update that run first"
    )
