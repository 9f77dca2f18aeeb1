"""The content of sweep.json, and of the table made from it. docs/sweeps.md describes the keys.

Each cell is compared with the default, which is the run itself: by the ratio of perplexities over identical
tokens and by the difference of the passkeys found. These intervals are those of one training. How much
another seed changes is stated separately, if the sweep has seeds.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from longyarn.config import sweep_cells
from longyarn.core import run_directory
from longyarn.core.console import duration
from longyarn.reporting import comparisons
from longyarn.reporting.assemble import results_of
from longyarn.reporting.results import NotEvaluated, Results
from longyarn.reporting.wording import between, percent, points, significant
from longyarn.rope.record import RopeRecord
from longyarn.stages import TRAIN

DEFAULT = "default"


def name_of(changes: dict) -> str:
    """Return a cell's name: the last part of its directory."""
    return Path(sweep_cells.directory(changes)).name or DEFAULT


def assemble(changes: dict[str, dict], rope: RopeRecord, facts: dict, benchmarks: Path) -> dict:
    """Return sweep.json: the lengths, the cells, and the spread of the seeds.

    ``changes`` has each cell's changed settings by its name, ``rope`` the run's RoPE. ``facts``
    has those of train, perplexity and passkey, by stage and cell. ``benchmarks`` is the directory of
    timings.
    """
    results = results_of(rope, facts["perplexity"], facts["passkey"])
    cells = {}
    for name, cell in changes.items():
        timing = run_directory.timing(benchmarks, f"{sweep_cells.directory(cell)}{TRAIN.name}")
        cells[name] = {
            "changes": cell,
            "figures": {
                str(length): against_default(results, name, length) for length in results.lengths
            },
            "tokens_seen": facts[TRAIN.name][name]["tokens_seen"],
            "train_seconds": timing.seconds if timing else None,
        }
    found = {
        "original_length": results.original,
        "target_length": results.target,
        "cells": cells,
        "seeds": spread_of_seeds(cells, results.lengths),
    }
    return found | {"sentence": sentence(found)}


def against_default(results: Results, name: str, length: int) -> dict:
    """Return a cell's figures at a length, and how they compare with those of the default cell."""
    facts = results.perplexity[name]["lengths"].get(str(length))
    try:
        passkey = results.retrieved(name, length)
    except NotEvaluated:
        passkey = None
    return {
        "perplexity": {key: facts[key] for key in ("value", "low", "high")} if facts else None,
        "perplexity_ratio": comparisons.perplexity_ratio(results, name, DEFAULT, length),
        "passkey": passkey,
        "passkey_difference": comparisons.passkey_difference(results, name, DEFAULT, length),
    }


def spread_of_seeds(cells: dict[str, dict], lengths: list[int]) -> dict | None:
    """Return how far the seeds are apart, by length: in perplexity and in the share of passkeys found.

    The default is one of them. ``deviation`` is the standard deviation of the sample (n − 1). Return None
    if the sweep has no other seed.
    """
    names = [name for name, cell in cells.items() if sweep_cells.is_of_seeds(cell["changes"])]
    if len(names) < 2:
        return None
    found: dict = {"cells": names}
    for length in map(str, lengths):
        of = [cells[name]["figures"][length] for name in names]
        kinds = {
            "perplexity": [one["perplexity"]["value"] for one in of if one["perplexity"]],
            "passkey": [
                one["passkey"]["successes"] / one["passkey"]["trials"]
                for one in of
                if one["passkey"]
            ],
        }
        found[length] = {
            kind: {
                "low": min(values),
                "high": max(values),
                "deviation": float(np.std(values, ddof=1)),
            }
            for kind, values in kinds.items()
            if values
        }
    return found


