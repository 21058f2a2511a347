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


def shown(value: float, unit: str) -> str:
    """A value in its unit as people read it: a ratio in percent, seconds and bytes scaled, others as they are.

    Examples
    --------
    >>> shown(0.5, "ratio"), shown(95.0, "seconds"), shown(2e9, "bytes"), shown(3.0, "files")
    ('50 %', '1 min 35 s', '2.0 GB', '3 files')
    """
    if math.isnan(value):
        return "an unknown value"
    if unit == "seconds":
        return "no foreseeable time" if math.isinf(value) else duration(value)
    if unit == "bytes":
        return size(value)
    return percent(value) if unit == "ratio" else f"{value:.4g} {unit}".rstrip()
