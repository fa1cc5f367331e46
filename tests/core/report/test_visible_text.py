from __future__ import annotations

import pytest

from taprobe_core.report.canvas import visible


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[31mred\x00", "\u241b[31mred\u2400"),
        ("line\nand\ttab", "line\nand\ttab"),
        ("\u202edlrow\u2066", "\ufffddlrow\ufffd"),
        ("\x7f\x9b\ufeff\ud800", "\u2421\ufffd\ufffd\ufffd"),
        ("naïve ∑ 数 👩‍🔬", "naïve ∑ 数 👩‍🔬"),
    ],
)
def test_acting_characters_become_symbols(raw, shown):
    assert visible(raw) == shown
