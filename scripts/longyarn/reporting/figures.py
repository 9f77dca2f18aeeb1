"""All figures of the report, drawn from report.json alone: as SVG for the page and as PNG beside it.

Both are the same, byte for byte, in every run.
"""

import math
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter

from longyarn.reporting import curves
from longyarn.reporting.results import pooled
from longyarn.reporting.style import DASHES, HEIGHT, LIGHT, STYLE, WIDTH, svg, tone
from longyarn.reporting.wording import percent

PANELS = 5  # of passkey, side by side


def write(report: dict, directory: Path) -> dict[str, object]:
    """Draw all figures; write each as PNG into ``directory`` and return each as inline SVG by name.

    ``passkey`` is a dictionary with one SVG for each variant, which the page arranges; its PNG has all.
    """
    with matplotlib.rc_context(STYLE):
        drawn = {name: draw(report) for name, draw in DRAWINGS.items()}
        for name, figure in drawn.items():
            if figure is not None:
                figure.savefig(
                    directory / f"{name}.png", dpi=160, facecolor=LIGHT["paper"],
                    metadata={"Software": None},
                )  # fmt: skip
        images = {
            name: svg(figure, name)
            for name, figure in drawn.items()
            if figure and name != "passkey"
        }
        images["passkey"] = {
            variant: svg(passkey(report, [variant]), f"passkey-{variant}")
            for variant in report["passkey"]
        }
    return images


def passkey(report: dict, variants: list[str] | None = None) -> Figure | None:
    """Draw passkey retrieval over depth and length, with one panel for each variant.

    At most ``PANELS`` panels are side by side. Each cell shows its number of successes.
    """
    variants = list(report["passkey"]) if variants is None else variants
    if not variants:
        return None
    columns = max(len(report["passkey"][variant]) for variant in variants)
    rows = max(
        len(depths) for variant in variants for depths in report["passkey"][variant].values()
    )
    across = min(len(variants), PANELS)
    down = math.ceil(len(variants) / across)
    size = (across * (0.62 + 0.42 * columns), down * (0.8 + 0.32 * rows))
    panels = list(Figure(figsize=size).subplots(down, across, squeeze=False).flat)
    for axes in panels[len(variants) :]:
        axes.set_axis_off()
    for axes, variant in zip(panels, variants, strict=False):
        color = LIGHT[tone(variant, report["rope"]["variants"])]
        grid, original = report["passkey"][variant], report["rope"]["original_length"]
        passkey_panel(axes, variant, grid, original, color)
    return panels[0].figure


def passkey_panel(axes, variant: str, grid: dict, original: int, color: str) -> None:
    """Draw one variant's cells: the deeper the color, the more keys were found."""
    lengths = sorted(grid, key=int)
    depths = sorted({depth for cells in grid.values() for depth in cells}, key=float)
    for x, length in enumerate(lengths):
        for depth, cell in grid[length].items():
            y, share = depths.index(depth), cell["successes"] / cell["trials"]
            box = (x - 0.47, y - 0.46), 0.94, 0.92
            axes.add_patch(Rectangle(*box, facecolor=LIGHT["trained"], alpha=share, linewidth=0))
            axes.add_patch(Rectangle(*box, fill=False, edgecolor=LIGHT["grid"], linewidth=0.8))
            axes.text(
                x, y, str(cell["successes"]), ha="center", va="center", fontsize=10,
                color=LIGHT["paper"] if share > 0.6 else LIGHT["ink"],
            )  # fmt: skip
    within = sum(int(length) <= original for length in lengths)
    if 0 < within < len(lengths):
        axes.axvline(within - 0.5, color=LIGHT["muted"], linewidth=1.2, linestyle=(0, (2, 2)))
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(depths) - 0.5, -0.5)
    axes.set_xticks(range(len(lengths)), [short(int(length)) for length in lengths])
    axes.set_yticks(range(len(depths)), depths)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    total = pooled({(x, y): cell for x, row in grid.items() for y, cell in row.items()})
    share = percent(total["successes"] / total["trials"])
    axes.set_title(f"{variant}: {share}", loc="left", color=color, fontweight="bold")
    axes.set_xlabel("prompt length, tokens", fontsize=9.5, labelpad=2)
    axes.set_ylabel("depth of the key", fontsize=9.5, labelpad=2)


