"""Compare the cells of a sweep with the run itself: a table, and a figure of what each change does.

    R=results/micro C=$R/cells/training.steps=50
    python scripts/sweep.py --rope $R/rope/yarn.json --cells '[{}, {"training.steps": 50}]' \\
        --train $R/trained.json $C/trained.json \\
        --perplexity $R/perplexity/trained.json $C/perplexity/trained.json \\
        --passkey $R/passkey/trained.json $C/passkey/trained.json --benchmarks $R/benchmarks \\
        --json $R/sweep.json --page $R/sweep.md --png $R/sweep.png --svg $R/sweep.svg

docs/sweeps.md describes the table and the keys of the JSON.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from longyarn.core import job_record, manifest
from longyarn.core.errors import UserError, program
from longyarn.core.files import write_json, write_text
from longyarn.reporting import style
from longyarn.reporting.sweep_table import DEFAULT, assemble, name_of, page
from longyarn.rope.record import RopeRecord
from longyarn.stages import PASSKEY, PERPLEXITY, TRAIN

STAGES = (TRAIN.name, PERPLEXITY.name, PASSKEY.name)


def main() -> None:
    arguments = read_arguments()
    if len(arguments.cells) < 2:
        raise UserError(
            "sweep.factors has nothing that differs from the configuration; add other values"
        )
    changes = {name_of(cell): cell for cell in arguments.cells}
    facts = {
        stage: dict(zip(changes, map(manifest.read_facts, getattr(arguments, stage)), strict=True))
        for stage in STAGES
    }
    found = assemble(changes, RopeRecord.read(arguments.rope), facts, arguments.benchmarks)
    job_record.write_environment(arguments.json)
    write_json(arguments.json, found)
    write_text(arguments.page, page(found, arguments.png.name))
    draw(found, arguments.png, arguments.svg)
    print(found["sentence"], file=sys.stderr)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rope", type=Path, required=True, help="RoPE manifest of the run itself")
    parser.add_argument(
        "--cells", type=json.loads, required=True, help="the changes of each cell, as JSON"
    )
    for name in STAGES:
        parser.add_argument(
            f"--{name}", type=Path, nargs="+", required=True, help="one manifest per cell, in order"
        )
    parser.add_argument("--benchmarks", type=Path, required=True, help="directory of job timings")
    parser.add_argument("--json", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--page", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--png", type=Path, required=True, help="figure to write")
    parser.add_argument("--svg", type=Path, required=True, help="the same figure as SVG")
    return parser.parse_args()


def draw(found: dict, png: Path, svg: Path) -> None:
    """Draw each cell's perplexity ratio and share of passkeys at the target length, with intervals."""
    at, cells = str(found["target_length"]), found["cells"]
    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(style.WIDTH * 1.3, 1.2 + 0.3 * len(cells)))
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, kind in ((left, "perplexity_ratio"), (right, "passkey")):
            for place, cell in enumerate(cells.values()):
                color = style.LIGHT["base" if cell["changes"] == {} else "trained"]
                draw_interval(axes, place, cell["figures"][at][kind], color)
            axes.grid(axis="y", visible=False)
        left.axvline(1, color=style.LIGHT["muted"], linewidth=1, linestyle=(0, (2, 2)))
        seeds = (found["seeds"] or {}).get(at, {}).get("perplexity")
        if seeds:
            own = cells[DEFAULT]["figures"][at]["perplexity"]["value"]
            ends = (seeds["low"] / own, seeds["high"] / own)
            left.axvspan(*ends, color=style.LIGHT["yarn"], alpha=0.18, linewidth=0)
        left.set_yticks(range(len(cells)), list(cells))
        left.set_ylim(len(cells) - 0.5, -0.5)
        band = "; band: seeds" if seeds else ""
        left.set_xlabel(f"perplexity at {int(at):,}, times the default's{band}")
        right.set_xlabel(f"share of passkeys found at {int(at):,}")
        right.set_xlim(-0.03, 1.03)
        paper = {"facecolor": style.LIGHT["paper"]}
        figure.savefig(png, dpi=160, metadata={"Software": None}, **paper)
        figure.savefig(svg, metadata={"Date": None, "Creator": None}, **paper)


def draw_interval(axes, place: int, figure: dict | None, color: str) -> None:
    """Draw a ratio or a share with its interval on the line ``place``; nothing if not evaluated."""
    if not figure:
        return
    value = figure["value"] if "value" in figure else figure["successes"] / figure["trials"]
    axes.plot([figure["low"], figure["high"]], [place] * 2, color=color)
    axes.plot([value], [place], color=color, marker="o")


if __name__ == "__main__":
    program(main)()
