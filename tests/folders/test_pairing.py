"""Listing and pairing folders: order, names of every kind, and what has no partner."""

from __future__ import annotations

import os
import random
import unicodedata
from pathlib import Path

import pytest

from lpips_fast.folders.pairing import (
    FolderError,
    Pair,
    Patterns,
    list_folder,
    list_images,
    natural_key,
    pair_folders,
    pair_several,
    read_pairs,
)


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    folder.mkdir(exist_ok=True)
    return folder


def names(pairs: list) -> list[str]:
    return [pair.name for pair in pairs]


# ------------------------------------------------------------------------------- order


def test_natural_order() -> None:
    ordered = ["1.png", "2.png", "10.png", "a1b2.png", "a1b10.png", "a02.png", "a2.png", "b.png"]
    shuffled = random.sample(ordered, len(ordered))
    assert sorted(shuffled, key=natural_key) == ordered


def test_numbers_that_are_no_ascii_digits_compare_with_everything() -> None:
    odd = ["٣.png", "3.png", "²x", "x3", "x٣", "", "a/3", "3/a", "3"]
    for one in odd:
        for other in odd:
            assert (natural_key(one) < natural_key(other)) != (
                natural_key(other) <= natural_key(one)
            )


def test_a_listing_is_in_natural_order_whatever_the_file_system_says(tmp_path: Path) -> None:
    numbers = random.sample(range(1000), 50)
    touch(tmp_path, *(f"frame {n}.png" for n in numbers))
    assert list_images(tmp_path) == [f"frame {n}.png" for n in sorted(numbers)]


