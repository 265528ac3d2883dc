"""A CSV file of distances that says how it was made, and that an interrupted run goes on with.

.. code-block:: text

    # lpips-fast: 0.1.0
    # net: alex
    # …
    name,distance,error
    1.png,0.12345678,
    2.png,,cannot read 'decoded/2.png': the file is empty
    # pairs measured: 1
    # mean: 0.12345678
    # standard error: none
    # pairs failed: 1

Comments begin with ``# `` (``pandas.read_csv(path, comment="#")``): above, all that a reader needs
to make the file again; below, once the run is complete, its result. A name that holds ``#`` is
quoted, so that no row looks like a comment. Text is UTF-8; a file name that is not text has its
bytes as ``\\udcXX``.

Rows are appended in the order of the pairs. A torn row, of a process that was killed or a disk that
was full, is cut off before the run goes on, so that the file ends up the same as without the
interruption. While a run writes, it holds a lock on the file, which ends with its process.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from .evaluating import Row

__all__ = ["DIGITS", "ResultFile", "ResultFileError", "Statistics"]

#: Decimals of a distance. One step is about the rounding of a float32 near 0.1.
DIGITS = 8

_FIRST_KEY = "lpips-fast"


class ResultFileError(RuntimeError):
    """The file cannot be written, or belongs to another run; the message is one sentence."""


@dataclass
class Statistics:
    """Mean and standard error of the distances as written, in exact arithmetic."""

    count: int = 0
    _sum: int = 0  # in units of the last decimal
    _sum_of_squares: int = 0

    def add(self, distance: float) -> None:
        steps = int(_number_text(distance).replace(".", ""))
        self.count += 1
        self._sum += steps
        self._sum_of_squares += steps * steps

    @property
    def mean(self) -> float | None:
        """``None`` of nothing."""
        return float(Fraction(self._sum, self.count * 10**DIGITS)) if self.count else None

    @property
    def standard_error(self) -> float | None:
        """Sample standard deviation over the square root of the count; ``None`` below two."""
        if self.count < 2:
            return None
        deviations = self._sum_of_squares - Fraction(self._sum**2, self.count)
        return math.sqrt(deviations / (self.count * (self.count - 1))) / 10**DIGITS


class ResultFile:
    """The CSV file of one run, open and locked; a context manager.

    Args:
        path: where it is, or is to be. Its folder exists.
        header: how the run measures, in the order in which to write it. Of the same header and
            names, a run makes the same file.
        columns: the names of the distances' columns.
        names: of all pairs, in order.
        overwrite: begin again, whatever is there.

    Attributes:
        done: rows that are in the file.
        statistics: of each column.
        failed: the rows with an error.

    Raises:
        ResultFileError: the file cannot be opened; another run writes to it; or what is there was
            made with another header or other names.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: Mapping[str, str],
        columns: Sequence[str],
        names: Sequence[str],
        *,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.columns = list(columns)
        self.names = names
        self.done = 0
        self.statistics = [Statistics() for _ in columns]
        self.failed: list[Row] = []
        if self.path.exists() and not self.path.is_file():
            raise ResultFileError(f"cannot write {self.path}: it is not a regular file")
        try:
            # Unbuffered: what was written is with the system, whatever becomes of this process.
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0))
            self._file = os.fdopen(descriptor, "r+b", buffering=0)
        except OSError as error:
            raise ResultFileError(f"cannot write {self.path}: {error.strerror}") from error
        try:
            self._lock()
            if overwrite:
                self._file.truncate(0)
            self._end = self._continue(_header_text(header, self.columns))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and with it the lock."""
        self._file.close()

    def append(self, rows: Sequence[Row], first: int) -> None:
        """Write rows, of which ``first`` is the number of the first; those that are there stay.

        Raises:
            ResultFileError: the disk is full, or whatever else the system says. All rows written
                before are whole.
        """
        assert first <= self.done
        rows = rows[self.done - first :]
        self._write("".join(map(_row_text, rows)))
        for row in rows:
            self._count(row)

    def finish(self) -> None:
        """Write the result below the rows, and wait until the disk has all of it."""
        assert self.done == len(self.names)
        self._write(self._summary_text())
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error

    # ---------------------------------------------------------------------------- writing

    def _write(self, text: str) -> None:
        data = memoryview(text.encode("utf-8", "backslashreplace"))
        try:
            self._file.seek(self._end)
            while data:
                data = data[self._file.write(data) :]
            self._end = self._file.tell()
            self._file.truncate(self._end)  # the summary of a run that ended here before
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> ResultFileError:
        return ResultFileError(
            f"cannot write {self.path}: {error.strerror}; its {self.done} rows are whole, and the "
            "same command goes on from there"
        )

    def _count(self, row: Row) -> None:
        self.done += 1
        for distance, statistics in zip(row.distances, self.statistics):
            if distance is not None:
                statistics.add(distance)
        if row.error:
            self.failed.append(row)

    def _summary_text(self) -> str:
        lines = []
        for column, statistics in zip(self.columns, self.statistics):
            mean, error = (
                "none" if x is None else _number_text(x)
                for x in (statistics.mean, statistics.standard_error)
            )
            of_column = f" of {column}" if len(self.columns) > 1 else ""
            lines += [
                f"pairs measured{of_column}: {statistics.count}",
                f"mean{of_column}: {mean}",
                f"standard error{of_column}: {error}",
            ]
        lines.append(f"pairs failed: {len(self.failed)}")
        return "".join(f"# {line}\n" for line in lines)

    # ---------------------------------------------------------------------------- going on

    def _lock(self) -> None:
        try:
            _lock_file(self._file.fileno())
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise ResultFileError(
                    f"another run is writing to {self.path}; wait for it, or name another file"
                ) from error
            raise ResultFileError(
                f"cannot lock {self.path}: {error.strerror}; name a file on another file system"
            ) from error

    def _continue(self, header: str) -> int:
        """Take over the rows that are there, and return where the next one goes."""
        wanted = header.encode("utf-8", "backslashreplace")
        self._file.seek(0)
        start = self._file.read(len(wanted))
        if start != wanted:
            if not wanted.startswith(start):  # else: nothing there, or killed in mid-header
                self._refuse(header)
            self._end = 0
            self._write(header)
            return self._end
        end = len(wanted)
        with open(self.path, "rb") as file:
            file.seek(end)
            for fields, row_end in _rows_of(file, end):
                self._take_over(fields)
                end = row_end
        return end

    def _take_over(self, fields: list[str]) -> None:
        damaged = ResultFileError(
            f"{self.path} is damaged at row {self.done + 1}; pass --overwrite to begin again"
        )
        if len(fields) != len(self.columns) + 2:
            raise damaged
        name, *distances, error = fields
        expected = (
            _as_written(self.names[self.done]) if self.done < len(self.names) else "none further"
        )
        if name != expected:
            raise ResultFileError(
                f"{self.path} was made of other files: its row {self.done + 1} is {name!r}, "
                f"expected {expected!r}; name another file, or pass --overwrite to begin again"
            )
        try:
            values = tuple(float(text) if text else None for text in distances)
        except ValueError as cause:
            raise damaged from cause
        self._count(Row(self.names[self.done], values, error))

    def _refuse(self, header: str) -> None:
        self._file.seek(0)
        text = self._file.read(1 << 16).decode("utf-8", "replace")
        theirs, ours = _header_of(text), _header_of(header)
        if _FIRST_KEY not in theirs:
            raise ResultFileError(
                f"{self.path} is there and was not made by lpips-fast; name another file, or pass "
                "--overwrite to replace it"
            )
        differences = [
            f"{key} is {theirs.get(key, 'not given')} there and {ours.get(key, 'not given')} here"
            for key in {**ours, **theirs}
            if theirs.get(key) != ours.get(key)
        ]
        raise ResultFileError(
            f"{self.path} was made in another way: "
            f"{'; '.join(differences) or 'its header is damaged'}; "
            "name another file, or pass --overwrite to begin again"
        )


# ------------------------------------------------------------------------------ the text


def _header_text(header: Mapping[str, str], columns: Sequence[str]) -> str:
    assert next(iter(header)) == _FIRST_KEY
    lines = [f"# {key}: {_one_line(value)}\n" for key, value in header.items()]
    return "".join(lines) + ",".join(("name", *columns, "error")) + "\n"


def _header_of(text: str) -> dict[str, str]:
    """Keys and values of the comments above the rows; the columns' names are one more."""
    facts = {}
    for line in text.splitlines():
        if not line.startswith("# "):
            facts["columns"] = line
            break
        key, _, value = line[2:].partition(": ")
        facts[key] = value
    return facts


