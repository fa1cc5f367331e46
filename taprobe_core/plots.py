"""Tables and arrays to small PNG figures, for reports and for metadata beside an asset.

Drawn with matplotlib's object interface on the Agg canvas: no pyplot, no global state, so figures
can be drawn from several threads and never open a window. What does not belong here: computing
what is drawn.

Invariant: equal input gives equal bytes, under `MAX_BYTES`. Colours are Okabe and Ito's (2008),
told apart by colour-blind readers; lines differ by marker too.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

MAX_BYTES = 40_000
"""Upper size of one figure: a report with twenty stays under a megabyte."""

_BLUE, _RED, _GREEN, _ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
_COLOURS = (_BLUE, _RED, _GREEN, "#CC79A7", _ORANGE, "#56B4E9")
_MARKERS = "osD^vP"
_DASHES = ("--", ":", "-.", (0, (5, 1)))
_INK, _GREY, _GRID = "#222222", "#6b6b6b", "#e4e4e4"
_DPI = 144
_ENCODINGS = ((64, 1.0), (16, 1.0), (16, 0.75), (8, 0.5))
_N_POSITION_BINS = 20
_MAX_LENGTH_BINS = 50
_MAX_BARS = 20


def metric_by_layer(
    rows: pl.DataFrame, *, metric: str, levels: Mapping[str, float | None], title: str
) -> bytes:
    """Draw a metric over layers: one line per recipe, levels as horizontal lines.

    Args:
        rows: recipe, layer, value (null where undefined).
        metric: label of the value axis.
        levels: name -> value, such as the baselines and chance; null ones are left out.
        title: heading.

    Returns:
        PNG.
    """
    figure, axes = _canvas(title, "layer (block output, from 0)", metric)
    drawn = {name: value for name, value in levels.items() if value is not None}
    for index, (name, level) in enumerate(drawn.items()):
        dash = _DASHES[index % len(_DASHES)]
        axes.axhline(level, color=_GREY, linestyle=dash, linewidth=1.3, label=name, zorder=2)
    lines = rows.sort("recipe", "layer").group_by("recipe", maintain_order=True)
    for index, ((recipe,), line) in enumerate(lines):
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        value = line["value"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        axes.plot(
            line["layer"].to_numpy(), value, color=colour, marker=marker, ms=4.5, label=recipe
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # From zero where nothing is negative, so that small differences look small.
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _legend_beside(axes)
    return _png(figure)


def importance_by_position(labels: pl.DataFrame, *, title: str) -> bytes:
    """Draw mean absolute importance and anchor share along the trace, in 20 bins.

    Args:
        labels: `tables.LABELS`; position is sentence_idx / (n_sentences - 1).
        title: heading.

    Returns:
        PNG.
    """
    last = (pl.col("n_sentences") - 1).clip(1)
    bins = (pl.col("sentence_idx") / last * _N_POSITION_BINS).floor().clip(0, _N_POSITION_BINS - 1)
    profile = (
        labels.group_by(bins.alias("bin"))
        .agg(pl.col("importance_abs", "is_anchor").mean(), pl.len().alias("n"))
        .sort("bin")
    )
    centre = (profile["bin"].to_numpy() + 0.5) / _N_POSITION_BINS
    figure, axes = _canvas(title, "position in the trace (0 first, 1 last)", "mean |importance|")
    width = 0.9 / _N_POSITION_BINS
    axes.bar(centre, profile["importance_abs"].to_numpy(), width, color=_BLUE, label="|importance|")
    share = axes.twinx()
    share.plot(
        centre, profile["is_anchor"].to_numpy(), "o-", ms=4, color=_RED, label="anchor share"
    )
    share.set_ylabel("anchor share", color=_RED, fontsize=9)
    share.set_ylim(bottom=0)
    share.tick_params(labelsize=8, colors=_RED)
    share.spines[["top"]].set_visible(False)
    axes.yaxis.label.set_color(_BLUE)
    return _png(figure)


def importance_histogram(labels: pl.DataFrame, *, title: str) -> bytes:
    """Draw the distribution of signed importance on a log count axis, exact zeros apart.

    Args:
        labels: `tables.LABELS`.
        title: heading, to which the share of exact zeros is added.

    Returns:
        PNG.
    """
    signed = labels["importance_signed"].to_numpy()
    zeros = float((signed == 0).mean()) if signed.size else 0.0
    heading = f"{title} · {zeros:.0%} exactly zero, not drawn"
    figure, axes = _canvas(heading, "signed importance", "sentences")
    axes.hist(signed[signed != 0], bins=np.linspace(-1, 1, 81).tolist(), color=_BLUE)
    axes.axvline(0, color=_GREY, linewidth=1)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    return _png(figure)


def deferral_bars(plans: pl.DataFrame, *, title: str) -> bytes:
    """Draw the share deferred and the error among the accepted on test, per plan.

    Args:
        plans: `tables.PLANS` of one protocol; the first 20 are drawn.
        title: heading.

    Returns:
        PNG. A black tick marks what the plan was told to keep to; a plan that accepts nothing has
        no error bar.
    """
    shown = plans.head(_MAX_BARS)
    names = [
        f"{recipe} · {objective} {value:g}"
        for recipe, objective, value in shown.select(
            "recipe", "objective", "objective_value"
        ).iter_rows()
    ]
    figure, axes = _canvas(title, "share of test sentences", "", height=_bar_height(len(names)))
    place = np.arange(len(names))
    for offset, column, colour, label in (
        (-0.2, "deferral_rate", _ORANGE, "deferred"),
        (0.2, "accepted_error", _BLUE, "wrong among accepted"),
    ):
        values = shown[column].fill_null(0.0).to_numpy()
        axes.barh(place + offset, values, 0.38, color=colour, label=label)
    is_budget = (shown["objective"] == "budget").to_numpy()
    wanted = shown["objective_value"].to_numpy()
    row = place + np.where(is_budget, -0.2, 0.2)
    axes.vlines(wanted, row - 0.22, row + 0.22, color="#000000", linewidth=2, label="objective")
    _name_bars(axes, names)
    _legend_beside(axes)
    return _png(figure)


def activation_norms(norms: NDArray[np.float64], *, title: str) -> bytes:
    """Draw the norm of each sentence's activation along one trace.

    Args:
        norms: Euclidean norm, [sentence], model units; non-finite ones leave a gap.
        title: heading.

    Returns:
        PNG.
    """
    figure, axes = _canvas(title, "sentence", "activation norm")
    axes.plot(np.arange(norms.size), norms, color=_BLUE, linewidth=1.2)
    axes.set_ylim(bottom=0)
    return _png(figure)


def span_lengths(n_tokens: NDArray[np.int64], *, title: str) -> bytes:
    """Draw the distribution of sentence lengths in tokens.

    Args:
        n_tokens: [sentence].
        title: heading, to which the median is added.

    Returns:
        PNG. Lengths beyond the 99.5th percentile share the last bin.
    """
    heading = f"{title} · median {np.median(n_tokens):g}" if n_tokens.size else title
    figure, axes = _canvas(heading, "tokens in the sentence", "sentences")
    if n_tokens.size:
        longest = max(int(np.quantile(n_tokens, 0.995)), 2)
        width = -(-longest // _MAX_LENGTH_BINS)
        edges = np.arange(0.5, longest + width + 0.5, width)
        axes.hist(np.minimum(n_tokens, longest), bins=edges.tolist(), color=_GREEN)
    return _png(figure)


def leaderboard_bars(rows: pl.DataFrame, *, metric: str, chance: float | None, title: str) -> bytes:
    """Draw the first rows of a ranking as bars, with intervals where the rows carry them.

    Args:
        rows: label, value, and optionally value_low, value_high; null where undefined. At most 20
            are drawn, first on top.
        metric: label of the value axis.
        chance: level drawn as a dashed line; None for none.
        title: heading.

    Returns:
        PNG.
    """
    shown = rows.head(_MAX_BARS)
    figure, axes = _canvas(title, metric, "", height=_bar_height(shown.height))
    values = shown["value"].cast(pl.Float64).fill_null(0.0).to_numpy()
    place = np.arange(shown.height)
    axes.barh(place, values, 0.7, color=_BLUE)
    if {"value_low", "value_high"} <= set(shown.columns):
        low, high = (
            shown[name].cast(pl.Float64).to_numpy() for name in ("value_low", "value_high")
        )
        axes.hlines(place, low, high, color="#000000", linewidth=1.5)
    if chance is not None:
        axes.axvline(chance, color=_GREY, linestyle="--", linewidth=1.3, label="chance")
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    _name_bars(axes, shown["label"].to_list())
    return _png(figure)


def delta_intervals(rows: pl.DataFrame, *, metric: str, title: str) -> bytes:
    """Draw paired differences as points with their intervals around zero.

    Args:
        rows: label, delta, delta_low, delta_high; a null interval leaves a hollow point, a null
            delta no point. At most 20 are drawn, first on top.
        metric: what the difference is of.
        title: heading.

    Returns:
        PNG.
    """
    shown = rows.head(_MAX_BARS)
    figure, axes = _canvas(title, f"difference in {metric}", "", height=_bar_height(shown.height))
    delta, low, high = (
        shown[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        for name in ("delta", "delta_low", "delta_high")
    )
    place = np.arange(shown.height)
    axes.axvline(0, color=_GREY, linewidth=1.3)
    axes.hlines(place, low, high, color=_BLUE, linewidth=2)
    face = np.where(np.isnan(low), "white", _BLUE)
    axes.scatter(delta, place, s=42, color=face.tolist(), edgecolors=_BLUE, zorder=3)
    _name_bars(axes, shown["label"].to_list())
    return _png(figure)


def to_data_uri(png: bytes) -> str:
    """Return a PNG as a data URI that an `img` tag can hold."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _canvas(title: str, x: str, y: str, height: float = 2.9) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.6, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    figure.suptitle(_plain(title), fontsize=9.5, color=_INK, x=0.01, ha="left")
    axes.set_xlabel(_plain(x), fontsize=9, color=_INK)
    axes.set_ylabel(_plain(y), fontsize=9, color=_INK)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain(text: str) -> str:
    """Keep matplotlib from reading formulas in names."""
    return text.replace("$", r"\$")


def _legend_beside(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02))


def _bar_height(n_bars: int) -> float:
    return 1.0 + 0.3 * max(n_bars, 2)


def _name_bars(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _png(figure: Figure) -> bytes:
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
