"""Tell a lack of memory from every other failure of a library."""

from __future__ import annotations

import errno
import re

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
