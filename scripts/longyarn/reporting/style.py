"""Colors, markers and typeface of the report's figures, and the inline SVG made of one.

In the SVG every color is a CSS variable and every letter is text, so the page's light and dark modes and its
typeface apply to the figures too.
"""

import io
import re
from collections.abc import Iterable

from matplotlib.figure import Figure

# The palette of Okabe and Ito, which color-blind readers can tell apart.
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
# For variants that the config defines, in their order.
MORE_TONES = ("vermilion", "violet", "umber", "sky")
MORE_MARKERS = ("P", "X", "*", "<", ">", "h")

WIDTH, HEIGHT = 6.9, 3.9  # inches, of 72 SVG units each
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


def tone(variant: str, variants: Iterable[str]) -> str:
    """Return the name of a variant's color: a fixed one, or one by its place among ``variants``."""
    if variant in MARKERS:
        return variant
    return MORE_TONES[_place(variant, variants) % len(MORE_TONES)]


def marker(variant: str, variants: Iterable[str]) -> str:
    """Return a variant's marker, chosen in the same way as its color."""
    if variant in MARKERS:
        return MARKERS[variant]
    return MORE_MARKERS[_place(variant, variants) % len(MORE_MARKERS)]


def _place(variant: str, variants: Iterable[str]) -> int:
    return [name for name in variants if name not in MARKERS].index(variant)


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element to embed in a page.

    It has no prolog, its ids start with ``name``, and its colors are the page's CSS variables.
    """
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
    for variable, color in LIGHT.items():
        text = text.replace(color, f"var(--{variable})")
    return text.strip()
