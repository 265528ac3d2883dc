"""The CSV and its record: what is in them, what is refused, and that any cut heals."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lpips_fast.folders.evaluating import Row
from lpips_fast.folders.pairing import Pair
from lpips_fast.folders.results import (
    ResultFile,
    ResultFileError,
    ResultStream,
    record_path,
)
from lpips_fast.folders.summary import DIGITS
from lpips_fast.images.files import fingerprint_of

SETTINGS = {"lpips-fast": "1.2.3", "net": "alex", "folder A": "two\nwords, ü"}
NAMES = [
    "1.png",
    "two words.png",
    'q"uote, comma.png',
    "#1.png",
    "=1+1.png",
    "画像.png",
    "new\nline.png",
    "ret\rurn.png",
    " edge .png",
    "line\x85separator.png",
    os.fsdecode(b"\xff.png"),
    "last.png",
]
CHUNK = 3


def make_pairs(folder: Path, names: Sequence[str] = NAMES, folders: Sequence[str] = ("",)):
    """Pairs of files that are there, of which the results know nothing but the fingerprints."""
    pairs = []
    for name in names:
        for label in folders:
            paths = [folder / side / label / name for side in ("A", "B")]
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    path.write_bytes(os.fsencode(path))
            pairs.append(Pair(name, *paths, label))
    return pairs


def make_rows(pairs: Sequence[Pair], columns: int = 1, failing: Sequence[int] = (2, 8)):
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    rows = []
    for i, pair in enumerate(pairs):
        values = tuple(torch.rand(columns, generator=generator).tolist())
        files = (fingerprint_of(pair.path0), fingerprint_of(pair.path1))
        row = Row(pair.name, values, folder=pair.folder, files=files)
        if i in failing:
            error = f"cannot read\n'{pair.name}', it is damaged"
            row = Row(pair.name, (None,) * columns, error, pair.folder)
        rows.append(row)
    return rows


def open_file(path: Path, pairs: Sequence[Pair], **options) -> ResultFile:
    chunks = [range(i, min(i + CHUNK, len(pairs))) for i in range(0, len(pairs), CHUNK)]
    arguments = {"settings": SETTINGS, "columns": ["distance"], "chunks": chunks, **options}
    return ResultFile(path, pairs=pairs, **arguments)


def write(path: Path, pairs: Sequence[Pair], rows: Sequence[Row], **options) -> bytes:
    with open_file(path, pairs, **options) as file:
        for chunk in file.pending:
            file.append([rows[i] for i in chunk], chunk.start)
        file.finish()
    return path.read_bytes()


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    return make_pairs(tmp_path)


# ------------------------------------------------------------------------------- contents


def test_the_csv_is_a_header_and_rows(tmp_path: Path, pairs: list[Pair]) -> None:
    rows = make_rows(pairs)
    text = write(tmp_path / "out.csv", pairs, rows).decode()
    assert text.startswith("name,distance,error\n1.png,0.")
    read = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(read) == len(rows)
    for row, fields in zip(rows, read, strict=True):
        name = row.name.encode("utf-8", "backslashreplace").decode()
        assert fields["name"] == ("./=1+1.png" if name == "=1+1.png" else name)
        if row.error:
            assert fields["distance"] == ""
            assert fields["error"] == " ".join(row.error.splitlines())
        else:
            assert fields["error"] == "" and len(fields["distance"].split(".")[1]) == DIGITS
            value = float(fields["distance"])
            assert value == pytest.approx(row.values[0], abs=0.6 * 10**-DIGITS)


def test_pandas_opens_it(tmp_path: Path, pairs: list[Pair]) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    rows = make_rows(pairs)
    write(tmp_path / "out.csv", pairs, rows)
    frame = pandas.read_csv(tmp_path / "out.csv")
    assert list(frame.columns) == ["name", "distance", "error"] and len(frame) == len(rows)
    assert frame["distance"].isna().sum() == 2


def test_the_record_says_how_it_was_made(tmp_path: Path, pairs: list[Pair]) -> None:
    rows = make_rows(pairs)
    write(tmp_path / "out.csv", pairs, rows)
    lines = [json.loads(x) for x in (tmp_path / "out.csv.jsonl").read_text("ascii").splitlines()]
    assert lines[0] == {"lpips-fast": SETTINGS, "columns": ["distance"]}
    assert [line["name"] for line in lines[1:-1]] == [pair.name for pair in pairs]
    first = pairs[0].path0.stat()
    assert lines[1]["files"][0][:2] == [first.st_size, first.st_mtime_ns]
    assert lines[3]["files"] == [None, None] and lines[3]["values"] == [None]
    summary = lines[-1]["summary"]
    assert (summary["pairs"], summary["failed"]) == (12, 2)
    assert summary["columns"][""]["distance"]["count"] == 10


def test_several_columns_and_folders(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path, ["a", "b"], ["x", "y"])
    values = [(0.5, None), (0.25, float("inf")), (0.125, 30.0), (1.0, 20.0)]
    rows = [
        Row(
            pair.name,
            numbers,
            "too small" if None in numbers else "",
            pair.folder,
            (fingerprint_of(pair.path0), fingerprint_of(pair.path1)),
        )
        for pair, numbers in zip(pairs, values, strict=True)
    ]
    text = write(tmp_path / "out.csv", pairs, rows, columns=["distance", "psnr"]).decode()
    assert text == (
        "name,folder,distance,psnr,error\n"
        "a,x,0.50000000,,too small\n"
        "a,y,0.25000000,inf,\n"
        "b,x,0.12500000,30.00000000,\n"
        "b,y,1.00000000,20.00000000,\n"
    )
    with open_file(tmp_path / "out.csv", pairs, columns=["distance", "psnr"]) as file:
        file.append(rows[:3], 0)  # the last chunk stays
        assert file.folders() == ["x", "y"]
        assert file.statistics("x")["distance"].mean == pytest.approx(0.3125)
        differences = file.differences("y", "x")
        assert list(differences["distance"].values) == [-0.25, 0.875]
        assert list(differences["psnr"].values) == [-10.0]


def test_files_have_ordinary_permissions(tmp_path: Path, pairs: list[Pair]) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "out.csv", pairs, make_rows(pairs))
    finally:
        os.umask(before)
    for path in (tmp_path / "out.csv", tmp_path / "out.csv.jsonl"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_rows_on_a_stream(pairs: list[Pair]) -> None:
    rows, stream = make_rows(pairs[:2]), io.StringIO()
    output = ResultStream(stream, ["distance"], pairs[:2])
    output.append(rows[:1], 0)
    output.append(rows[1:], 1)
    assert stream.getvalue().startswith("name,distance,error\n1.png,0.")
    assert output.done == 2 and stream.getvalue().count("\n") == 3


# ------------------------------------------------------------------------------- going on


def cut_states(path: Path, whole: bytes, record: bytes):
    """Both files as a kill may leave them: the record is written first, a chunk at a time."""
    for length in range(0, len(record) + 1, 7):
        csv_end = 0
        if b"\n" in record[:length]:
            done = record[:length].count(b"\n") - 1
            ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
            csv_end = ends[min(done // CHUNK * CHUNK, len(ends) - 1)]
        yield record[:length], whole[:csv_end]


def test_a_kill_at_any_moment_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path, [name for name in NAMES if "\n" not in name])
    rows, path = make_rows(pairs), tmp_path / "out.csv"
    whole = write(path, pairs, rows)
    record = record_path(path).read_bytes()
    for record_part, csv_part in cut_states(path, whole, record):
        record_path(path).write_bytes(record_part)
        path.write_bytes(csv_part)
        assert write(path, pairs, rows) == whole, f"{len(record_part)}, {len(csv_part)} bytes"


def test_a_torn_csv_is_written_again_from_the_record(tmp_path: Path, pairs: list[Pair]) -> None:
    rows, path = make_rows(pairs, failing=()), tmp_path / "out.csv"
    whole = write(path, pairs, rows)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with open_file(path, pairs) as file:
            assert file.pending == [] and file.found and file.found.kept == len(pairs)
        assert path.read_bytes() == whole, f"cut after {length} bytes"
    path.unlink()
    open_file(path, pairs).close()
    assert path.read_bytes() == whole


def test_a_finished_run_writes_nothing(tmp_path: Path, pairs: list[Pair]) -> None:
    rows, path = make_rows(pairs, failing=()), tmp_path / "out.csv"
    write(path, pairs, rows)
    before = [(p.read_bytes(), p.stat().st_mtime_ns) for p in (path, record_path(path))]
    write(path, pairs, [])
    assert [(p.read_bytes(), p.stat().st_mtime_ns) for p in (path, record_path(path))] == before


def test_rows_with_an_error_are_tried_again_with_their_chunk(
    tmp_path: Path, pairs: list[Pair]
) -> None:
    rows, path = make_rows(pairs, failing=(4,)), tmp_path / "out.csv"
    write(path, pairs, rows)
    with open_file(path, pairs) as file:
        assert file.found and file.found.failed == [NAMES[4]] and file.found.kept == 9
        assert file.pending == [range(3, 6)] and file.done == 3
        again = make_rows(pairs, failing=())
        file.append(again[3:6], 3)
        assert file.done == len(pairs) and file.failed == []
        file.finish()
    with open_file(path, pairs) as file:
        assert file.pending == []
    expected = [*rows[:3], *again[3:6], *rows[6:]]
    assert path.read_bytes() == write(tmp_path / "fresh.csv", pairs, expected)


@pytest.mark.parametrize("how", ["content", "size", "time", "gone"])
def test_a_changed_image_is_measured_again_with_its_chunk(
    tmp_path: Path, pairs: list[Pair], how: str
) -> None:
    rows, path = make_rows(pairs, failing=()), tmp_path / "out.csv"
    write(path, pairs, rows)
    image = pairs[7].path1
    status = image.stat()
    if how == "content":
        image.write_bytes(image.read_bytes()[::-1])
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif how == "size":
        image.write_bytes(image.read_bytes() * 2)
    elif how == "time":
        os.utime(image, ns=(0, 0))
    else:
        image.unlink()
    with open_file(path, pairs) as file:
        assert file.found and file.found.changed == [NAMES[7]]
        assert file.pending == [range(6, 9)]


def test_a_pair_more_or_less_measures_again_what_shared_its_chunk(
    tmp_path: Path, pairs: list[Pair]
) -> None:
    rows, path = make_rows(pairs, failing=()), tmp_path / "out.csv"
    write(path, pairs, rows)
    with open_file(path, pairs[:-1]) as file:
        assert file.found and file.found.gone == [NAMES[-1]]
        assert file.pending == [range(9, 11)]
    more = [*pairs, *make_pairs(tmp_path, ["more.png"])]
    with open_file(path, more) as file:
        assert file.found and file.found.new == ["more.png"]
        assert file.pending == [range(12, 13)]


def test_of_what_was_measured_twice_the_last_holds(tmp_path: Path, pairs: list[Pair]) -> None:
    rows, path = make_rows(pairs, failing=()), tmp_path / "out.csv"
    write(path, pairs, rows)
    pairs[0].path0.write_text("another")
    again = make_rows(pairs, failing=())
    with open_file(path, pairs) as file:
        file.append(again[:3], 0)  # and then it is killed
    expected = write(tmp_path / "fresh.csv", pairs, [*again[:3], *rows[3:]])
    assert write(path, pairs, []) == expected


def test_overwrite(tmp_path: Path, pairs: list[Pair]) -> None:
    path = tmp_path / "out.csv"
    path.write_text("something else, and longer than what comes\n" * 100)
    record_path(path).write_text("something else\n")
    rows = make_rows(pairs)
    assert write(path, pairs, rows, overwrite=True) == write(tmp_path / "other.csv", pairs, rows)


# ------------------------------------------------------------------------------- refusals


def contents(path: Path) -> list[bytes | None]:
    return [p.read_bytes() if p.exists() else None for p in (path, record_path(path))]


def test_other_settings_are_refused_and_say_what_differs(tmp_path: Path, pairs: list[Pair]) -> None:
    path = tmp_path / "out.csv"
    write(path, pairs, make_rows(pairs))
    before = contents(path)
    settings = {**SETTINGS, "net": "vgg", "crop": "none"}
    with pytest.raises(
        ResultFileError,
        match=r"out\.csv was made in another way: net is alex there and vgg here; "
        r"crop is not given there and none here; name another file, or pass --overwrite",
    ):
        open_file(path, pairs, settings=settings)
    with pytest.raises(ResultFileError, match="columns is distance there and x here"):
        open_file(path, pairs, columns=["x"])
    assert contents(path) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\0\x01", "was not made by lpips-fast; name another file, or pass --overwrite"),
        ("a,b\n1.png,0.5\n", "was not made by lpips-fast"),
        ("# lpips-fast: 0.1.0\n# net: alex\n", r"was written by lpips-fast 0\.1, whose files"),
        ("name,distance,error\n1.png,0.5,\n", r"is there without out\.csv\.jsonl, which says how"),
    ],
)
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, pairs: list[Pair], content: str, message: str
) -> None:
    path = tmp_path / "out.csv"
    path.write_text(content)
    for _ in range(2):  # and it is not left locked
        with pytest.raises(ResultFileError, match=message):
            open_file(path, pairs)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "\n1.png,0.",
            "\n1.png,9.",
            r"row 1 has '9\.[0-9]+' in column distance here and '0\.[0-9]+'",
        ),
        ("last.png,", "least.png,", r"row 12 is 'least\.png,0\.[0-9]+,', which is not there"),
        ("error\n", "why\n", "the header row has 'why' in column error here and 'error' there"),
        ("last.png,", "last.png,,", "row 12 has 4 cells here and 3 there"),
        ("\n1.png", '\n"1.png"', "row 1 has other quotes or another line end here than there"),
        ("error\n", "error\n\n", "row 1 is '', which is not there"),
        ("error\n", "error\r\n", "header row has other quotes or another line end"),
    ],
)
def test_an_edited_csv_is_refused_with_row_and_column(
    tmp_path: Path, pairs: list[Pair], old: str, new: str, message: str
) -> None:
    path = tmp_path / "out.csv"
    write(path, pairs, make_rows(pairs))
    text = path.read_bytes().decode()
    assert text.count(old) == 1
    path.write_bytes(text.replace(old, new).encode())
    before = contents(path)
    with pytest.raises(ResultFileError, match=rf"does not agree with out\.csv\.jsonl.*{message}"):
        open_file(path, pairs)
    assert contents(path) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("not json", "line 2: it is no JSON"),
        ("[]", "line 2: it is no JSON object"),
        ("{}", "line 2: 'name' is no text"),
        ('{"name": 1}', "line 2: 'name' is no text"),
        ("[" * 5000, "line 2: it is no JSON"),
        ({"values": ["much"]}, "line 2: 'values' are not 1 numbers as text, or null"),
        ({"values": ["0.5"]}, "line 2: 'values' are not 1 numbers as text, or null"),
        ({"values": []}, "line 2: 'values' are not 1 numbers as text, or null"),
        ({"files": [None]}, "line 2: 'files' are not two, or three"),
        ({"files": [["x", 1, ""], None]}, "line 2: a file is not its size, time and digest"),
    ],
)
def test_a_damaged_record_is_refused_with_its_line(
    tmp_path: Path, pairs: list[Pair], damage: object, message: str
) -> None:
    path = tmp_path / "out.csv"
    write(path, pairs, make_rows(pairs))
    lines = record_path(path).read_text().splitlines()
    if isinstance(damage, dict):
        damage = json.dumps({**json.loads(lines[1]), **damage})
    lines[1] = str(damage)
    record_path(path).write_text("\n".join(lines) + "\n")
    before = contents(path)
    with pytest.raises(ResultFileError, match=rf"out\.csv\.jsonl is damaged, {message}; put it"):
        open_file(path, pairs)
    assert contents(path) == before


def test_a_torn_row_of_a_record_that_is_refused_stays(tmp_path: Path, pairs: list[Pair]) -> None:
    path = tmp_path / "out.csv"
    write(path, pairs, make_rows(pairs))
    path.write_bytes(path.read_bytes().replace(b"1.png", b"?.png", 1))
    record = record_path(path)
    record.write_bytes(record.read_bytes()[:-5])
    before = contents(path)
    with pytest.raises(ResultFileError, match="does not agree"):
        open_file(path, pairs)
    assert contents(path) == before


def test_a_number_that_was_edited_in_the_record_alone_is_found(
    tmp_path: Path, pairs: list[Pair]
) -> None:
    path = tmp_path / "out.csv"
    write(path, pairs, make_rows(pairs))
    text = record_path(path).read_text()
    record_path(path).write_text(text.replace('"values": ["0.', '"values": ["1.', 1))
    with pytest.raises(ResultFileError, match=r"does not agree .* row 1 has '0"):
        open_file(path, pairs)


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path, pairs: list[Pair]) -> None:
    path = tmp_path / "out.csv"
    link = tmp_path / "link.csv"
    with open_file(path, pairs):
        link.symlink_to(path)
        for name in (path, link):
            with pytest.raises(ResultFileError, match="another run is writing to"):
                open_file(name, pairs, overwrite=True)
    with open_file(path, pairs) as file:
        assert file.done == 0


def test_what_is_no_file(tmp_path: Path, pairs: list[Pair]) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    for name in (tmp_path, tmp_path / "pipe.csv", "/dev/full"):
        with pytest.raises(ResultFileError, match="it is not a regular file"):
            open_file(Path(name), pairs)
    with pytest.raises(ResultFileError, match=r"cannot write .*: No such file or directory"):
        open_file(tmp_path / "gone" / "out.csv", pairs)


@pytest.mark.parametrize("which", ["csv", "record"])
@pytest.mark.parametrize("how", ["removed", "replaced", "written to by another program"])
def test_a_file_that_somebody_touches_meanwhile_is_an_error(
    tmp_path: Path, pairs: list[Pair], which: str, how: str
) -> None:
    path, rows = tmp_path / "out.csv", make_rows(pairs)
    target = path if which == "csv" else record_path(path)
    with open_file(path, pairs) as file:
        file.append(rows[:3], 0)
        if how == "removed":
            target.unlink()
        elif how == "replaced":
            (tmp_path / "new").write_bytes(target.read_bytes())
            (tmp_path / "new").replace(target)
        else:
            with target.open("a") as other:
                other.write("mine\n")
        with pytest.raises(
            ResultFileError,
            match=rf"{target.name} was {how} while this run wrote to it; 3 of 12 pairs",
        ):
            file.append(rows[3:6], 3)
        with pytest.raises(ResultFileError, match=f"was {how}"):
            file.done = len(pairs)
            file.finish()


# ------------------------------------------------------------------------------- a full disk


class FullDisk:
    """Stands in a file's place: takes some bytes more, in part of a write, then none."""

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


@pytest.mark.parametrize("which", ["_csv", "_record"])
@pytest.mark.parametrize("room", [0, 1, 40, 150])
def test_a_full_disk_leaves_whole_rows(
    tmp_path: Path, pairs: list[Pair], which: str, room: int
) -> None:
    rows, path = make_rows(pairs), tmp_path / "out.csv"
    whole = write(tmp_path / "whole.csv", pairs, rows)
    with open_file(path, pairs) as file:
        file.append(rows[:3], 0)
        intact = path.read_bytes()
        opened = getattr(file, which)
        opened._file = FullDisk(opened._file, room)
        with pytest.raises(
            ResultFileError,
            match=r"No space left on device; the [36] rows of .* are whole, and the same command",
        ):
            file.append(rows[3:6], 3)
            file.append(rows[6:9], 6)
    assert whole.startswith(path.read_bytes()) and path.read_bytes().startswith(intact)
    assert path.read_bytes().endswith(b"\n")
    assert write(path, pairs, rows) == whole
