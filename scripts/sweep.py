"""Compare the cells of a sweep: a table, and a figure of what each change does.

Each cell stands against the run itself: the ratio of perplexities over identical tokens, in pairs by
document, and the difference of the passkeys found. The interval is over documents, or keys, of one
training; how much another seed changes is told apart where the sweep has seeds.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import report
from longyarn.config import sweep_cells
from longyarn.core import job_record, manifest
from longyarn.core.console import duration
from longyarn.core.errors import UserError, program
from longyarn.core.files import write_json, write_text
from longyarn.reporting import comparisons, figures, verdict
from longyarn.reporting.verdict import between, percent, significant

DEFAULT = "default"
STAGES = ("train", "perplexity", "passkey")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rope", type=Path, required=True, help="RoPE manifest of the run itself")
    parser.add_argument(
        "--cells", type=json.loads, required=True, help="the changes of each cell, as JSON"
    )
    for name in STAGES:
        parser.add_argument(
            f"--{name}",
            type=Path,
            nargs="+",
            required=True,
            help="a manifest of each cell, in order",
        )
    parser.add_argument("--benchmarks", type=Path, required=True, help="directory of job timings")
    parser.add_argument("--json", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--page", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--png", type=Path, required=True, help="figure to write")
    parser.add_argument("--svg", type=Path, required=True, help="the same as SVG")
    arguments = parser.parse_args()
    if len(arguments.cells) < 2:
        raise UserError("sweep.factors has nothing that differs from the configuration; state some")

    changes = {name_of(cell): cell for cell in arguments.cells}
    facts = {
        stage: dict(zip(changes, map(manifest.read_facts, getattr(arguments, stage)), strict=True))
        for stage in STAGES
    }
    found = assemble(changes, manifest.read_facts(arguments.rope), facts, arguments.benchmarks)
    job_record.write_environment(arguments.json)
    write_json(arguments.json, found)
    write_text(arguments.page, page(found, arguments.png.name))
    draw(found, arguments.png, arguments.svg)
    print(found["sentence"], file=sys.stderr)


def name_of(changes: dict) -> str:
    """Return a cell's name: the last part of its directory."""
    return Path(sweep_cells.directory(changes)).name or DEFAULT


def assemble(changes: dict[str, dict], rope: dict, facts: dict, benchmarks: Path) -> dict:
    """Return sweep.json: lengths, cells, and the spread of the seeds; docs/sweeps.md has its keys.

    ``facts`` are those of each cell by stage; ``benchmarks`` has the timings of jobs, named by directory.
    """
    trained = {name: f"{sweep_cells.directory(cell)}train" for name, cell in changes.items()}
    shown = verdict.Figures(
        original=rope["original_max_position_embeddings"],
        target=rope["max_position_embeddings"],
        perplexity=facts["perplexity"],
        passkey={name: found["grid"] for name, found in facts["passkey"].items()},
    )
    seconds = report.timings(benchmarks, list(trained.values()))
    cells = {
        name: {
            "changes": cell,
            "figures": {
                str(length): against_default(shown, name, length) for length in lengths(shown)
            },
            "tokens_seen": facts["train"][name]["tokens_seen"],
            "train_seconds": seconds.get(trained[name], {}).get("seconds"),
        }
        for name, cell in changes.items()
    }
    found = {
        "original_length": shown.original,
        "target_length": shown.target,
        "cells": cells,
        "seeds": spread(cells, shown),
    }
    return found | {"sentence": sentence(found)}


def lengths(shown: verdict.Figures) -> list[int]:
    """Return the original and the target length, once where they are the same."""
    return sorted({shown.original, shown.target})


def against_default(shown: verdict.Figures, name: str, length: int) -> dict:
    """Return a cell's figures at a length, and what they are against the default cell's."""
    facts = shown.perplexity[name]["lengths"].get(str(length))
    grid = shown.passkey[name].get(str(length))
    return {
        "perplexity": {key: facts[key] for key in ("value", "low", "high")} if facts else None,
        "perplexity_ratio": comparisons.perplexity_ratio(shown, name, DEFAULT, length),
        "passkey": verdict.pooled(grid) if grid else None,
        "passkey_difference": comparisons.passkey_difference(shown, name, DEFAULT, length),
    }


def spread(cells: dict[str, dict], shown: verdict.Figures) -> dict | None:
    """Return how far the seeds lie apart: by length, of perplexity and of the share of passkeys found.

    The default is one of them. ``deviation`` is the standard deviation of the sample (n − 1). None where
    the sweep has no other seed.
    """
    names = [name for name, cell in cells.items() if sweep_cells.is_of_seeds(cell["changes"])]
    if len(names) < 2:
        return None
    found: dict = {"cells": names}
    for length in map(str, lengths(shown)):
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
        f"At {found['target_length']:,} tokens, of {len(cells) - 1} cells beside the default "
        f"{len(lower)} have a significantly lower perplexity ({', '.join(lower) or 'none'}) and "
        f"{len(higher)} a higher one ({', '.join(higher) or 'none'})"
    )
    seeds = found["seeds"]
    if seeds and "perplexity" in seeds[at]:
        one = seeds[at]["perplexity"]
        text += (
            f"; over {len(seeds['cells'])} seeds of the default perplexity lies between "
            f"{significant(one['low'])} and {significant(one['high'])}, and a difference of that size "
            "may be one of seeds"
        )
    return f"{text}."


