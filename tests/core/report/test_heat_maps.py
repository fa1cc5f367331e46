from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from taprobe_core.report import plots

pytestmark = pytest.mark.usefixtures("drawn")

RNG = np.random.default_rng(0)
NAN = float("nan")
LARGE = np.tri(300) * RNG.exponential(size=(300, 300)) ** 3


def test_a_map_is_small_and_equal_for_equal_input() -> None:
    first, again = (plots.attention_map(LARGE, y="sentence", title="a") for _ in range(2))
    assert first == again
    assert len(first) <= plots.MAX_BYTES
    assert Image.open(io.BytesIO(first)).size[0] >= 400
    kurtosis = RNG.gamma(0.5, 8, (80, 64))
    assert len(plots.kurtosis_map(kurtosis, range(80), title="b")) <= plots.MAX_BYTES


@pytest.mark.parametrize(
    "values", [np.full((3, 4), NAN), np.zeros((3, 4)), np.ones((1, 1)), np.array([[NAN, 2.0]])]
)
def test_a_map_of_little_is_drawn_all_the_same(values: np.ndarray) -> None:
    for png in (
        plots.kurtosis_map(values, list(range(len(values))), title="$x$"),
        plots.attention_map(values, y="y", title=""),
    ):
        Image.open(io.BytesIO(png)).load()


def test_scale_and_map_agree_on_the_highest_value() -> None:
    values = np.zeros((4, 6))
    values[2, 3] = 9.0
    image = Image.open(io.BytesIO(plots.kurtosis_map(values, [0, 1, 2, 3], title="c")))
    pixels = np.asarray(image.convert("RGB"), dtype=np.int64)
    yellow = (abs(pixels - (253, 231, 37)) < 12).all(axis=-1)
    place = np.argwhere(yellow)
    left, bar = place[place[:, 1] < 700], place[place[:, 1] >= 700]
    assert len(left) > 1000
    assert len(bar) > 100
