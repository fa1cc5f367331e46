"""Text of unknown origin to text that can only be read.

Controls, bidirectional overrides and other format characters act on a display: they reorder or hide
what stands beside them. What does not belong here: escaping markup, which the template does.

Invariant: what comes back holds no character of the categories Cc (newline and tab apart) and Cs,
and no directional override.
"""

from __future__ import annotations

from collections.abc import Mapping


def visible(text: str) -> str:
    """Replace characters that act on a display instead of being shown.

    Args:
        text: any text.

    Returns:
        C0 controls as their pictures (U+2400 on; newline and tab stay), C1 controls, bidirectional
        and other format characters, and lone surrogates as U+FFFD.
    """
    return text.translate(_SYMBOLS)


_FORMAT_CODES = (
    *(0xAD, 0x61C, 0x200B, 0x200E, 0x200F),
    *(*range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFC)),
)
_SYMBOLS: Mapping[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A)},
    0x7F: "\u2421",
    **dict.fromkeys((*range(0x80, 0xA0), *_FORMAT_CODES), "\ufffd"),
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),
}