def page(found: dict, image: str) -> str:
    """Return the page: what was found in a sentence, the figure, the table, and how to read them."""
    at = [str(found["original_length"]), str(found["target_length"])]
    at = list(dict.fromkeys(at))
    head = ["cell"]
    for length in at:
        head += [f"perplexity at {int(length):,}", "times the default's", "passkeys", "points"]
    head += ["tokens trained", "training"]
    rows = [
        [
            f"`{name}`",
            *(word for length in at for word in words(cell["figures"][length])),
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
        "Bold differences are significant: their 95 % interval leaves out 1, or 0. Intervals of a figure and "
        "of a ratio are over held-out documents, of passkeys over keys, both of one training; "
        "none is corrected for the number of cells.",
    ]
    return "\n".join([*lines, *seeds_in_words(found), ""])


def words(figure: dict) -> list[str]:
    """Return four cells of the table: a perplexity, its ratio, passkeys found, and their difference."""
    value, ratio = figure["perplexity"], figure["perplexity_ratio"]
    found, difference = figure["passkey"], figure["passkey_difference"]
    return [
        f"{significant(value['value'])} ({between(value['low'], value['high'])})" if value else "",
        bold(ratio, significant) if ratio else "",
        f"{found['successes']} of {found['trials']} ({between(found['low'], found['high'], percent)})"
        if found
        else "",
        bold(difference, comparisons.points) if difference else "",
    ]


def bold(figure: dict, write) -> str:
    """Write a difference with its interval, in bold where it is significant."""
    stars = "**" if figure["significant"] else ""
    value = f"{stars}{write(figure['value'])}{stars}"
    return f"{value} ({between(figure['low'], figure['high'], write)})"


def seeds_in_words(found: dict) -> list[str]:
    """Return the lines on the spread of the seeds."""
    seeds = found["seeds"]
    if not seeds:
        return [
            "",
            "There are no cells that differ in seeds alone, so how much another seed changes is unknown.",
        ]
    lines = ["", f"Seeds of the default ({', '.join(f'`{name}`' for name in seeds['cells'])}):", ""]
    for length, kinds in seeds.items():
        if length == "cells":
            continue
        told = {"perplexity": significant, "passkey": percent}
        lines += [
            f"- {kind} at {int(length):,}: {between(one['low'], one['high'], told[kind])}, standard "
            f"deviation {told[kind](one['deviation'])}"
            for kind, one in kinds.items()
        ]
    return lines


def draw(found: dict, png: Path, svg: Path) -> None:
    """Draw each cell's ratio of perplexity and share of passkeys at the target, with intervals."""
    at, cells = str(found["target_length"]), found["cells"]
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.WIDTH * 1.3, 1.2 + 0.3 * len(cells)))
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, kind, share in ((left, "perplexity_ratio", False), (right, "passkey", True)):
            for place, cell in enumerate(cells.values()):
                if one := cell["figures"][at][kind]:
                    value = one["successes"] / one["trials"] if share else one["value"]
                    colour = figures.LIGHT["base" if cell["changes"] == {} else "trained"]
                    axes.plot([one["low"], one["high"]], [place] * 2, color=colour)
                    axes.plot([value], [place], color=colour, marker="o")
            axes.grid(axis="y", visible=False)
        left.axvline(1, color=figures.LIGHT["muted"], linewidth=1, linestyle=(0, (2, 2)))
        seeds = (found["seeds"] or {}).get(at, {}).get("perplexity")
        if seeds:
            own = cells[DEFAULT]["figures"][at]["perplexity"]["value"]
            ends = (seeds["low"] / own, seeds["high"] / own)
            left.axvspan(*ends, color=figures.LIGHT["yarn"], alpha=0.18, linewidth=0)
        left.set_yticks(range(len(cells)), list(cells))
        left.set_ylim(len(cells) - 0.5, -0.5)
        band = "; band: seeds" if seeds else ""
        left.set_xlabel(f"perplexity at {int(at):,}, times the default's{band}")
        right.set_xlabel(f"share of passkeys found at {int(at):,}")
        right.set_xlim(-0.03, 1.03)
        paper = {"facecolor": figures.LIGHT["paper"]}
        figure.savefig(png, dpi=160, metadata={"Software": None}, **paper)
        figure.savefig(svg, metadata={"Date": None, "Creator": None}, **paper)


if __name__ == "__main__":
    program(main)()
