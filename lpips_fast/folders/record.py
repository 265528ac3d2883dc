"""The record of a run beside its CSV: how it was made, and what going on with it needs.

``scores.csv.jsonl`` has one JSON object a line and is only ever appended to:

.. code-block:: text

    {"lpips-fast": {"lpips-fast": "0.2.0", "net": "alex", …}, "columns": ["distance"]}
    {"name": "1.png", "folder": "", "values": ["0.12345678"], "error": "", "files": [[…], […]], …}
    {"name": "2.png", …}
    {"summary": {"distance": {"count": 2, "mean": …}}, "failed": 0}

A pair that was measured again has a line for each time; the last one holds. ``files`` are the two
images', and if it has one its mask's, size, modification time and digest
(:class:`lpips_fast.images.files.Fingerprint`), or null;
``batch`` names the pairs and files that were measured together, on which the last bits of a
distance can depend.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..images.files import Fingerprint
from .evaluating import Row
from .summary import number_text

__all__ = ["RecordError", "Recorded", "first_line", "parse_lines", "row_line", "summary_line"]

#: A pair's name and its folder's label: what tells it from all others of a run.
Key = tuple[str, str]


class RecordError(ValueError):
    """A line of the record is damaged; the message says which and what is wrong with it."""


@dataclass(frozen=True)
class Recorded:
    """A row as the record has it.

    Attributes:
        values: the numbers as the CSV has them, ``None`` where there is none.
        error: as in :class:`Row`.
        files: of the two images and the mask; ``None`` of one that could not be read.
        batch: see the module.
    """

    values: tuple[str | None, ...]
    error: str
    files: tuple[Fingerprint | None, ...]
    batch: str

    def row(self, key: Key) -> Row:
        values = tuple(None if text is None else float(text) for text in self.values)
        return Row(key[0], values, self.error, folder=key[1], files=self.files)


def first_line(settings: Mapping[str, str], columns: Sequence[str]) -> str:
    return _line({"lpips-fast": dict(settings), "columns": list(columns)})


def row_line(row: Row, batch: str) -> str:
    return _line(
        {
            "name": row.name,
            "folder": row.folder,
            "values": [None if value is None else number_text(value) for value in row.values],
            "error": row.error,
            "files": [
                None if file is None else [file.size, file.modified, file.digest]
                for file in row.files
            ],
            "batch": batch,
        }
    )


def summary_line(summary: Mapping[str, Any]) -> str:
    return _line({"summary": dict(summary)})


def _line(facts: Mapping[str, Any]) -> str:
    # Escapes whatever is not ASCII, and so carries names that are no text.
    return json.dumps(facts, allow_nan=False) + "\n"


def parse_lines(
    lines: Iterable[str],
) -> tuple[dict[str, str], list[str], dict[Key, list[Recorded]], str]:
    """Read a record.

    Args:
        lines: whole ones, of which there is at least one.

    Returns:
        The settings, the columns, each pair's rows from the first to the last, and the last line.

    Raises:
        RecordError: a line is no JSON, or not what stands there.
    """
    settings: dict[str, str] = {}
    columns: list[str] = []
    rows: dict[Key, list[Recorded]] = {}
    last = ""
    for number, line in enumerate(lines, start=1):
        try:
            facts = json.loads(line)
            _expect(isinstance(facts, dict), "it is no JSON object")
            if number == 1:
                settings, columns = _parse_first(facts)
            elif "summary" not in facts:
                key, row = _parse_row(facts, len(columns))
                rows.setdefault(key, []).append(row)
        except (ValueError, RecursionError) as error:
            reason = error.args[0] if isinstance(error, RecordError) else "it is no JSON"
            raise RecordError(f"line {number}: {reason}") from error
        last = line
    return settings, columns, rows, last


def _parse_first(facts: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    settings, columns = facts.get("lpips-fast"), facts.get("columns")
    _expect(isinstance(settings, dict) and _are_texts(settings.values()), "'lpips-fast' is missing")
    _expect(isinstance(columns, list) and _are_texts(columns), "'columns' is no list of names")
    return settings, columns  # type: ignore[return-value]


def _parse_row(facts: dict[str, Any], columns: int) -> tuple[Key, Recorded]:
    for key in ("name", "folder", "error", "batch"):
        _expect(isinstance(facts.get(key), str), f"{key!r} is no text")
    values = facts.get("values")
    _expect(
        isinstance(values, list) and len(values) == columns and all(map(_is_number, values)),
        f"'values' are not {columns} numbers as text, or null",
    )
    files = facts.get("files")
    _expect(isinstance(files, list) and len(files) in (2, 3), "'files' are not two, or three")
    row = Recorded(
        tuple(values),  # type: ignore[arg-type]
        facts["error"],
        tuple(map(_fingerprint, files)),  # type: ignore[arg-type]
        facts["batch"],
    )
    return (facts["name"], facts["folder"]), row


def _is_number(text: object) -> bool:
    if text is None:
        return True
    try:
        return isinstance(text, str) and number_text(float(text)) == text
    except ValueError:
        return False


def _fingerprint(facts: object) -> Fingerprint | None:
    if facts is None:
        return None
    _expect(
        isinstance(facts, list) and list(map(type, facts)) == [int, int, str],
        "a file is not its size, time and digest",
    )
    return Fingerprint(*facts)  # type: ignore[misc]


def _are_texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _expect(condition: bool, reason: str) -> None:
    if not condition:
        raise RecordError(reason)
