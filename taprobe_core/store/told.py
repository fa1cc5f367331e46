"""Say on the way how far a walk through a large store is."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

SECONDS_BETWEEN_LINES = 10.0

T = TypeVar("T")

_log = logging.getLogger(__name__)


def told(items: Iterable[T], done: str) -> Iterator[T]:
    """Yield the items; log their number every ten seconds, so that a small store stays quiet.

    Args:
        items: anything.
        done: what is done to each, for example "artifacts hashed".
    """
    said = time.monotonic()
    for n_done, item in enumerate(items):
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            _log.info("%s %s so far", f"{n_done:,}", done)
        yield item