def test_folders_are_kept_together(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.png", "b/10.png", "a/1.png", "a b/1.png", "3.png")
    expected = ["3.png", "a/1.png", "a b/1.png", "b/2.png", "b/10.png"]
    assert list_images(tmp_path, recursive=True) == expected
    assert list_images(tmp_path) == ["3.png"]


# ------------------------------------------------------------------------------- listing


def test_what_counts_as_an_image(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.JPG", "c.txt", "d", "e.heic", ".f.png", "._a.png", ".git/g.png")
    (tmp_path / "folder.png").mkdir()
    assert list_images(tmp_path, recursive=True) == ["a.png", "b.JPG"]
    assert pair_folders(tmp_path, tmp_path, recursive=True).passed_over == 2 * [
        "c.txt",
        "d",
        "e.heic",
    ]


def test_links(tmp_path: Path) -> None:
    touch(tmp_path / "images", "1.png")
    touch(tmp_path / "elsewhere", "2.png")
    images = tmp_path / "images"
    (images / "linked").symlink_to(tmp_path / "elsewhere")
    (images / "linked again").symlink_to(tmp_path / "elsewhere")
    (images / "loop").symlink_to(images)
    (images / "dangling.png").symlink_to(tmp_path / "gone.png")
    # The dangling link is listed: that it cannot be read is for the reader to say.
    assert list_images(images, recursive=True) == ["1.png", "dangling.png", "linked/2.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_what_is_named_like_an_image_is_listed(tmp_path: Path) -> None:
    # So that it gets a row with the reason; it is never opened to be listed.
    touch(tmp_path, "1.png", "folder.png/2.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "loop").symlink_to("loop")
    assert list_images(tmp_path) == ["1.png", "folder.png", "loop.png", "pipe.png"]
    assert list_images(tmp_path, recursive=True) == [
        *("1.png", "folder.png/2.png", "loop.png", "pipe.png")
    ]
    assert list_folder(tmp_path).others == ["loop"]


def test_a_folder_that_cannot_be_looked_into_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "1.png", "locked/2.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_folder(tmp_path, recursive=True)
    assert listing.images == ["1.png"]
    assert listing.not_listed == [f"{tmp_path}/locked: Permission denied"]


def test_no_folder(tmp_path: Path) -> None:
    touch(tmp_path, "file.png")
    with pytest.raises(FolderError, match=r"gone does not exist, expected a folder of images"):
        list_images(tmp_path / "gone")
    with pytest.raises(FolderError, match=r"file\.png is not a folder; two files are compared by"):
        list_images(tmp_path / "file.png")


# ------------------------------------------------------------------------------- pairing


def test_pairs_by_name_and_what_has_no_partner(tmp_path: Path) -> None:
    a = touch(tmp_path / "A", "1.png", "2.png", "3.png", "x.jpg")
    b = touch(tmp_path / "B", "2.png", "3.png", "10.png", "9.png", "x.png")
    pairing = pair_folders(a, b)
    assert names(pairing.pairs) == ["2.png", "3.png"]
    assert pairing.pairs[0].path0 == a / "2.png" and pairing.pairs[0].path1 == b / "2.png"
    assert pairing.only_in_0 == ["1.png", "x.jpg"]
    assert pairing.only_in_1 == ["9.png", "10.png", "x.png"]
    assert pairing.pairs_by_stem == 1


def test_pairs_by_stem(tmp_path: Path) -> None:
    a = touch(tmp_path / "A", "sub/1.jpg", "sub/2.JPG", "3.png", "v1.2.png")
    b = touch(tmp_path / "B", "sub/1.png", "sub/2.webp", "3.png", "v1.3.png", "2.png")
    pairing = pair_folders(a, b, match="stem", recursive=True)
    assert names(pairing.pairs) == ["3.png", "sub/1.jpg", "sub/2.JPG"]
    assert pairing.pairs[2].path1 == b / "sub" / "2.webp"
    assert pairing.only_in_0 == ["v1.2.png"]
    assert pairing.only_in_1 == ["2.png", "v1.3.png"]


def test_two_candidates_for_one_partner_are_refused(tmp_path: Path) -> None:
    a = touch(tmp_path / "A", "1.png", "1.jpg")
    b = touch(tmp_path / "B", "1.png")
    assert names(pair_folders(a, b).pairs) == ["1.png"]
    with pytest.raises(FolderError, match=r"A holds both '1\.jpg' and '1\.png', which match"):
        pair_folders(a, b, match="stem")


@pytest.mark.parametrize("name", ["two words.png", "Übergröße.png", "画像 $5 #1.png", "a\nb.png"])
def test_names(tmp_path: Path, name: str) -> None:
    a, b = touch(tmp_path / "A", name), touch(tmp_path / "B", name)
    assert names(pair_folders(a, b).pairs) == [name]


def test_one_name_in_two_unicode_forms_is_one_name(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    assert composed != decomposed
    a, b = touch(tmp_path / "A", composed), touch(tmp_path / "B", decomposed)
    (pair,) = pair_folders(a, b).pairs
    assert (pair.name, pair.path1) == (composed, b / decomposed)
    touch(a, decomposed)
    if len(list(a.iterdir())) == 2:  # else the file system takes them for one itself
        with pytest.raises(FolderError, match="which match the same partner"):
            pair_folders(a, b)


@pytest.mark.skipif(os.name == "nt", reason="names are text on Windows")
def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    try:
        a, b = touch(tmp_path / "A", name), touch(tmp_path / "B", name)
    except OSError:
        pytest.skip("this file system takes only text for a name")
    assert names(pair_folders(a, b).pairs) == [name]


def test_an_unknown_match_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="match is 'size', expected 'name', 'stem' or Patterns"):
        pair_folders(tmp_path, tmp_path, match="size")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- patterns, lists


@pytest.mark.parametrize(
    ("pattern", "name", "key"),
    [
        ("{}_gt.png", "7_gt.png", "7"),
        ("{}_gt.png", "a/b/7_gt.png", "a/b/7"),
        ("gt-{}.png", "a/gt-7.png", "a/7"),
        ("gt/{}.png", "gt/7.png", "7"),
        ("{}_gt.png", "_gt.png", None),  # it stands for something
        ("{}_gt.png", "7_pred.png", None),
        ("ab{}bc", "abc", None),
    ],
)
def test_what_a_pattern_stands_for(pattern: str, name: str, key: str | None) -> None:
    assert Patterns(pattern, "{}.jpg").keys(name)[0] == key


@pytest.mark.parametrize("pattern", ["gt.png", "{}_{}.png", "{0}.png"])
def test_a_pattern_without_a_place(pattern: str) -> None:
    with pytest.raises(ValueError, match="expected once"):
        Patterns(pattern, "{}.png")


def test_pairs_by_patterns(tmp_path: Path) -> None:
    touch(tmp_path / "a", "1_gt.png", "2_gt.png", "x/3_gt.png", "other.png")
    touch(tmp_path / "b", "1_pred.jpg", "x/3_pred.jpg", "4_pred.jpg")
    pairing = pair_folders(
        tmp_path / "a", tmp_path / "b", match=Patterns("{}_gt.png", "{}_pred.jpg"), recursive=True
    )
    assert [(p.name, p.path1.name) for p in pairing.pairs] == [
        ("1_gt.png", "1_pred.jpg"),
        ("x/3_gt.png", "3_pred.jpg"),
    ]
    assert pairing.only_in_0 == ["2_gt.png"] and pairing.only_in_1 == ["4_pred.jpg"]
    assert pairing.passed_over == ["other.png"]


def test_several_folders(tmp_path: Path) -> None:
    touch(tmp_path / "gt", "1.png", "2.png", "10.png")
    touch(tmp_path / "run1" / "out", "1.png", "2.png", "10.png")
    touch(tmp_path / "run2" / "out", "2.png", "3.png")
    pairs, pairings = pair_several(
        tmp_path / "gt", [tmp_path / "run1" / "out", tmp_path / "run2" / "out"]
    )
    assert [(pair.name, pair.folder) for pair in pairs] == [
        ("1.png", "run1/out"),
        ("2.png", "run1/out"),
        ("2.png", "run2/out"),
        ("10.png", "run1/out"),
    ]
    assert pairings[1].only_in_0 == ["1.png", "10.png"] and pairings[1].only_in_1 == ["3.png"]
    pairs, _ = pair_several(tmp_path / "gt", [tmp_path / "run2" / "out"])
    assert [(pair.name, pair.folder) for pair in pairs] == [("2.png", "")]
    with pytest.raises(FolderError, match="is named twice"):
        pair_several(tmp_path / "gt", [tmp_path / "gt", tmp_path / "run1" / ".." / "gt"])


def test_a_list_of_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(
        '\ufeffa,note,b\r\nx/1.png,"so, so",y/1.jpg\r\n\r\n/2.png,,b 2.png\r\n'.encode()
    )
    assert read_pairs(path) == [
        Pair("x/1.png", tmp_path / "x/1.png", tmp_path / "y/1.jpg"),
        Pair("/2.png", Path("/2.png"), tmp_path / "b 2.png"),
    ]
    path.write_text("image0,image1\n1.png,2.png\n1.png,3.png\n")
    assert [pair.name for pair in read_pairs(path)] == ["1.png vs 2.png", "1.png vs 3.png"]
    path.write_text("name,a,b\nfirst,1.png,2.png\nsecond,1.png,2.png\n")
    assert [pair.name for pair in read_pairs(path)] == ["first", "second"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has the columns of an empty file; expected a header row with a and b"),
        ("1.png,2.png\n", r"has the columns 1\.png, 2\.png; expected a header row"),
        ("a,b\n", "lists no pairs"),
        ("a,b\n1.png\n", "row 1 of .* does not name two images"),
        ("a,b\n1.png,2.png\n1.png,2.png\n", "rows 1 and 2; a column name"),
        ("name,a,b\nx,1.png,2.png\nx,1.png,3.png\n", "two pairs that are called 'x'"),
        ('a,b\n"1.png,2.png\n', "cannot read .*: unexpected end of data"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(FolderError, match=message):
        read_pairs(path)
    with pytest.raises(FolderError, match=r"cannot read .*: No such file"):
        read_pairs(tmp_path / "gone.csv")
