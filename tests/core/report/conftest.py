"""Figures drawn in earnest: elsewhere a dot stands for each (`tests/conftest.py`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from taprobe_core.report import canvas, plots


@pytest.fixture
def drawn(encode_png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (canvas, plots):
        monkeypatch.setattr(module, "encode_png", encode_png)
