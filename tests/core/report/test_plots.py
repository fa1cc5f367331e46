from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pytest
from PIL import Image

from taprobe_core.report import plots

pytestmark = pytest.mark.usefixtures("drawn")

RNG = np.random.default_rng(0)
NAN = float("nan")


def _labels(n: int) -> pl.DataFrame:
    signed = RNG.normal(0, 0.1, n).round(2)
    return pl.DataFrame(
        {
            "sentence_idx": range(n),
            "n_sentences": [n] * n,
            "importance_signed": signed,
            "importance_abs": np.abs(signed),
            "is_anchor": np.abs(signed) > 0.2,
        }
    )


def _by_layer(n_recipes: int, n_layers: int) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {"recipe": f"recipe_{recipe}", "layer": layer, "value": float(RNG.random())}
            for recipe in range(n_recipes)
            for layer in range(n_layers)
        ]
    )


def _plans(n: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "recipe": ["linear_probe"] * n,
            "objective": ["budget", "error"] * (n // 2),
            "objective_value": [0.2, 0.05] * (n // 2),
            "deferral_rate": [0.15, 1.0] * (n // 2),
            "accepted_error": [0.08, None] * (n // 2),
        }
    )


def _deltas(n: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "label": [f"linear_probe minus baseline {index}" for index in range(n)],
            "value": [0.4, None] * (n // 2),
            "delta": [0.1, -0.05] * (n // 2),
            "delta_low": [0.02, None] * (n // 2),
            "delta_high": [0.2, None] * (n // 2),
            "value_low": [0.3, None] * (n // 2),
            "value_high": [0.5, None] * (n // 2),
        }
    )


FIGURES: dict[str, Callable[[], bytes]] = {
    "layers": lambda: plots.metric_by_layer(
        _by_layer(2, 4), metric="PR-AUC", levels={"chance": 0.1, "text": None}, title="a · b"
    ),
    "crowded layers": lambda: plots.metric_by_layer(
        _by_layer(8, 64), metric="PR-AUC", levels=dict.fromkeys("abcdef", 0.2), title="x" * 80
    ),
    "undefined layer": lambda: plots.metric_by_layer(
        _by_layer(1, 3).with_columns(value=pl.lit(None, pl.Float64)),
        metric="m",
        levels={},
        title="",
    ),
    "position": lambda: plots.importance_by_position(_labels(500), title="position"),
    "one sentence": lambda: plots.importance_by_position(_labels(1), title="position"),
    "importance": lambda: plots.importance_histogram(_labels(500), title="importance"),
    "no labels": lambda: plots.importance_histogram(_labels(0), title="importance"),
    "deferral": lambda: plots.deferral_bars(_plans(4), title="deferral"),
    "many plans": lambda: plots.deferral_bars(_plans(60), title="deferral"),
    "norms": lambda: plots.activation_norms(RNG.gamma(9, 1, 600), title="norms"),
    "norms with a gap": lambda: plots.activation_norms(np.array([1.0, NAN, 3.0]), title="norms"),
    "spans": lambda: plots.span_lengths(RNG.geometric(0.05, 900), title="spans"),
    "no spans": lambda: plots.span_lengths(np.empty(0, np.int64), title="spans"),
    "board": lambda: plots.leaderboard_bars(_deltas(4), metric="m", chance=0.1, title="board"),
    "bare board": lambda: plots.leaderboard_bars(
        _deltas(4).select("label", "value"), metric="m", chance=None, title="board"
    ),
    "deltas": lambda: plots.delta_intervals(_deltas(60), metric="m", title="deltas"),
    "formula": lambda: plots.leaderboard_bars(
        _deltas(2).with_columns(label=pl.lit("$\\frac{ $\x1b 数")),
        metric="$",
        chance=None,
        title="a $x^",
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_a_small_png(name):
    png = FIGURES[name]()
    assert len(png) <= plots.MAX_BYTES
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert min(image.size) >= 100
    drawn = np.asarray(image.convert("L"))
    assert (drawn < 128).any()
    assert drawn[0, 0] > 250


def test_equal_input_gives_equal_bytes_in_any_thread():
    labels = _labels(200)

    def draw(title: str) -> bytes:
        return plots.importance_by_position(labels, title=title)

    with ThreadPoolExecutor(2) as threads:
        one, two, one_again = threads.map(draw, ["one", "two", "one"])
    assert one == one_again == draw("one") != two


def test_values_move_the_picture():
    low, high = (
        plots.metric_by_layer(
            pl.DataFrame({"recipe": ["r", "r"], "layer": [0, 1], "value": [0.1, value]}),
            metric="m",
            levels={},
            title="t",
        )
        for value in (0.2, 0.9)
    )
    assert low != high


def test_data_uri_holds_the_bytes():
    assert plots.to_data_uri(b"\x89PNG") == "data:image/png;base64,iVBORw=="


def test_pyplot_stays_unloaded():
    code = "import sys, taprobe_core.report.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
