"""How exactly CUDA multiplies float32 matrices while a solve runs.

What does not belong here: which solves may be rounded (`fit`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from taprobe_core.study import Precision

_turn = threading.Lock()
"""The setting is the process's, so that solves on CUDA take turns; they share its memory, too."""


@contextmanager
def products_in(precision: Precision, device: str) -> Iterator[None]:
    """Compute float32 products of a solve in `precision`, where the solve is on CUDA.

    Args:
        precision: `tf32` rounds the factors to 10 bits of mantissa and sums in float32.
        device: of the solve, as PyTorch names it; others than CUDA know float32 alone.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    with _turn:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
