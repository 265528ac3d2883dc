"""The CSV file of a run and its record, written side by side, and taken up again.

The CSV (:mod:`.csv_text`) has a header row and one row a pair, in the order of the pairs. The
record beside it (:mod:`.record`) has the same numbers, how they were made, and by what each file is
known again. A row is written to the record first: whatever becomes of the process, the record has
all that the CSV has, and the CSV can be made of it.

**One rule decides what a run that goes on does: its file is to be what a fresh run would give, byte
for byte.** So a row is kept if its images, and those that were measured together with it, are the
same files as then. All else is measured, and what that is is said: images that changed, that came
or went, and rows with an error. A file that was made in another way, or that somebody edited, is
refused and stays as it is.

While a run writes, it holds a lock on both files. A row that was torn, of a process that was killed
or a disk that was full, is cut off.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import math
import os
import stat
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from ..images.files import Fingerprint, fingerprint_of
from . import csv_text, record
from .evaluating import Row
from .file_lock import lock_file
from .pairing import Pair
from .record import Key, Recorded, RecordError
from .summary import Statistics, number_text

__all__ = ["GoingOn", "ResultFile", "ResultFileError", "ResultStream", "Results", "record_path"]

_REMEDY = "name another file, or pass --overwrite to begin again"


class ResultFileError(RuntimeError):
    """The file cannot be written, or belongs to another run; the message is one sentence."""


@dataclass
class GoingOn:
    """What a run found of an earlier one, by the names of pairs.

    Attributes:
        kept: how many rows stay as they are.
        changed: an image of theirs is another file now.
        failed: they have an error, and are tried again.
        gone: no longer among the pairs.
        new: not measured yet, though the earlier run had come to its end.
    """

    kept: int = 0
    changed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)


def record_path(path: Path) -> Path:
    """Where the record of a CSV file lies.

    >>> record_path(Path("a/scores.csv")).name
    'scores.csv.jsonl'
    """
    return path.with_name(f"{path.name}.jsonl")


class Results:
    """The rows of a run as they come, and their text.

    Args:
        columns: the names of the numbers.
        pairs: all of them, in order.

    Attributes:
        done: how many rows there are.
        numbers: of each column one a row; NaN is one that could not be had.
        failed: the rows with an error.
    """

    def __init__(self, columns: Sequence[str], pairs: Sequence[Pair]) -> None:
        self.columns = list(columns)
        self.pairs = pairs
        self.done = 0
        self.numbers = [array("d") for _ in columns]
        self.failed: list[Row] = []
        self._has_folders = any(pair.folder for pair in pairs)

    def _count(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.done += 1
            for value, numbers in zip(row.values, self.numbers):
                numbers.append(math.nan if value is None else float(number_text(value)))
            if row.error:
                self.failed.append(row)

    def _row_text(self, row: Row) -> str:
        labels = (row.name, row.folder) if self._has_folders else (row.name,)
        return csv_text.record_text(labels, row.values, row.error)

    def _header_text(self) -> str:
        labels = ("name", "folder") if self._has_folders else ("name",)
        return csv_text.header_text([*labels, *self.columns, "error"])

    def statistics(self, folder: str = "") -> dict[str, Statistics]:
        """Of each column, of the rows of one folder."""
        rows = [k for k, pair in enumerate(self.pairs[: self.done]) if pair.folder == folder]
        return {
            name: Statistics.of(v for v in (numbers[k] for k in rows) if not math.isnan(v))
            for name, numbers in zip(self.columns, self.numbers)
        }

    def differences(self, folder: str, reference: str) -> dict[str, Statistics]:
        """Of each column, one folder's number less another's, of the images that both have."""
        rows: dict[str, dict[str, int]] = {folder: {}, reference: {}}
        for k, pair in enumerate(self.pairs[: self.done]):
            if pair.folder in rows:
                rows[pair.folder][pair.name] = k
        common = [(k, rows[reference][n]) for n, k in rows[folder].items() if n in rows[reference]]
        return {
            name: Statistics.of(
                numbers[k] - numbers[r]
                for k, r in common
                # NaN is a pair that failed; of an infinite PSNR no difference can be had.
                if math.isfinite(numbers[k]) and math.isfinite(numbers[r])
            )
            for name, numbers in zip(self.columns, self.numbers)
        }

    def folders(self) -> list[str]:
        """The labels of the folders, in order; one that is empty if there is one folder."""
        return list(dict.fromkeys(pair.folder for pair in self.pairs))

    def summary(self) -> dict[str, object]:
        """Each column's statistics by folder, and the number of pairs that failed."""
        columns = {
            folder: {name: s.summary() for name, s in self.statistics(folder).items()}
            for folder in self.folders()
        }
        return {"columns": columns, "pairs": len(self.pairs), "failed": len(self.failed)}