def _row_text(row: Row) -> str:
    numbers = ("" if d is None else _number_text(d) for d in row.distances)
    return ",".join((_field(row.name), *numbers, _field(_one_line(row.error)))) + "\n"


def _number_text(value: float) -> str:
    return f"{value:.{DIGITS}f}"


def _field(text: str) -> str:
    # As the csv module quotes, and `#` besides: readers that know comments look for it.
    if any(character in text for character in ',"\r\n#') or text != text.strip():
        return '"' + text.replace('"', '""') + '"'
    return text


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


def _as_written(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _rows_of(file: io.BufferedReader, start: int) -> Iterator[tuple[list[str], int]]:
    """Whole rows and where each ends, up to the summary or to a row that was torn."""
    end = start
    torn = False

    def lines() -> Iterator[str]:
        nonlocal end, torn
        inside_a_row = False
        for line in file:
            if line.startswith(b"# ") and not inside_a_row:
                return
            end += len(line)
            torn = not line.endswith(b"\n")
            # A name may hold a newline: quotes that have not been closed go on to the next line.
            inside_a_row ^= line.count(b'"') % 2 == 1
            yield line.decode("utf-8", "replace")
        torn = torn or inside_a_row

    for fields in csv.reader(lines()):
        if torn:
            return
        yield fields, end


# ------------------------------------------------------------------------------ the lock

if sys.platform == "win32":
    import msvcrt

    def _lock_file(descriptor: int) -> None:
        # One byte far behind the end: Windows would keep readers from a byte that is locked.
        os.lseek(descriptor, 1 << 40, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock_file(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
