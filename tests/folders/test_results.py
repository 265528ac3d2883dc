"""The CSV file: what is in it, what it refuses, and that a torn one goes on to the same bytes."""

from __future__ import annotations

import csv
import errno
import math
import os
import statistics
from pathlib import Path

import pytest
import torch

from lpips_fast.folders.evaluating import Row
from lpips_fast.folders.results import DIGITS, ResultFile, ResultFileError, Statistics

HEADER = {"lpips-fast": "1.2.3", "net": "alex", "folder A": "two\nwords, ü"}
NAMES = [
    "1.png",
    "two words.png",
    'q"uote, comma.png',
    "#1.png",
    "# 2: x.png",
    "画像.png",
    "new\nline.png",
    "ret\rurn.png",
    " edge .png",
    "last.png",
]


def random_rows(names: list[str] = NAMES, columns: int = 1) -> list[Row]:
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    rows = []
    for i, name in enumerate(names):
        values = torch.rand(columns, generator=generator).tolist()
        rows.append(Row(name, tuple(values)))
        if i % 4 == 2:
            rows[-1] = Row(name, (None,) * columns, f"cannot read\n'{name}', it is damaged")
    return rows


def open_file(path: Path, **options) -> ResultFile:
    arguments = {"header": HEADER, "columns": ["distance"], "names": NAMES, **options}
    return ResultFile(path, **arguments)


def write(path: Path, rows: list[Row], **options) -> bytes:
    with open_file(path, **options) as file:
        for first in range(0, len(rows), 3):
            if first + 3 > file.done:
                file.append(rows[first : first + 3], first)
        file.finish()
    return path.read_bytes()


# ------------------------------------------------------------------------------- contents


def test_what_is_in_it(tmp_path: Path) -> None:
    rows = random_rows()
    text = write(tmp_path / "out.csv", rows).decode()
    lines = text.split("\n")
    assert lines[:4] == [
        "# lpips-fast: 1.2.3",
        "# net: alex",
        "# folder A: two words, ü",
        "name,distance,error",
    ]
    assert lines[-1] == "" and lines[-2] == "# pairs failed: 2"
    # Nothing but comments begins with a hash, so that a reader may drop such lines.
    body = "\n".join(line for line in text.split("\n") if not line.startswith("#"))
    read = list(csv.reader(body.splitlines(keepends=True)))
    assert [fields[0] for fields in read[1:]] == [row.name for row in rows]
    for row, (_, distance, error) in zip(rows, read[1:], strict=True):
        if row.distances[0] is None:
            assert distance == "" and error == f"cannot read '{row.name}', it is damaged".replace(
                "\n", " "
            ).replace("\r", " ")
        else:
            assert error == "" and len(distance.split(".")[1]) == DIGITS
            assert float(distance) == pytest.approx(row.distances[0], abs=0.6 * 10**-DIGITS)


def test_several_columns(tmp_path: Path) -> None:
    rows = [Row("a", (0.5, None), "too small"), Row("b", (0.25, 0.125))]
    text = write(tmp_path / "out.csv", rows, columns=["x", "y"], names=["a", "b"]).decode()
    assert "name,x,y,error\na,0.50000000,,too small\nb,0.25000000,0.12500000,\n" in text
    assert "# pairs measured of x: 2\n# mean of x: 0.37500000\n" in text
    assert (
        "# pairs measured of y: 1\n# mean of y: 0.12500000\n# standard error of y: none\n" in text
    )


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    rows = [Row(name, (0.5,))]
    whole = write(tmp_path / "out.csv", rows, names=[name])
    assert b"\n\\udcff.png,0.50000000,\n" in whole
    whole.decode("utf-8")
    with open_file(tmp_path / "out.csv", names=[name]) as file:
        assert file.done == 1


# ------------------------------------------------------------------------------- statistics


def test_statistics_are_those_of_the_numbers_as_written(tmp_path: Path) -> None:
    values = [row.distances[0] for row in random_rows([str(i) for i in range(101)])]
    written = [round(v, DIGITS) for v in values if v is not None]
    result = Statistics()
    for value in values:
        if value is not None:
            result.add(value)
    assert result.count == len(written)
    assert result.mean == pytest.approx(statistics.mean(written), rel=1e-14)
    expected = statistics.stdev(written) / math.sqrt(len(written))
    assert result.standard_error == pytest.approx(expected, rel=1e-12)


