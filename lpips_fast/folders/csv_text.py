"""The text of a CSV file of distances: RFC 4180, a header row and rows, nothing else.

``pandas.read_csv``, ``csv.DictReader`` and spreadsheets open it. A field that holds a comma, a
quote or a line break is quoted. Text is UTF-8 without a byte-order mark; a file name that is not
text has its bytes as ``\\udcXX``. Lines end with a line feed alone, as pandas writes them.

A name that a spreadsheet would run as a formula (``=1+1.png``) is written as ``./=1+1.png``, which
is the same file and no formula.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence

from .summary import number_text

__all__ = [
    "as_written",
    "disarmed",
    "fields_of",
    "header_text",
    "line",
    "record_text",
    "split_records",
]

# What makes Excel, LibreOffice or Google Sheets take a cell for a formula (OWASP, "CSV injection").
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def line(cells: Sequence[str]) -> str:
    """One row of cells, quoted where they have to be.

    >>> line(["name", 'a, "b" c'])
    'name,"a, ""b"" c"\\n'
    """
    return ",".join(_field(as_written(cell)) for cell in cells) + "\n"


def header_text(columns: Sequence[str]) -> str:
    """The first row.

    >>> header_text(["name", "distance", "error"])
    'name,distance,error\\n'
    """
    return line(columns)


def record_text(labels: Sequence[str], numbers: Sequence[float | None], error: str) -> str:
    """One row: labels (name and folder), numbers, and why one is missing.

    >>> record_text(["=1.png"], [0.25, None], "too small, by far")
    './=1.png,0.25000000,,"too small, by far"\\n'
    """
    cells = [disarmed(label) for label in labels]
    cells += ["" if number is None else number_text(number) for number in numbers]
    cells.append(disarmed(" ".join(error.splitlines())))
    return line(cells)


def disarmed(text: str) -> str:
    """A path that no spreadsheet takes for a formula.

    >>> disarmed("@home.png"), disarmed("1.png")
    ('./@home.png', '1.png')
    """
    return f"./{text}" if text.startswith(_FORMULA_STARTS) else text


def as_written(text: str) -> str:
    """What of a name that is no text can be written: its bytes as ``\\udcXX``."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def split_records(text: str) -> Iterator[tuple[str, bool]]:
    """Rows as they are written, line break and all, and whether each is whole.

    Only the last may not be: of a process that was killed, or a disk that was full.
    """
    record, quotes = "", 0
    for line in _lines(text):
        record += line
        quotes += line.count('"')
        # A field may hold a line break: quotes that are not closed go on to the next line.
        if quotes % 2 == 0 and line.endswith("\n"):
            yield record, True
            record, quotes = "", 0
    if record:
        yield record, False


def fields_of(record: str) -> list[str]:
    """The cells of one row as it is written."""
    return next(iter(csv.reader(_lines(record))), [])


def _lines(text: str) -> Iterable[str]:
    """By line feeds alone: ``str.splitlines`` knows ten more characters, which names may hold."""
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def _field(text: str) -> str:
    if any(character in text for character in ',"\r\n') or text != text.strip():
        return '"' + text.replace('"', '""') + '"'
    return text
