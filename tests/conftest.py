"""Fixtures shared by all tests: the optional real rollouts and real tokenizers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def _folder(variable: str, default: Path) -> Path:
    folder = Path(os.environ.get(variable, default))
    if not folder.is_dir():
        pytest.skip(f"{variable} is not set and there is no such folder beside the checkout")
    return folder.resolve()


@pytest.fixture(scope="session")
def real_rollouts() -> Path:
    """A mirror folder of the published dataset's layout."""
    return _folder("TAPROBE_ROLLOUTS", SHARED / "math-rollouts")


@pytest.fixture(scope="session")
def real_tokenizers() -> Path:
    """A folder of fast tokenizers, one sub-folder per model of the real rollouts."""
    return _folder("TAPROBE_TOKENIZERS", SHARED / "tokenizers")
