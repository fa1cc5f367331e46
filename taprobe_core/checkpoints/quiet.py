"""Keep transformers from writing to the terminal while it loads; put what it raises in one line.

A lack of memory is told apart from every other failure.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the block transformers logs errors only and draws no progress bars."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def reason_of(error: BaseException) -> str:
    """Return the first line that an error says for itself; its class where that says little.

    A configuration at odds with itself is told by the error that caused it.
    """
    from huggingface_hub.errors import StrictDataclassError

    said = error.__cause__ if isinstance(error, StrictDataclassError) else error
    line = (str(said).strip().splitlines() or [""])[0]
    is_sentence = " " in line.strip()
    return line if is_sentence else f"{type(error).__name__}: {line}".rstrip(": ")


_SAID = re.compile(
    r"can.?t allocate memory|cannot allocate memory|unable to allocate|not enough memory|"
    r"out of memory|bad_alloc",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there was not enough memory, on a host or a device.

    torch's allocator for the CPU raises a plain RuntimeError, and safetensors an error of its own;
    their text is all there is to know them by.
    """
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, Exception) and _SAID.search(str(error)) is not None
