"""Cholesky factors, or an error that says what could not be factorised.

What does not belong here: what is solved with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taprobe_core.errors import NumericsError


def cholesky(system: Tensor, what: str, where: str, fix: str) -> Tensor:
    """Return the lower factor of a positive definite matrix, or of a batch of them.

    Args:
        system: [..., row, row] symmetric.
        what: the system in words, singular or plural with its verb.
        where: which one, for the error.
        fix: what to do where it is not positive definite.

    Raises:
        NumericsError: a matrix is not positive definite in its precision.
    """
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed.any()):
        raise NumericsError(f"{what} not positive definite", where, fix)
    return factor  # type: ignore[no-any-return]