def short(length: int) -> str:
    """Write a length in short form: 32768 as 32k."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def loss(report: dict) -> Figure | None:
    """Draw the training loss against the step; None if no loss was recorded."""
    history = report["training"]["loss"]
    if not history:
        return None
    figure = Figure(figsize=(WIDTH * 0.82, HEIGHT))
    axes = figure.add_subplot()
    steps, losses = zip(*history, strict=True)
    dots = "o" if len(steps) <= 40 else None
    axes.plot(steps, losses, color=LIGHT["trained"], linewidth=2, marker=dots, markersize=4)
    axes.set_xlim(0, max(steps) * 1.02)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats a token")
    axes.grid(axis="x", visible=False)
    return figure


def rope(report: dict) -> Figure:
    """Draw the wavelength of each pair of dimensions before and after, with both lengths and the ramp."""
    settings = report["rope"]
    variant = settings["variants"][settings["trained"]]
    before = [2 * math.pi / f for f in variant["base_inverse_frequencies"]]
    after = [2 * math.pi / f for f in variant["inverse_frequencies"]]
    figure = Figure(figsize=(WIDTH * 0.82, HEIGHT))
    axes = figure.add_subplot()
    if variant["ramp_limits"]:
        axes.axvspan(*variant["ramp_limits"], color=LIGHT["yarn"], alpha=0.14, linewidth=0)
        axes.annotate(
            "ramp", (sum(variant["ramp_limits"]) / 2, 1), (0, 4), ha="center", annotation_clip=False,
            xycoords=axes.get_xaxis_transform(), textcoords="offset points",
            color=LIGHT["muted"], fontsize=9.5,
        )  # fmt: skip
    size = 5 if len(before) <= 32 else 3
    axes.plot(before, color=LIGHT["base"], marker="o", markersize=size, linestyle=DASHES["base"])
    axes.plot(after, color=LIGHT["trained"], marker="s", markersize=size, linewidth=2)
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(-0.5, len(before) - 0.5)
    lengths = {"original": settings["original_length"], "target": settings["target_length"]}
    for name, length in lengths.items():
        if name == "target" and length == settings["original_length"]:
            continue
        axes.axhline(length, color=LIGHT["muted"], linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate(
            f"{name} {length:,}", (0, length), (4, 3), xycoords=axes.get_yaxis_transform(),
            textcoords="offset points", color=LIGHT["muted"], fontsize=9.5,
        )  # fmt: skip
    axes.set_xlabel("pair of dimensions, fastest first")
    axes.set_ylabel("wavelength, tokens")
    curves.label_ends(
        axes, [(before[-1], "before", LIGHT["base"]), (after[-1], "after", LIGHT["trained"])]
    )
    return figure


def mix(report: dict) -> Figure:
    """Draw where the tokens of the corpus went, and what the packed sequences consist of."""
    facts = report["mix"]
    corpus = [
        ("packed for training", facts["tokens_packed"], "trained"),
        ("unused by the mix", facts["unused_by_the_mix"], "idle"),
        ("tails dropped", facts["tails_dropped"], "vermilion"),
        ("held out", facts["held_out"], "linear"),
    ]
    if facts["duplicates"]:
        corpus.append(("duplicates dropped", facts["duplicates"], "yarn"))
    packed = [("long windows", facts["long_tokens"], "trained")]
    packed += [
        (name, count, color)
        for (name, count), color in zip(facts["short_tokens"].items(), ("sky", "ntk"), strict=True)
    ]
    figure = Figure(figsize=(WIDTH, 3))
    figure.get_layout_engine().set(hspace=0.16)
    upper, lower = figure.subplots(2, 1)
    bar(upper, "the corpus", corpus)
    bar(lower, "packed for training", packed)
    return figure


def bar(axes, title: str, parts: list[tuple[str, int, str]]) -> None:
    """Draw one stacked bar with its legend; a part is (name, tokens, color)."""
    total, left = sum(count for _, count, _ in parts) or 1, 0
    for name, count, color in parts:
        label = f"{name} {percent(count / total)}"
        axes.barh(0, count, left=left, height=1, color=LIGHT[color], edgecolor="none", label=label)
        left += count
    axes.set_xlim(0, total)
    axes.set_ylim(-0.5, 0.5)
    axes.set_axis_off()
    axes.set_title(f"{title}, {total:,} tokens", loc="left")
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, -0.08), ncols=2, frameon=False, borderpad=0,
        handlelength=1, handleheight=1, handletextpad=0.5, columnspacing=1.6, borderaxespad=0,
    )  # fmt: skip


DRAWINGS = {
    "perplexity": curves.perplexity,
    "by_position": curves.by_position,
    "truncate": curves.truncate,
    "passkey": passkey,
    "loss": loss,
    "rope": rope,
    "mix": mix,
}
