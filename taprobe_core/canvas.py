"""An empty figure in the project's style, and its PNG.

Drawn with matplotlib's object interface on the Agg canvas: no pyplot, no global state, so figures
can be drawn from several threads and never open a window. What does not belong here: what is drawn
(`plots`).

Invariant: equal figures give equal bytes, under `MAX_BYTES`. Colours are Okabe and Ito's (2008),
told apart by colour-blind readers.
"""

from __future__ import annotations

import base64
import io
from functools import cache

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from PIL import Image

MAX_BYTES = 40_000
"""Upper size of one figure: a report with twenty stays under a megabyte."""

BLUE, RED, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
COLOURS = (BLUE, RED, GREEN, "#CC79A7", ORANGE, "#56B4E9")
INK, GREY = "#222222", "#6b6b6b"

_GRID = "#e4e4e4"
_DPI = 144
_ENCODINGS = ((64, 1.0), (16, 1.0), (16, 0.75), (8, 0.5))
_LONG_NAME = 44
LONGEST_TITLE, LONGEST_NAME = 90, 52
"""Characters that fit the width of a figure, and beside the axes."""


def to_data_uri(png: bytes) -> str:
    """Return a PNG as a data URI that an `img` tag can hold."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def new_axes(title: str, x: str, y: str, height: float = 2.9) -> tuple[Figure, Axes]:
    """Return a figure with one empty pair of axes.

    Args:
        title: heading, at the left edge of the figure.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        height: inches; the width is 6.6.
    """
    figure = Figure(figsize=(6.6, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    figure.suptitle(plain(title), fontsize=9.5, color=INK, x=0.01, ha="left")
    axes.set_xlabel(plain(x), fontsize=9, color=INK)
    axes.set_ylabel(plain(y), fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plain(text: str, longest: int = LONGEST_TITLE) -> str:
    """Keep matplotlib from reading formulas in names, draw what its font holds, cut what is long.

    Args:
        text: a name or a heading.
        longest: characters kept; the last one becomes an ellipsis where more are given.
    """
    held = _glyphs()
    drawn = "".join(char if ord(char) in held else "\ufffd" for char in text)
    cut = drawn if len(drawn) <= longest else f"{drawn[: longest - 1]}…"
    return cut.replace("$", r"\$")


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def legend_beside(axes: Axes) -> None:
    """Put the legend at the right of the axes, if anything has a label.

    Args:
        axes: where lines or bars were drawn.
    """
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02))


def bar_height(n_bars: int) -> float:
    """Return the height in inches of a figure with horizontal bars.

    Args:
        n_bars: how many.
    """
    return 1.0 + 0.3 * max(n_bars, 2)


def name_bars(axes: Axes, names: list[str]) -> None:
    """Name horizontal bars at 0, 1, ... from the top; a long name breaks at its first " · ".

    Args:
        axes: where the bars were drawn.
        names: one per bar.
    """
    axes.set_yticks(range(len(names)), [_broken(name) for name in names])
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def encode_png(figure: Figure) -> bytes:
    """Draw a figure and encode it.

    Args:
        figure: from `new_axes`.

    Returns:
        PNG of at most `MAX_BYTES`: fewer colours, then fewer pixels, where it is crowded.
    """
    raw = io.BytesIO()
    figure.savefig(raw, format="rgba", dpi=_DPI)
    size = figure.canvas.get_width_height()
    pixels = Image.frombytes("RGBA", size, raw.getvalue()).convert("RGB")
    # A palette keeps the text sharp at a third of the bytes; only crowded figures need the rest.
    for n_colours, scale in _ENCODINGS:
        scaled = pixels.resize((int(size[0] * scale), int(size[1] * scale)))
        small = scaled.quantize(n_colours, dither=Image.Dither.NONE)
        out = io.BytesIO()
        small.save(out, format="PNG", optimize=True)
        if out.tell() <= MAX_BYTES:
            break
    return out.getvalue()


def _broken(name: str) -> str:
    head, joint, rest = name.partition(" · ")
    lines = (head, rest) if joint and len(name) > _LONG_NAME else (name,)
    return "\n".join(plain(line, LONGEST_NAME) for line in lines)
