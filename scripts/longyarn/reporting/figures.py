"""The report's figures, drawn from report.json alone: as SVG for the page, as PNG beside it.

In the SVG every colour is a CSS variable and every letter is text, so that the page's light and dark
modes and its typeface hold for the figures too. Both forms are the same, byte by byte, in every run.
"""

import io
import math
import re
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from longyarn.reporting.verdict import percent, pooled, significant

# The palette of Okabe and Ito, which colour-blind readers can tell apart; a variant keeps its colour.
LIGHT = {
    "paper": "#fffffe", "ink": "#1d2329", "muted": "#68727d", "grid": "#e3e7eb", "idle": "#c9d0d7",
    "base": "#6f7780", "linear": "#e69f00", "ntk": "#009e73", "yarn": "#cc79a7", "trained": "#0072b2",
    "sky": "#56b4e9", "vermilion": "#d55e00", "violet": "#7b52ab", "umber": "#8a5a2b",
}  # fmt: skip
DARK = LIGHT | {
    "paper": "#14181c", "ink": "#e8ebee", "muted": "#9aa5b0", "grid": "#2c343c", "idle": "#4a5560",
    "base": "#a3adb8", "trained": "#3d9ddb", "sky": "#a6d9f5", "violet": "#b08ee0", "umber": "#c99460",
}  # fmt: skip

MARKERS = {"base": "o", "linear": "v", "ntk": "^", "yarn": "D", "trained": "s"}
DASHES = {
    "base": (0, (5, 2)),
    "linear": (0, (1, 1.5)),
    "ntk": (0, (4, 1, 1, 1)),
    "yarn": (0, (3, 1)),
}
# Of variants that the config defines, in their order.
MORE_TONES = ("vermilion", "violet", "umber", "sky")
MORE_MARKERS = ("P", "X", "*", "<", ">", "h")
PANELS = 5  # of passkey, side by side

WIDTH, HEIGHT = 6.9, 3.9  # inches; a point is a unit of the SVG, 72 to the inch
STYLE = {
    "axes.edgecolor": LIGHT["muted"],
    "axes.grid": True,
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlesize": 11.5,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "longyarn",
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "xtick.labelcolor": LIGHT["ink"],
    "ytick.color": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["ink"],
}


def write(report: dict, directory: Path) -> dict[str, object]:
    """Draw all figures; write each as PNG into ``directory`` and return each as inline SVG by name.

    ``passkey`` is a dictionary of one SVG a variant, so that a page can flow them; its PNG has all.
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


def tone(variant: str, variants: Iterable[str]) -> str:
    """Return the name of a variant's colour: its own, or one by its place among those without."""
    if variant in MARKERS:
        return variant
    return MORE_TONES[_place(variant, variants) % len(MORE_TONES)]


def marker(variant: str, variants: Iterable[str]) -> str:
    """Return a variant's marker, chosen as its colour is."""
    if variant in MARKERS:
        return MARKERS[variant]
    return MORE_MARKERS[_place(variant, variants) % len(MORE_MARKERS)]


def _place(variant: str, variants: Iterable[str]) -> int:
    return [name for name in variants if name not in MARKERS].index(variant)


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element to stand in a page: no prolog, own ids, the page's colours."""
    buffer = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: (?:\w+ )?([\d.]+)px [^;\"]+", r"font-size: \1px", text)
    for variable, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.strip()


def perplexity(report: dict) -> Figure | None:
    """Draw perplexity against window length, with intervals; None where there is none."""
    return by_length(report["perplexity"], report["rope"], WIDTH)


def truncate(report: dict) -> Figure | None:
    """Draw perplexity of each document's first window against its length; None where there is none."""
    return by_length(report["perplexity_truncate"], report["rope"], WIDTH * 0.82)


