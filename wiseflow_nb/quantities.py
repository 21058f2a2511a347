"""Numbers as people read them. Pure: values in, text out."""

from __future__ import annotations

import math

UNKNOWN = "-"


def size(value: float) -> str:
    """Bytes for people, in powers of 1000.

    Examples
    --------
    >>> size(340_000_000), size(float("nan"))
    ('340 MB', '-')
    """
    if not math.isfinite(value):
        return UNKNOWN
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} {unit}" if unit != "GB" else f"{value:.1f} GB"
        value /= 1000
    return f"{value:.2f} TB"


def percent(ratio: float) -> str:
    """A ratio of 0-1 as per cent.

    Examples
    --------
    >>> percent(0.724)
    '72 %'
    """
    return f"{ratio * 100:.0f} %" if math.isfinite(ratio) else UNKNOWN


def duration(seconds: float) -> str:
    """Seconds for people.

    Examples
    --------
    >>> duration(0.0123), duration(75), duration(7300)
    ('12 ms', '1 min 15 s', '2 h 1 min')
    """
    if not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