def test_statistics_of_too_little() -> None:
    result = Statistics()
    assert (result.mean, result.standard_error) == (None, None)
    result.add(0.25)
    assert (result.mean, result.standard_error) == (0.25, None)
    result.add(0.25)
    assert (result.mean, result.standard_error) == (0.25, 0.0)


# ------------------------------------------------------------------------------- going on


def test_a_file_cut_anywhere_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    rows = random_rows()
    whole = write(tmp_path / "whole.csv", rows)
    cut = tmp_path / "cut.csv"
    for length in range(len(whole) + 1):
        cut.write_bytes(whole[:length])
        assert write(cut, rows) == whole, f"cut after {length} bytes"


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    rows, path = random_rows(), tmp_path / "out.csv"
    with open_file(path) as file:
        file.append(rows[:4], 0)
    with open_file(path) as file:
        assert file.done == 4
        assert [row.name for row in file.failed] == [rows[2].name]
        other = [Row(name, (9.0,)) for name in NAMES]
        file.append(other, 0)
        assert file.done == len(NAMES)
    assert path.read_text().count("9.00000000") == len(NAMES) - 4


def test_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("something else, and longer than what comes\n" * 100)
    rows = random_rows()
    assert write(path, rows, overwrite=True) == write(tmp_path / "other.csv", rows)


# ------------------------------------------------------------------------------- refusals


def test_another_header_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    before = write(path, random_rows())
    header = {**HEADER, "net": "vgg", "crop": "none"}
    with pytest.raises(
        ResultFileError,
        match=r"out\.csv was made in another way: net is alex there and vgg here; "
        r"crop is not given there and none here; name another file, or pass --overwrite",
    ):
        open_file(path, header=header)
    with pytest.raises(ResultFileError, match="columns is name,distance,error there and name,x,e"):
        open_file(path, columns=["x"])
    assert path.read_bytes() == before


def test_other_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    before = write(path, random_rows())
    with pytest.raises(ResultFileError, match=r"its row 2 is 'two words\.png', expected 'new'"):
        open_file(path, names=[NAMES[0], "new", *NAMES[1:]])
    with pytest.raises(
        ResultFileError, match=r"its row 10 is 'last\.png', expected 'none further'"
    ):
        open_file(path, names=NAMES[:-1])
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["name,distance\n1.png,0.5\n", "\0\x01", "# note: mine\n"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "out.csv"
    path.write_text(content)
    with pytest.raises(ResultFileError, match=r"is there and was not made by lpips-fast"):
        open_file(path)
    assert path.read_text() == content


@pytest.mark.parametrize("damage", ["\n", "1.png\n", "1.png,much,\n"])
def test_a_damaged_row_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "out.csv"
    with open_file(path) as file:
        file.append([Row("1.png", (0.5,))], 0)
    with path.open("a") as more:
        more.write(damage.replace("1.png", "two words.png") + "x,1,\n")
    with pytest.raises(ResultFileError, match=r"is damaged at row 2; pass --overwrite"):
        open_file(path)


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    with open_file(path), pytest.raises(ResultFileError, match="another run is writing to"):
        open_file(path, overwrite=True)
    with open_file(path) as file:
        assert file.done == 0


def test_a_refused_file_is_not_left_locked(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("something else")
    for _ in range(2):
        with pytest.raises(ResultFileError, match="was not made by lpips-fast"):
            open_file(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ResultFileError, match="it is not a regular file"):
        open_file(tmp_path)
    with pytest.raises(ResultFileError, match=r"cannot write .*: No such file or directory"):
        open_file(tmp_path / "gone" / "out.csv")


# ------------------------------------------------------------------------------- a full disk


class FullDisk:
    """Stands in the file's place: takes some bytes more, in part of a write, then none."""

    def __init__(self, file, room: int) -> None:
        self._file, self.room = file, room

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def write(self, data) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[: self.room]
        self.room -= len(part)
        return self._file.write(part)


@pytest.mark.parametrize("room", [0, 1, 40, 150])
def test_a_full_disk_leaves_whole_rows(tmp_path: Path, room: int) -> None:
    rows, path = random_rows(), tmp_path / "out.csv"
    whole = write(tmp_path / "whole.csv", rows)
    with open_file(path) as file:
        file.append(rows[:2], 0)
        intact = path.read_bytes()
        file._file = FullDisk(file._file, room)
        with pytest.raises(
            ResultFileError,
            match=r"No space left on device; its 2 rows are whole, and the same command goes on",
        ):
            file.append(rows[2:], 2)
    assert path.read_bytes() == intact
    assert write(path, rows) == whole
