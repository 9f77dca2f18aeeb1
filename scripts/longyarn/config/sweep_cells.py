"""A sweep: configurations around one, each a *cell*, and which of their stages are the same.

A cell is the run's configuration with changes, ``{"training.steps": 200, …}``. It lives in a directory
below the run's, named by what differs, so an additional factor renames no cell. Pure functions.
"""

import copy
import hashlib
import itertools
import json
import re

from longyarn import stages
from longyarn.core.errors import UserError

DIRECTORY = "cells"
SECTIONS = ("rope", "mix", "training")
SHARED = (
    stages.PATCH_ROPE.name,
    stages.PACK.name,
)  # stages; from training on each cell has its own
LONGEST_NAME = 80


def cells(config: dict) -> dict[str, dict]:
    """Return the whole configuration of each cell by its directory; the run itself, without one, first."""
    return {directory(changes): changed(config, changes) for changes in all_changes(config)}


def changed(config: dict, changes: dict) -> dict:
    """Return the whole configuration of a cell; the run itself has no changes."""
    if not changes:
        return config
    return with_changes(config | {"sweep": config["sweep"] | {"factors": {}}}, changes)


def all_changes(config: dict) -> list[dict]:
    """Return what differs from the config in each cell, the config itself first, without duplicates."""
    factors = {
        name: [changes_of(name, value) for value in values]
        for name, values in config["sweep"]["factors"].items()
    }
    if config["sweep"]["design"] == "grid":
        combined = [together(factors, chosen) for chosen in itertools.product(*factors.values())]
    else:
        combined = list(itertools.chain(*factors.values()))
    found = [{}]
    for changes in combined:
        differing = {key: value for key, value in changes.items() if at(config, key) != value}
        if differing not in found:
            found.append(differing)
    return found


def changes_of(name: str, value) -> dict:
    """Return the changes that one value of a factor makes: a mapping of keys, or of the factor's own key."""
    changes = value if isinstance(value, dict) else {name: value}
    for key, new in changes.items():
        if isinstance(new, dict) and key != "mix.shares":
            raise UserError(
                f"sweep.factors has {name!r}, which gives {key} a mapping; write its keys one by one, as "
                f"{key}.{next(iter(new), 'key')}"
            )
        if not isinstance(key, str) or key.partition(".")[0] not in SECTIONS or "." not in key:
            raise UserError(
                f"sweep.factors has {name!r}, which changes {key!r}, and a sweep changes keys of "
                f"{', '.join(SECTIONS)} alone; write such a key, as training.steps, or a mapping of them"
            )
    return changes


def together(factors: dict, chosen: tuple[dict, ...]) -> dict:
    """Return the changes of a cell of the grid, one of each factor."""
    found: dict = {}
    for name, changes in zip(factors, chosen, strict=True):
        if both := found.keys() & changes.keys():
            raise UserError(
                f"two factors of sweep.factors change {min(both)}, the second is {name!r}; in a grid, let "
                "one of them do it"
            )
        found |= changes
    return found


def at(config: dict, key: str):
    """Return what a config has at a dotted key; ``...`` where it has nothing."""
    for part in key.split("."):
        config = config.get(part, ...) if isinstance(config, dict) else ...
    return config


def with_changes(config: dict, changes: dict) -> dict:
    """Return a copy of a config with dotted keys set."""
    changed = copy.deepcopy(config)
    for key, value in changes.items():
        *sections, name = key.split(".")
        inner = changed
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise UserError(
                    f"sweep.factors changes {key}, but {section} is not a section; fix the key"
                )
        inner[name] = value
    return changed


def directory(changes: dict) -> str:
    """Return a cell's directory below the run's, with its slash; empty for the run itself."""
    if not changes:
        return ""
    ordered = sorted(changes.items())
    words = [value if isinstance(value, str) else json.dumps(value) for _, value in ordered]
    name = "+".join(f"{key}={word}" for (key, _), word in zip(ordered, words, strict=True))
    if not re.fullmatch(r"[\w.=+-]+", name, re.ASCII) or len(name) > LONGEST_NAME:
        digest = hashlib.sha256(json.dumps(ordered).encode()).hexdigest()[:8]
        name = "+".join(key.rpartition(".")[2] for key, _ in ordered)[:40] + f"-{digest}"
    return f"{DIRECTORY}/{name}/"


def shared(changes: dict, stage: str) -> dict:
    """Return those of a cell's changes that decide on a stage of ``SHARED`` and on all before it.

    The stage lies in the directory of these alone, so for every cell that has the same, and whatever
    other cells there are. Of RoPE, each method has a file of its own.
    """
    if stage == stages.PATCH_ROPE.name:
        return {k: v for k, v in changes.items() if k.startswith("rope.") and k != "rope.method"}
    return {k: v for k, v in changes.items() if k.startswith(("rope.", "mix."))}


def places(config: dict) -> dict[str, dict]:
    """Return the changes of each directory that a sweep has: of its cells, and of what they share."""
    cells = all_changes(config)
    more = [shared(changes, stage) for changes in cells for stage in SHARED]
    return {directory(changes): changes for changes in [*cells, *more]}


def is_of_seeds(changes: dict) -> bool:
    """Tell whether a cell repeats the run itself with other seeds."""
    return all(key.endswith(".seed") for key in changes)