def by_length(curves: dict[str, dict], rope: dict, width: float) -> Figure | None:
    """Draw a curve of perplexity for each variant over lengths in tokens; None where there is none."""
    if not curves:
        return None
    height = height_for(curves)
    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    lengths = sorted({int(length) for points in curves.values() for length in points})
    places = {str(length): length for length in lengths}
    ends = [
        draw_curve(axes, variant, points, places, rope["variants"])
        for variant, points in curves.items()
    ]
    perplexity_axis(axes, curves)
    length_axis(axes, lengths, rope)
    label_ends(axes, ends, gap=0.075 * HEIGHT / height)
    return figure


def height_for(curves: dict) -> float:
    """Return the height in inches of a drawing with a label beside each curve's end."""
    return max(HEIGHT, 0.4 * len(curves))


def by_position(report: dict) -> Figure | None:
    """Draw perplexity against the position in the longest window; None where there is none."""
    curves = report["perplexity_by_position"]
    if not curves:
        return None
    height = height_for(curves)
    figure = Figure(figsize=(WIDTH * 0.82, height))
    axes = figure.add_subplot()
    parts = sorted(map(int, next(iter(curves.values()))))
    places = {
        str(end): (begin + end) / 2 for begin, end in zip([0, *parts[:-1]], parts, strict=True)
    }
    variants = report["rope"]["variants"]
    ends = [
        draw_curve(axes, variant, points, places, variants) for variant, points in curves.items()
    ]
    perplexity_axis(axes, curves)
    axes.set_xlim(0, parts[-1])
    axes.xaxis.set_major_locator(FixedLocator([parts[-1] * part / 4 for part in range(5)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("position in the window, tokens")
    axes.grid(axis="x", visible=False)
    mark_lengths(axes, 0, parts[-1], report["rope"])
    label_ends(axes, ends, gap=0.075 * HEIGHT / height)
    return figure


def draw_curve(
    axes, variant: str, points: dict, places: dict, every_variant: dict
) -> tuple[float, str, str]:
    """Draw a variant's figures at their places, with intervals; return its end for ``label_ends``."""
    at = sorted(points, key=int)
    x = [places[key] for key in at]
    values = [points[key]["value"] for key in at]
    low, high = ([points[key][end] for key in at] for end in ("low", "high"))
    colour, trained = LIGHT[tone(variant, every_variant)], variant == "trained"
    axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(
        x, values, color=colour, marker=marker(variant, every_variant), linestyle=DASHES.get(variant, "-"),
        linewidth=2.6 if trained else 1.6, zorder=4 if trained else 3,
    )  # fmt: skip
    return values[-1], f"{variant} {significant(values[-1])}", colour


def perplexity_axis(axes, curves: dict[str, dict]) -> None:
    """Make y an axis of perplexity, logarithmic where the figures are far apart."""
    every = [
        point[key]
        for points in curves.values()
        for point in points.values()
        for key in ("low", "high")
    ]
    if max(every) > 4 * min(every):
        axes.set_yscale("log")
        close = max(every) < 40 * min(every)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if close else (1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.set_ylabel("perplexity")


def length_axis(axes, lengths: list[int], rope: dict) -> None:
    """Make x a log-2 axis of lengths in tokens, with the original and the target length marked."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 1.12, lengths[-1] * 1.12)
    ticks = lengths if len(lengths) <= 8 else [n for n in lengths if n & (n - 1) == 0]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("window length, tokens")
    axes.grid(axis="x", visible=False)
    mark_lengths(axes, lengths[0], lengths[-1], rope)


def mark_lengths(axes, low: int, high: int, rope: dict) -> None:
    """Mark the original and the target length on x where they lie between ``low`` and ``high``."""
    marks = {rope["target_length"]: "target", rope["original_length"]: "original length"}
    for length, name in marks.items():
        if low <= length <= high:
            axes.axvline(length, color=LIGHT["muted"], linewidth=1, linestyle=(0, (2, 2)), zorder=1)
            axes.annotate(
                name, (length, 1), (0, 4), xycoords=axes.get_xaxis_transform(), ha="center",
                textcoords="offset points", color=LIGHT["muted"], fontsize=9.5, annotation_clip=False,
            )  # fmt: skip


def label_ends(axes, ends: list[tuple[float, str, str]], gap: float = 0.075) -> None:
    """Write each curve's name and last value to the right of the axes, pushed apart by ``gap``."""
    axes.figure.draw_without_rendering()
    to_share = axes.transScale + axes.transLimits
    ends = sorted(ends)
    own = [to_share.transform((1, value))[1] for value, _, _ in ends]
    places = spread(own, gap)
    for (_, text, colour), start, place in zip(ends, own, places, strict=True):
        axes.plot(
            [1.0, 1.03], [start, place], transform=axes.transAxes, color=colour, linewidth=0.8,
            clip_on=False,
        )  # fmt: skip
        axes.text(
            1.04, place, text, transform=axes.transAxes, va="center", color=colour, fontsize=10.5,
            fontweight="bold" if text.startswith("trained") else "normal",
        )  # fmt: skip


def spread(places: list[float], gap: float) -> list[float]:
    """Return ascending places at least ``gap`` apart, each group centred on where it was."""
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _bottom(groups[-1], gap) < _top(groups[-2], gap) + gap:
            last = groups.pop()
            groups[-1] += last
    return [_bottom(group, gap) + gap * i for group in groups for i in range(len(group))]


def _bottom(group: list[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: list[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2


def passkey(report: dict, variants: list[str] | None = None) -> Figure | None:
    """Draw retrieval over depth and length, one panel a variant, successes written in the cells.

    At most ``PANELS`` stand side by side.
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
        colour = LIGHT[tone(variant, report["rope"]["variants"])]
        grid, original = report["passkey"][variant], report["rope"]["original_length"]
        passkey_panel(axes, variant, grid, original, colour)
    return panels[0].figure


def passkey_panel(axes, variant: str, grid: dict, original: int, colour: str) -> None:
    """Draw one variant's cells: the deeper the colour, the more keys were found."""
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
    axes.set_title(f"{variant}: {share}", loc="left", color=colour, fontweight="bold")
    axes.set_xlabel("prompt length, tokens", fontsize=9.5, labelpad=2)
    axes.set_ylabel("depth of the key", fontsize=9.5, labelpad=2)


def short(length: int) -> str:
    """Write a length briefly: 32768 as 32k."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def loss(report: dict) -> Figure | None:
    """Draw the training loss against the step; None where none was recorded."""
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
    """Draw each pair's wavelength before and after, with both lengths and YaRN's ramp marked."""
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
    label_ends(
        axes, [(before[-1], "before", LIGHT["base"]), (after[-1], "after", LIGHT["trained"])]
    )
    return figure


def mix(report: dict) -> Figure:
    """Draw where the corpus's tokens went, and what the packed sequences are made of."""
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
        (name, count, colour)
        for (name, count), colour in zip(facts["short_tokens"].items(), ("sky", "ntk"), strict=True)
    ]
    figure = Figure(figsize=(WIDTH, 3))
    figure.get_layout_engine().set(hspace=0.16)
    upper, lower = figure.subplots(2, 1)
    bar(upper, "the corpus", corpus)
    bar(lower, "packed for training", packed)
    return figure


def bar(axes, title: str, parts: list[tuple[str, int, str]]) -> None:
    """Draw one stacked bar with its legend; a part is (name, tokens, colour)."""
    total, left = sum(count for _, count, _ in parts) or 1, 0
    for name, count, colour in parts:
        label = f"{name} {percent(count / total)}"
        axes.barh(0, count, left=left, height=1, color=LIGHT[colour], edgecolor="none", label=label)
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
    "perplexity": perplexity,
    "by_position": by_position,
    "truncate": truncate,
    "passkey": passkey,
    "loss": loss,
    "rope": rope,
    "mix": mix,
}
