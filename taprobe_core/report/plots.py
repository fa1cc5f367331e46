"""Tables and arrays to small PNG figures, for reports and for metadata beside an asset.

What does not belong here: computing what is drawn, and the style (`canvas`).

Invariant: equal input gives equal bytes, under `MAX_BYTES`; lines differ by marker as well as by
colour.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from taprobe_core.report.canvas import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    LONGEST_NAME,
    MAX_BYTES,
    ORANGE,
    RED,
    attention_map,
    bar_height,
    encode_png,
    kurtosis_map,
    legend_beside,
    name_bars,
    new_axes,
    plain,
    to_data_uri,
)

__all__ = [
    "MAX_BYTES",
    "activation_norms",
    "attention_map",
    "deferral_bars",
    "delta_intervals",
    "importance_by_position",
    "importance_histogram",
    "kurtosis_map",
    "leaderboard_bars",
    "metric_by_layer",
    "span_lengths",
    "to_data_uri",
]

_MARKERS = "osD^vP"
_DASHES = ("--", ":", "-.", (0, (5, 1)))
_N_POSITION_BINS = 20
_MAX_LENGTH_BINS = 50
_MAX_BARS = 20


def metric_by_layer(
    rows: pl.DataFrame, *, metric: str, levels: Mapping[str, float | None], title: str
) -> bytes:
    """Draw a metric over layers: one line per recipe, levels as horizontal lines."""
    figure, axes = new_axes(title, "layer (block output, from 0)", metric)
    drawn = {name: value for name, value in levels.items() if value is not None}
    for index, (name, level) in enumerate(drawn.items()):
        dash = _DASHES[index % len(_DASHES)]
        axes.axhline(
            level,
            color=GREY,
            linestyle=dash,
            linewidth=1.3,
            label=plain(name, LONGEST_NAME),
            zorder=2,
        )
    lines = rows.sort("recipe", "layer").group_by("recipe", maintain_order=True)
    for index, ((recipe,), line) in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        # A colour that comes again has another marker and another line.
        again = index // len(COLOURS)
        marker = _MARKERS[(index + again) % len(_MARKERS)]
        value = line["value"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        axes.plot(
            line["layer"].to_numpy(),
            value,
            color=colour,
            marker=marker,
            linestyle=("-", "--", ":")[again % 3],
            ms=4.5,
            label=plain(str(recipe), LONGEST_NAME),
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # From zero where nothing is negative, so that small differences look small.
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    legend_beside(axes)
    return encode_png(figure)


def importance_by_position(labels: pl.DataFrame, *, title: str) -> bytes:
    """Draw mean absolute importance and anchor share along the trace, in 20 bins."""
    last = (pl.col("n_sentences") - 1).clip(1)
    bins = (pl.col("sentence_idx") / last * _N_POSITION_BINS).floor().clip(0, _N_POSITION_BINS - 1)
    profile = (
        labels.group_by(bins.alias("bin"))
        .agg(pl.col("importance_abs", "is_anchor").mean(), pl.len().alias("n"))
        .sort("bin")
    )
    centre = (profile["bin"].to_numpy() + 0.5) / _N_POSITION_BINS
    figure, axes = new_axes(title, "position in the trace (0 first, 1 last)", "mean |importance|")
    width = 0.9 / _N_POSITION_BINS
    axes.bar(centre, profile["importance_abs"].to_numpy(), width, color=BLUE, label="|importance|")
    share = axes.twinx()
    share.plot(centre, profile["is_anchor"].to_numpy(), "o-", ms=4, color=RED, label="anchor share")
    share.set_ylabel("anchor share", color=RED, fontsize=9)
    share.set_ylim(bottom=0)
    share.tick_params(labelsize=8, colors=RED)
    share.spines[["top"]].set_visible(False)
    axes.yaxis.label.set_color(BLUE)
    return encode_png(figure)


def importance_histogram(labels: pl.DataFrame, *, title: str) -> bytes:
    """Draw the distribution of signed importance on a log count axis, exact zeros apart."""
    signed = labels["importance_signed"].to_numpy()
    zeros = float((signed == 0).mean()) if signed.size else 0.0
    heading = f"{title} · {zeros:.0%} exactly zero, not drawn"
    figure, axes = new_axes(heading, "signed importance", "sentences")
    axes.hist(signed[signed != 0], bins=np.linspace(-1, 1, 81).tolist(), color=BLUE)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    return encode_png(figure)


def deferral_bars(plans: pl.DataFrame, *, title: str) -> bytes:
    """Draw the share deferred and the error among the accepted on test, per plan."""
    shown = plans.head(_MAX_BARS)
    names = [
        f"{recipe} · {objective} {value:g}"
        for recipe, objective, value in shown.select(
            "recipe", "objective", "objective_value"
        ).iter_rows()
    ]
    figure, axes = new_axes(title, "share of test sentences", "", height=bar_height(len(names)))
    place = np.arange(len(names))
    for offset, column, colour, label in (
        (-0.2, "deferral_rate", ORANGE, "deferred"),
        (0.2, "accepted_error", BLUE, "wrong among accepted"),
    ):
        values = shown[column].fill_null(0.0).to_numpy()
        axes.barh(place + offset, values, 0.38, color=colour, label=label)
    is_budget = (shown["objective"] == "budget").to_numpy()
    wanted = shown["objective_value"].to_numpy()
    row = place + np.where(is_budget, -0.2, 0.2)
    axes.vlines(wanted, row - 0.22, row + 0.22, color="#000000", linewidth=2, label="objective")
    name_bars(axes, names)
    legend_beside(axes)
    return encode_png(figure)


def activation_norms(norms: NDArray[np.float64], *, title: str) -> bytes:
    """Draw the norm of each sentence's activation along one trace.

    Args:
        norms: Euclidean norm, [sentence], model units; non-finite ones leave a gap.
    """
    figure, axes = new_axes(title, "sentence", "activation norm")
    axes.plot(np.arange(norms.size), norms, color=BLUE, linewidth=1.2)
    axes.set_ylim(bottom=0)
    return encode_png(figure)


def span_lengths(n_tokens: NDArray[np.int64], *, title: str) -> bytes:
    """Draw the distribution of sentence lengths in tokens.

    Args:
        n_tokens: [sentence].
    """
    heading = f"{title} · median {np.median(n_tokens):g}" if n_tokens.size else title
    figure, axes = new_axes(heading, "tokens in the sentence", "sentences")
    if n_tokens.size:
        longest = max(int(np.quantile(n_tokens, 0.995)), 2)
        width = -(-longest // _MAX_LENGTH_BINS)
        edges = np.arange(0.5, longest + width + 0.5, width)
        axes.hist(np.minimum(n_tokens, longest), bins=edges.tolist(), color=GREEN)
    return encode_png(figure)


def leaderboard_bars(rows: pl.DataFrame, *, metric: str, chance: float | None, title: str) -> bytes:
    """Draw the first rows of a ranking as bars, with intervals where the rows carry them."""
    shown = rows.head(_MAX_BARS)
    figure, axes = new_axes(title, metric, "", height=bar_height(shown.height))
    values = shown["value"].cast(pl.Float64).fill_null(0.0).to_numpy()
    place = np.arange(shown.height)
    axes.barh(place, values, 0.7, color=BLUE)
    if {"value_low", "value_high"} <= set(shown.columns):
        low, high = (
            shown[name].cast(pl.Float64).to_numpy() for name in ("value_low", "value_high")
        )
        axes.hlines(place, low, high, color="#000000", linewidth=1.5)
    if chance is not None:
        axes.axvline(chance, color=GREY, linestyle="--", linewidth=1.3, label="chance")
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    name_bars(axes, shown["label"].to_list())
    return encode_png(figure)


def delta_intervals(rows: pl.DataFrame, *, metric: str, title: str) -> bytes:
    """Draw paired differences as points with their intervals around zero."""
    shown = rows.head(_MAX_BARS)
    figure, axes = new_axes(title, f"difference in {metric}", "", height=bar_height(shown.height))
    delta, low, high = (
        shown[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        for name in ("delta", "delta_low", "delta_high")
    )
    place = np.arange(shown.height)
    axes.axvline(0, color=GREY, linewidth=1.3)
    axes.hlines(place, low, high, color=BLUE, linewidth=2)
    face = np.where(np.isnan(low), "white", BLUE)
    axes.scatter(delta, place, s=42, color=face.tolist(), edgecolors=BLUE, zorder=3)
    name_bars(axes, shown["label"].to_list())
    return encode_png(figure)
