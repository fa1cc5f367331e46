"""Keep transformers from writing to the terminal while it loads; put what it raises in one line."""

from __future__ import annotations

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