class ResultStream(Results):
    """The rows of a run as CSV on a stream, which keeps no record and is not taken up again."""

    def __init__(self, stream: TextIO, columns: Sequence[str], pairs: Sequence[Pair]) -> None:
        super().__init__(columns, pairs)
        self._stream = stream
        self._write(self._header_text())

    def append(self, rows: Sequence[Row], first: int) -> None:
        """Write rows, of which ``first`` is the number of the first.

        Raises:
            BrokenPipeError: nobody reads the stream any more.
            ResultFileError: it takes no more.
        """
        assert first == self.done
        self._write("".join(map(self._row_text, rows)))
        self._count(rows)

    def _write(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ResultFileError(f"cannot write to standard output: {error.strerror}") from error


class ResultFile(Results):
    """The CSV file of one run and its record, open and locked; a context manager.

    Args:
        path: where the CSV is, or is to be. Its folder exists.
        settings: how the run measures. Of the same settings and files, a run makes the same CSV.
        columns: the names of the numbers.
        pairs: all of them, in order.
        chunks: the runs of pairs that are measured together; one after the other they are all.
        overwrite: begin again, whatever is there.

    Attributes:
        pending: the chunks that are to be measured.
        found: what is there of an earlier run; ``None`` if nothing is.

    Raises:
        ResultFileError: a file cannot be opened; another run writes to it; or what is there was
            made in another way, damaged or edited.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: Mapping[str, str],
        columns: Sequence[str],
        pairs: Sequence[Pair],
        chunks: Sequence[range],
        *,
        overwrite: bool = False,
    ) -> None:
        super().__init__(columns, pairs)
        self.path = Path(path)
        self.settings = settings
        self.found: GoingOn | None = None
        self._chunks = list(chunks)
        self._kept: dict[int, list[Recorded]] = {}  # by their chunk
        with contextlib.ExitStack() as stack:
            self._csv = stack.enter_context(_OpenFile(self.path))
            self._record = stack.enter_context(_OpenFile(record_path(self.path)))
            if overwrite:
                self._csv.cut(0)
                self._record.cut(0)
            self._begin()
            self._stack = stack.pop_all()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close both files and with them the locks."""
        self._stack.close()

    @property
    def pending(self) -> list[range]:
        return [chunk for chunk in self._chunks if chunk.start not in self._kept]

    def append(self, rows: Sequence[Row], first: int) -> None:
        """Write the rows of a chunk of :attr:`pending`, and those that were kept behind it.

        Args:
            rows: of the whole chunk.
            first: where it begins; chunks come in order.

        Raises:
            ResultFileError: the disk is full, or whatever else the system says; or a file was
                removed, replaced or written to. All rows written before are whole.
        """
        assert first == self.done
        self._look_after_files()
        batch = self._batch([self._key(row) for row in rows], [row.files for row in rows])
        lines = "".join(record.row_line(row, batch) for row in rows)
        self._guarded(self._record.append, lines)
        self._write_rows(rows)
        self._write_kept()

    def finish(self) -> None:
        """Write the summary to the record, and wait until the disk has all of it.

        Raises:
            ResultFileError: as :meth:`append`.
        """
        assert self.done == len(self.pairs)
        self._look_after_files()
        line = record.summary_line(self.summary())
        if line != self._last_line:
            self._guarded(self._record.append, line)
        for file in (self._record, self._csv):
            self._guarded(file.sync)

    # ---------------------------------------------------------------------------- writing

    def _write_rows(self, rows: Sequence[Row]) -> None:
        self._guarded(self._csv.append, "".join(map(self._row_text, rows)))
        self._count(rows)

    def _write_kept(self) -> None:
        """The rows that are kept and come next."""
        while self.done in self._kept:
            first = self.done
            kept = self._kept[first]
            keys = [self._key(pair) for pair in self.pairs[first : first + len(kept)]]
            self._write_rows([recorded.row(key) for key, recorded in zip(keys, kept)])
            self._kept[first] = []  # its place says that it is not to be measured

    def _guarded(self, write: object, *text: str) -> None:
        try:
            write(*text)  # type: ignore[operator]
        except _WriteError as error:
            raise ResultFileError(
                f"{error}; the {self.done} rows of {self.path} are whole, and the same command "
                "goes on from there"
            ) from error

    def _look_after_files(self) -> None:
        for file in (self._csv, self._record):
            reason = file.trouble()
            if reason:
                raise ResultFileError(
                    f"{file.path} {reason} while this run wrote to it; "
                    f"{self.done} of {len(self.pairs)} pairs had been measured"
                )

    # ---------------------------------------------------------------------------- going on

    def _begin(self) -> None:
        record_lines = self._whole_lines_of_record()
        csv_bytes = self._csv.read()
        self._last_line = ""
        if not record_lines:
            if csv_bytes:
                self._refuse_foreign(csv_bytes)
            self._record.cut(0)
            self._guarded(self._record.append, record.first_line(self.settings, self.columns))
            self._csv.cut(0)
            self._guarded(self._csv.append, self._header_text())
            return
        rows = self._take_up(record_lines)
        text = self._check_csv(csv_bytes, rows)
        self._record.cut(sum(map(len, record_lines)))  # not before: what is refused stays as it is
        self._keep(rows)
        # What stays as it is is not written again: of a finished run, nothing is.
        self._csv.begin_with(text)
        self._guarded(self._csv.append, self._header_text())
        self._write_kept()
        self._csv.cut_here()

    def _whole_lines_of_record(self) -> list[str]:
        content = self._record.read()
        whole = content.rfind(b"\n") + 1
        return content[:whole].decode("ascii", "replace").splitlines(keepends=True)

    def _take_up(self, lines: list[str]) -> dict[Key, list[Recorded]]:
        try:
            settings, columns, rows, self._last_line = record.parse_lines(lines)
        except RecordError as error:
            raise ResultFileError(
                f"{self._record.path} is damaged, {error}; put it right, or {_REMEDY}"
            ) from error
        theirs = {**settings, "columns": ", ".join(columns)}
        ours = {**self.settings, "columns": ", ".join(self.columns)}
        differences = [
            f"{key} is {theirs.get(key, 'not given')} there and {ours.get(key, 'not given')} here"
            for key in {**ours, **theirs}
            if theirs.get(key) != ours.get(key)
        ]
        if differences:
            raise ResultFileError(
                f"{self.path} was made in another way: {'; '.join(differences)}; {_REMEDY}"
            )
        return rows

    def _refuse_foreign(self, content: bytes) -> None:
        if content.startswith(b"# lpips-fast:"):
            raise ResultFileError(
                f"{self.path} was written by lpips-fast 0.1, whose files this version does not go "
                f"on with; {_REMEDY}"
            )
        if content.decode("utf-8", "replace").startswith(self._header_text()):
            raise ResultFileError(
                f"{self.path} is there without {self._record.path.name}, which says how it was "
                f"made and what of it holds; put that beside it, or {_REMEDY}"
            )
        raise ResultFileError(
            f"{self.path} is there and was not made by lpips-fast; name another file, or pass "
            "--overwrite to replace it"
        )

    def _check_csv(self, content: bytes, rows: dict[Key, list[Recorded]]) -> str:
        """The CSV's whole rows, of which each is one that the record has; else it was edited."""
        text = content.decode("utf-8", "replace")
        known = {csv_text.as_written(self._header_text())}
        for key, versions in rows.items():
            known.update(self._row_text(version.row(key)) for version in versions)
        end = 0
        for number, (written, is_whole) in enumerate(csv_text.split_records(text)):
            if not is_whole:
                break  # torn: it is written again
            if (number == 0) != (written == self._header_text()) or written not in known:
                self._refuse_edited(number, written, rows)
            end += len(written)
        return text[:end]

    def _refuse_edited(self, number: int, written: str, rows: dict[Key, list[Recorded]]) -> None:
        header = csv_text.fields_of(self._header_text())
        fields = csv_text.fields_of(written)
        expected = [header] if number == 0 else []
        for key, versions in rows.items() if number else ():
            shown = csv_text.fields_of(self._row_text(versions[-1].row(key)))
            labels = 2 if self._has_folders else 1
            if fields[:labels] == shown[:labels]:
                expected.append(shown)
        where = f"row {number}" if number else "the header row"
        what = f"is {written.rstrip()!r}, which is not there"
        for candidate in expected:
            if len(candidate) != len(fields):
                what = f"has {len(fields)} cells here and {len(candidate)} there"
                continue
            what = "has other quotes or another line end here than there"
            for column, cell, original in zip(header, fields, candidate):
                if cell != original:
                    what = f"has {cell!r} in column {column} here and {original!r} there"
                    break
        raise ResultFileError(
            f"{self.path} does not agree with {self._record.path.name}, so one of them was edited: "
            f"{where} {what}; undo that, or {_REMEDY}"
        )

    def _keep(self, rows: dict[Key, list[Recorded]]) -> None:
        """Decide which chunks stay as they are, and what is to be said of the others."""
        found = GoingOn()
        keys = [self._key(pair) for pair in self.pairs]
        is_finished = '"summary"' in self._last_line[:16]
        present = set(keys)
        found.gone = [_told(key) for key in rows if key not in present]
        fingerprint = functools.lru_cache(maxsize=64)(fingerprint_of)  # one image, many partners
        for chunk in self._chunks:
            kept: list[Recorded] = []
            files = []
            for key, pair in zip(
                keys[chunk.start : chunk.stop], self.pairs[chunk.start : chunk.stop]
            ):
                if key not in rows:
                    if is_finished:
                        found.new.append(_told(key))
                    continue
                recorded = rows[key][-1]
                if recorded.error:
                    found.failed.append(_told(key))
                    continue
                now = tuple(map(fingerprint, pair.files))
                if now != recorded.files:
                    found.changed.append(_told(key))
                    continue
                kept.append(recorded)
                files.append(now)
            if len(kept) == len(chunk):
                batch = self._batch(keys[chunk.start : chunk.stop], files)
                if all(recorded.batch == batch for recorded in kept):
                    self._kept[chunk.start] = kept
                    found.kept += len(kept)
        self.found = found if rows else None

    def _key(self, of: Row | Pair) -> Key:
        return (of.name, of.folder)

    def _batch(
        self,
        keys: Sequence[Key],
        files: Sequence[tuple[Fingerprint | None, ...]],
    ) -> str:
        return hashlib.sha256(repr((list(keys), list(files))).encode()).hexdigest()[:16]


def _told(key: Key) -> str:
    return f"{key[1]}/{key[0]}" if key[1] else key[0]


# ------------------------------------------------------------------------------ one file


class _WriteError(Exception):
    """The system refuses to write; the message names the file."""


class _OpenFile:
    """A regular file, open for reading and writing, locked; its end is where this class wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end = 0
        self._there = b""  # what lies behind the end, and need not be written again
        if path.exists() and not path.is_file():
            raise ResultFileError(f"cannot write {path}: it is not a regular file")
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            # Unbuffered: what was written is with the system, whatever becomes of this process.
            self._file: io.FileIO = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        except OSError as error:
            raise ResultFileError(f"cannot write {path}: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise ResultFileError(f"cannot write {path}: it is not a regular file")
            self._lock()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> _OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            lock_file(self._file.fileno())
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise ResultFileError(
                    f"another run is writing to {self.path}; wait for it, or name another file"
                ) from error
            raise ResultFileError(
                f"cannot lock {self.path}: {error.strerror}; name a file on another file system"
            ) from error

    def read(self) -> bytes:
        """All of it."""
        self._file.seek(0)
        return self._file.readall()

    def cut(self, end: int) -> None:
        """Keep so many bytes, and write behind them from now on."""
        self._end = end
        self._there = b""
        if os.fstat(self._file.fileno()).st_size > end:
            self._file.truncate(end)

    def begin_with(self, text: str) -> None:
        """Write from the start, where ``text`` is there already."""
        self._end, self._there = 0, text.encode("utf-8")

    def cut_here(self) -> None:
        """Take away what is there behind what was written."""
        self.cut(self._end)

    def append(self, text: str) -> None:
        """Write, or find that it is there.

        Raises:
            _WriteError: and the file ends where it did.
        """
        data = text.encode("utf-8", "backslashreplace")
        if self._there.startswith(data):
            self._there = self._there[len(data) :]
            self._end += len(data)
            return
        rest = memoryview(data)
        try:
            if self._there:
                self._there = b""
                self._file.truncate(self._end)
            self._file.seek(self._end)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise _WriteError(f"cannot write {self.path}: {error.strerror}") from error
        self._end += len(data)

    def sync(self) -> None:
        """Wait until the disk has it.

        Raises:
            _WriteError: it has not.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _WriteError(f"cannot write {self.path}: {error.strerror}") from error

    def trouble(self) -> str:
        """What another program did to the file; empty if nothing."""
        here = os.fstat(self._file.fileno())
        try:
            there = os.stat(self.path)
        except OSError:
            return "was removed"
        if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
            return "was replaced"
        return "was written to by another program" if here.st_size != self._end else ""
