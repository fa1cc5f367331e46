"""Work, sizes and times as a reader writes them: three digits and a unit.

What does not belong here: what the quantities are of (cost, progress).
"""

from __future__ import annotations

_TIMES_1000 = ((1e16, 1e15, "P"), (1e12, 1e12, "T"), (1e9, 1e9, "G"), (0.0, 1e6, "M"))
"""From this number on, this is the unit, with this prefix; work stays in tera up to 10,000."""


def flop_text(flop: float) -> str:
    """Return an amount of floating-point work in words.

    Example:
        >>> flop_text(1.631e15), flop_text(74_200_000_000) + "/s"
        ('1,631 TFLOP', '74.2 GFLOP/s')
    """
    unit, prefix = next((unit, prefix) for least, unit, prefix in _TIMES_1000 if flop >= least)
    return f"{_three_digits(flop / unit)} {prefix}FLOP"


def bytes_text(n_bytes: float) -> str:
    """Return a size in words.

    Example:
        >>> bytes_text(1_395_864_371), bytes_text(900)
        ('1.3 GiB', '900 B')
    """
    for unit, power in (("TiB", 4), ("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if n_bytes >= 1024**power:
            size = n_bytes / 1024**power
            return f"{size:.1f} {unit}" if size < 10 else f"{size:,.0f} {unit}"
    return f"{n_bytes:.0f} B"


def duration_text(seconds: float) -> str:
    """Return a time in words, in whole seconds or minutes.

    Example:
        >>> duration_text(59.4), duration_text(80), duration_text(8940)
        ('59 s', '1 min 20 s', '2 h 29 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"
