"""Text of others on lines of ours: names, errors and moments that cannot drive a terminal. Pure."""

from __future__ import annotations

import math
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from wiseflow_nb.quantities import UNKNOWN

LONGEST_CELL = 60
#: No column is made narrower than this to fit a terminal.
NARROWEST = 8


def moment(seconds: float) -> str:
    """An epoch time as local time, to the second."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if math.isfinite(seconds) else UNKNOWN
    except (OverflowError, OSError, ValueError):
        return UNKNOWN  # a damaged record can hold any number


def one_line(text: str, width: int = LONGEST_CELL) -> str:
    """The text on one line, without control characters (a name must not drive the terminal).

    Escape sequences, bidirectional marks and lone surrogates become blanks; what is longer than
    ``width`` letters ends in an ellipsis.

    Examples
    --------
    >>> one_line("load\\x1b[31m the\\ntable"), one_line("abcdef", 4)
    ('load [31m the table', 'abc…')
    """
    # Cut first: a name can be a megabyte long. Blanks at the front may be stripped.
    head = text[: 4 * width + 64]
    clean = "".join(letter if letter.isprintable() else " " for letter in head).strip()
    if len(clean) <= width and len(head) == len(text):
        return clean
    return clean[: width - 1] + "…"


def many(count: int, word: str) -> str:
    """A count with its word.

    Examples
    --------
    >>> many(1, "gap"), many(2, "gap")
    ('1 gap', '2 gaps')
    """
    return f"{count} {word}{'' if count == 1 else 's'}"


def shown_width(text: str) -> int:
    """How many columns of a terminal the text takes: wide letters two, combining marks none.

    Examples
    --------
    >>> shown_width("abc"), shown_width("表"), shown_width("e\\u0301")
    (3, 2, 1)
    """
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def cut(text: str, width: int) -> str:
    """The text in at most ``width`` columns, with an ellipsis where something was left out."""
    if shown_width(text) <= width:
        return text
    kept, used = [], 0
    for letter in text:
        used += shown_width(letter)
        if used > width - 1:
            break
        kept.append(letter)
    return "".join(kept) + "…"


def folded(text: str, width: int = 0) -> str:
    """The lines of a text in at most ``width`` columns (0: as they are), continued a little further in.

    Examples
    --------
    >>> print(folded("- one two three", 9))
    - one two
      three
    """
    if not width:
        return text
    lines: list[str] = []
    for line in text.splitlines():
        indent = " " * min(len(line) - len(line.lstrip()) + 2, width // 2)
        fits = shown_width(line) <= width
        lines += [line] if fits else textwrap.wrap(line, width, subsequent_indent=indent, drop_whitespace=True)
    return "\n".join(lines)


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    width: int = 0,
    paint: Callable[[str], str] = str,
) -> str:
    """Columns padded to their widest cell, two spaces apart.

    With a ``width`` (columns of a terminal; 0: no bound) the widest columns are cut until all fits;
    the first one, which tells the rows apart, stays whole.
    ``paint`` is given each cell without its padding and may add what takes no room (colour).

    Examples
    --------
    >>> print(table(["id", "name"], [["1", "etl"]]))
    id  name
    1   etl
    >>> print(table(["id", "name"], [["1", "extract the table"]], width=16))
    id  name
    1   extract the…
    """
    lines = [list(headers), *([one_line(cell) for cell in row] for row in rows)]
    widths = [max(shown_width(line[column]) for line in lines) for column in range(len(headers))]
    floors = [widths[0], *(max(NARROWEST, shown_width(header)) for header in headers[1:])]
    while width and sum(widths) + 2 * (len(widths) - 1) > width:
        loosest = max(range(len(widths)), key=lambda at: (widths[at] > floors[at], widths[at]))
        if widths[loosest] <= floors[loosest]:
            break
        widths[loosest] -= 1
    return "\n".join(
        "  ".join(
            (paint(text) if number else text) + " " * (room - shown_width(text))
            for text, room in ((cut(cell, room), room) for cell, room in zip(line, widths, strict=True))
        ).rstrip()
        for number, line in enumerate(lines)
    )
