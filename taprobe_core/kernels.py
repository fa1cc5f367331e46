"""Whether GPU kernels of our own can be compiled here. What does not belong here: the kernels."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


@cache
def has_triton() -> bool:
    """Whether the compiler of the kernels is there; PyTorch for Windows comes without it."""
    return find_spec("triton") is not None