def sentence(found: dict) -> str:
    """Return what the sweep shows at the target length, in words."""
    at, cells = str(found["target_length"]), found["cells"]
    ratios = {name: cell["figures"][at]["perplexity_ratio"] for name, cell in cells.items()}
    counted = {name: one for name, one in ratios.items() if one and name != DEFAULT}
    lower = [name for name, one in counted.items() if one["significant"] and one["value"] < 1]
    higher = [name for name, one in counted.items() if one["significant"] and one["value"] > 1]
    if not counted:
        return f"Perplexity at {found['target_length']:,} tokens was not evaluated."
    text = (
        f"At {found['target_length']:,} tokens, of {len(cells) - 1} cells besides the default, "
        f"{len(lower)} have a significantly lower perplexity ({', '.join(lower) or 'none'}) and "
        f"{len(higher)} a significantly higher one ({', '.join(higher) or 'none'})"
    )
    seeds = found["seeds"]
    if seeds and "perplexity" in seeds[at]:
        one = seeds[at]["perplexity"]
        text += (
            f"; over {len(seeds['cells'])} seeds of the default, perplexity lies between "
            f"{significant(one['low'])} and {significant(one['high'])}, so a difference of that size "
            "may come from the seed alone"
        )
    return f"{text}."


def page(found: dict, image: str) -> str:
    """Return the Markdown page: the sentence, the figure ``image``, the table, and how to read it."""
    lengths = list(dict.fromkeys([str(found["original_length"]), str(found["target_length"])]))
    head = ["cell"]
    for length in lengths:
        head += [f"perplexity at {int(length):,}", "times the default's", "passkeys", "points"]
    head += ["tokens trained", "training"]
    rows = [
        [
            f"`{name}`",
            *(word for length in lengths for word in words(cell["figures"][length])),
            f"{cell['tokens_seen']:,}",
            "" if cell["train_seconds"] is None else duration(cell["train_seconds"]),
        ]
        for name, cell in found["cells"].items()
    ]
    table = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    lines = [
        "# The sweep",
        "",
        found["sentence"],
        "",
        f"![What each change does]({image})",
        "",
        *("| " + " | ".join(row) + " |" for row in table),
        "",
        "Bold differences are significant: their 95 % interval excludes 1 (ratio) or 0 (points). Intervals "
        "of perplexities and ratios are over held-out documents, those of passkeys over keys; both are for "
        "one training. None is corrected for the number of cells.",
    ]
    return "\n".join([*lines, *seeds_in_words(found), ""])


def words(figure: dict) -> list[str]:
    """Return four columns of the table: perplexity, its ratio, passkeys found, and their difference."""
    value, ratio = figure["perplexity"], figure["perplexity_ratio"]
    found, difference = figure["passkey"], figure["passkey_difference"]
    return [
        f"{significant(value['value'])} ({between(value['low'], value['high'])})" if value else "",
        bold(ratio, significant) if ratio else "",
        f"{found['successes']} of {found['trials']} ({between(found['low'], found['high'], percent)})"
        if found
        else "",
        bold(difference, points) if difference else "",
    ]


def bold(figure: dict, write: Callable[[float], str]) -> str:
    """Write a difference with its interval, in bold if it is significant."""
    stars = "**" if figure["significant"] else ""
    value = f"{stars}{write(figure['value'])}{stars}"
    return f"{value} ({between(figure['low'], figure['high'], write)})"


def seeds_in_words(found: dict) -> list[str]:
    """Return the lines of the page about the spread of the seeds."""
    seeds = found["seeds"]
    if not seeds:
        return [
            "",
            "No cells differ only in their seed, so how much another seed changes is unknown.",
        ]
    lines = ["", f"Seeds of the default ({', '.join(f'`{name}`' for name in seeds['cells'])}):", ""]
    write = {"perplexity": significant, "passkey": percent}
    for length, kinds in seeds.items():
        if length != "cells":
            lines += [
                f"- {kind} at {int(length):,}: {between(one['low'], one['high'], write[kind])}, standard "
                f"deviation {write[kind](one['deviation'])}"
                for kind, one in kinds.items()
            ]
    return lines
