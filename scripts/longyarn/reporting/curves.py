"""Figures of perplexity: one curve for each variant, against a length or a position in tokens."""

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from longyarn.reporting.style import DASHES, HEIGHT, LIGHT, WIDTH, marker, tone
from longyarn.reporting.wording import significant


def perplexity(report: dict) -> Figure | None:
    """Draw perplexity against the window length, with intervals; None if it was not evaluated."""
    return by_length(report["perplexity"], report["rope"], WIDTH)


def truncate(report: dict) -> Figure | None:
    """Draw the perplexity of each document's first window against its length; None if not evaluated."""
    return by_length(report["perplexity_truncate"], report["rope"], WIDTH * 0.82)


def by_length(curves: dict[str, dict], rope: dict, width: float) -> Figure | None:
    """Draw each variant's perplexity over lengths in tokens; None if there are no ``curves``."""
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
    """Return the height in inches that leaves room for a label at the end of each curve."""
    return max(HEIGHT, 0.4 * len(curves))


def by_position(report: dict) -> Figure | None:
    """Draw perplexity against the position in the longest window; None if it was not evaluated."""
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
    """Draw one variant's curve with its intervals; return its end for ``label_ends``.

    ``points`` has the figures by key, ``places`` the x of each key.
    """
    at = sorted(points, key=int)
    x = [places[key] for key in at]
    values = [points[key]["value"] for key in at]
    low, high = ([points[key][end] for key in at] for end in ("low", "high"))
    color, trained = LIGHT[tone(variant, every_variant)], variant == "trained"
    axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
    axes.plot(
        x, values, color=color, marker=marker(variant, every_variant), linestyle=DASHES.get(variant, "-"),
        linewidth=2.6 if trained else 1.6, zorder=4 if trained else 3,
    )  # fmt: skip
    return values[-1], f"{variant} {significant(values[-1])}", color


def perplexity_axis(axes, curves: dict[str, dict]) -> None:
    """Make y an axis of perplexity, logarithmic if the figures are far apart."""
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
    """Mark the original and the target length on x if they lie between ``low`` and ``high``."""
    marks = {rope["target_length"]: "target", rope["original_length"]: "original length"}
    for length, name in marks.items():
        if low <= length <= high:
            axes.axvline(length, color=LIGHT["muted"], linewidth=1, linestyle=(0, (2, 2)), zorder=1)
            axes.annotate(
                name, (length, 1), (0, 4), xycoords=axes.get_xaxis_transform(), ha="center",
                textcoords="offset points", color=LIGHT["muted"], fontsize=9.5, annotation_clip=False,
            )  # fmt: skip


def label_ends(axes, ends: list[tuple[float, str, str]], gap: float = 0.075) -> None:
    """Write each curve's name and last value to the right of the axes.

    An end is (value, text, color). Labels are at least ``gap`` apart, as a share of the axes' height.
    """
    axes.figure.draw_without_rendering()
    to_share = axes.transScale + axes.transLimits
    ends = sorted(ends)
    own = [to_share.transform((1, value))[1] for value, _, _ in ends]
    places = spread(own, gap)
    for (_, text, color), start, place in zip(ends, own, places, strict=True):
        axes.plot(
            [1.0, 1.03], [start, place], transform=axes.transAxes, color=color, linewidth=0.8,
            clip_on=False,
        )  # fmt: skip
        axes.text(
            1.04, place, text, transform=axes.transAxes, va="center", color=color, fontsize=10.5,
            fontweight="bold" if text.startswith("trained") else "normal",
        )  # fmt: skip


def spread(places: list[float], gap: float) -> list[float]:
    """Return ascending places at least ``gap`` apart; each group keeps its mean."""
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
