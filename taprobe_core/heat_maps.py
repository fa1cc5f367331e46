"""Matrices to small PNG figures: heads over layers, sentences over sentences.

What does not belong here: computing what is drawn, and the style (`canvas`); the other figures are
in `plots`, which hands these on.

Invariant: equal input gives equal bytes, under `MAX_BYTES`; a value that is not defined is blank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from taprobe_core.canvas import encode_png, new_axes

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
        layers: the model's layer of each row, ascending.
        title: heading.

    Returns:
        PNG.
    """
    names = ("head", "layer (block output, from 0)", "kurtosis")
    return _map(kurtosis, names, title, rows=[str(layer) for layer in layers])


def attention_map(attention: NDArray[np.float64], *, y: str, title: str) -> bytes:
    """Draw the attention that later rows pay to earlier sentences, on a logarithmic scale.

    Args:
        attention: [query, sentence]; blank where it is not above 0.
        y: what a row stands for.
        title: heading.

    Returns:
        PNG.
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
