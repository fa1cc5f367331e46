"""Small figures in the project's style: empty axes, their PNG, heat maps; text made safe to read.

Drawn with matplotlib's object interface on the Agg canvas: no pyplot, no global state, so figures
can be drawn from several threads and never open a window. Heat maps show matrices: heads over
layers, sentences over sentences. Controls, bidirectional overrides and other format characters act
on a display, where they reorder or hide what stands beside them; `visible` shows them instead.

What does not belong here: computing what is drawn, the other figures (`plots`), and escaping
markup, which the template does.

Invariants: equal figures give equal bytes, under `MAX_BYTES`; a value that is not defined is blank.
What `visible` returns holds no character of the categories Cc (newline and tab apart) and Cs, and
no directional override. Colours are Okabe and Ito's (2008), told apart by colour-blind readers.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image


def visible(text: str) -> str:
    """Replace characters that act on a display instead of being shown.

    Args:
        text: any text.

    Returns:
        C0 controls as their pictures (U+2400 on; newline and tab stay), C1 controls, bidirectional
        and other format characters, and lone surrogates as U+FFFD.
    """
    return text.translate(_SYMBOLS)


_FORMAT_CODES = (
    *(0xAD, 0x61C, 0x200B, 0x200E, 0x200F),
    *(*range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFC)),
)
_SYMBOLS: Mapping[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A)},
    0x7F: "\u2421",
    **dict.fromkeys((*range(0x80, 0xA0), *_FORMAT_CODES), "\ufffd"),
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),
}


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
    """Return a figure with one empty pair of axes."""
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
    """Keep matplotlib from reading formulas in names; draw what its font holds; cut the rest."""
    held = _glyphs()
    drawn = "".join(char if ord(char) in held else "\ufffd" for char in text)
    cut = drawn if len(drawn) <= longest else f"{drawn[: longest - 1]}…"
    return cut.replace("$", r"\$")


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def legend_beside(axes: Axes) -> None:
    """Put the legend at the right of the axes, if anything has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02))


def bar_height(n_bars: int) -> float:
    """Return the height in inches of a figure with horizontal bars."""
    return 1.0 + 0.3 * max(n_bars, 2)


def name_bars(axes: Axes, names: list[str]) -> None:
    """Name horizontal bars at 0, 1, ... from the top; a long name breaks at its first " · "."""
    axes.set_yticks(range(len(names)), [_broken(name) for name in names])
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def encode_png(figure: Figure) -> bytes:
    """Draw a figure and encode it."""
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


_COLOURS = "viridis"
_N_COLOURS = 12
"""Few enough that the palette of the PNG holds each of them, so that map and scale agree."""
_BLANK = "#f2f2f2"
_HEIGHT = 3.6
_NO_SPREAD = 1e-9
_FAINTEST = 0.05
"""Quantile of a matrix's values that gets the first colour; attention fades over many decades."""


def kurtosis_map(kurtosis: NDArray[np.float64], layers: Sequence[int], *, title: str) -> bytes:
    """Draw the kurtosis of every head, one row a layer.

    Args:
        kurtosis: [layer, head]; not finite where undefined.
    """
    names = ("head", "layer (block output, from 0)", "kurtosis")
    return _map(kurtosis, names, title, rows=[str(layer) for layer in layers])


def attention_map(attention: NDArray[np.float64], *, y: str, title: str) -> bytes:
    """Draw the attention that later rows pay to earlier sentences, on a logarithmic scale.

    Args:
        attention: [query, sentence]; blank where it is not above 0.
    """
    log = np.full(attention.shape, np.nan)
    np.log10(attention, out=log, where=attention > 0)
    return _map(log, ("sentence looked back at", y, "log10 of mean attention"), title, _FAINTEST)


def _map(
    values: NDArray[np.float64],
    names: tuple[str, str, str],
    title: str,
    faintest: float = 0.0,
    rows: Sequence[str] | None = None,
) -> bytes:
    x, y, scale = names
    finite = values[np.isfinite(values)]
    low, high = np.quantile(finite, (faintest, 1.0)) if finite.size else (0.0, 1.0)
    figure, axes = new_axes(title, x, y, height=_HEIGHT)
    colours = colormaps[_COLOURS].resampled(_N_COLOURS).with_extremes(bad=_BLANK)
    image = axes.imshow(
        values,
        norm=Normalize(low, max(high, low + _NO_SPREAD)),
        cmap=colours,
        aspect="auto",
        interpolation="nearest",
    )
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if rows is not None:
        shown = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 9)).round().astype(int))
        axes.set_yticks(shown, [rows[at] for at in shown])
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(scale, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return encode_png(figure)
