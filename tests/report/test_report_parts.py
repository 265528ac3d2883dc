"""The parts of a page: histograms, pictures of a bounded size, text that stays text."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re

import numpy as np
import pytest

from lpips_fast.report import histogram, pictures
from lpips_fast.report.page import Column, Entry, Page, Panel, Part, Table

pytest.importorskip("jinja2", reason="reports are written with Jinja2")
pytest.importorskip("matplotlib", reason="the colours of maps are Matplotlib's")
Image = pytest.importorskip("PIL.Image", reason="pictures are written with Pillow")

HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=alert(1)>'\"&.png"


def decoded(picture: pictures.Picture) -> np.ndarray:
    data = base64.b64decode(picture.address.partition(",")[2])
    with Image.open(io.BytesIO(data)) as image:
        assert (picture.width, picture.height) == image.size
        return np.asarray(image.convert("RGB"))


# ------------------------------------------------------------------------------ histograms


def test_histograms_count_everything_finite_in_the_same_bins() -> None:
    samples = np.random.default_rng().gamma(2.0, size=(2, 500)).tolist()
    one, other = histogram.histograms([[*samples[0], math.inf], samples[1]])
    assert one is not None and other is not None
    assert (
        (one.low, one.high)
        == (other.low, other.high)
        == (
            min(map(min, samples)),
            max(map(max, samples)),
        )
    )
    for drawn, sample in ((one, samples[0]), (other, samples[1])):
        assert sum(bar.count for bar in drawn.bars) == 500
        assert all(bar.x >= 0 and bar.x + bar.width <= histogram.WIDTH for bar in drawn.bars)
        assert all(bar.y >= 0 and bar.height >= 1 for bar in drawn.bars)
        part = (np.mean(sample) - drawn.low) / (drawn.high - drawn.low)
        assert drawn.mean == pytest.approx(part * histogram.WIDTH, abs=0.01)
    tallest = max((bar for h in (one, other) for bar in h.bars), key=lambda bar: bar.count)
    assert tallest.height == histogram.HEIGHT


@pytest.mark.parametrize("sample", [[], [math.inf], [math.inf, math.inf]])
def test_nothing_finite_has_no_histogram(sample: list[float]) -> None:
    assert histogram.histograms([sample]) == [None]
    with_numbers = histogram.histograms([sample, [1.0, 2.0]])
    assert with_numbers[0] is None and with_numbers[1] is not None


def test_equal_numbers_are_one_bar_in_the_middle() -> None:
    (drawn,) = histogram.histograms([[0.25] * 7])
    assert drawn is not None and [bar.count for bar in drawn.bars] == [7]
    assert drawn.mean == histogram.WIDTH / 2 and (drawn.low, drawn.high) == (0.25, 0.25)


# ------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("shape", [(1, 1), (3, 2000), (700, 1100), (2000, 3), (64, 64)])
def test_noise_stays_within_the_bytes(shape: tuple[int, int]) -> None:
    noise = np.random.default_rng().integers(256, size=(*shape, 3), dtype=np.uint8)
    picture = pictures.thumbnail(noise)
    assert max(picture.width, picture.height) <= min(pictures.LONGEST_SIDE, max(shape))
    assert len(picture.address) <= 27_000
    assert decoded(picture).size > 0


def test_a_map_has_the_colours_of_its_numbers() -> None:
    import matplotlib

    plane = np.zeros((64, 96), np.float32)
    plane[:, 48:] = 0.5
    of_its_own, of_a_shared = pictures.map_picture(plane), pictures.map_picture(plane, 1.0)
    for picture, bright in ((of_its_own, 1.0), (of_a_shared, 0.5)):
        seen = decoded(picture).astype(int)
        for column, number in ((10, 0.0), (85, bright)):
            colour = np.array(matplotlib.colormaps["magma"](number, bytes=True)[:3], int)
            assert np.abs(seen[32, column] - colour).max() < 16
    assert decoded(pictures.map_picture(0 * plane)).max() < 16  # equal images: dark


# ------------------------------------------------------------------------------ the page


def page_of(names: list[str], **changes: object) -> Page:
    facts: dict[str, object] = {
        "title": names[0],
        "subtitle": names[0],
        "facts": {names[0]: names[0]},
        "columns": [Column("distance", names[0])],
        "entries": [
            Entry(
                name,
                ("0.10000000",),
                folder=name,
                error=name,
                panels=(Panel(name, pictures.thumbnail(np.zeros((8, 8, 3), np.uint8)), name),),
                parts=(Part(name, "0.10000000", 100.0),),
            )
            for name in names
        ],
        "first": range(len(names)),
        "tables": [Table(names[0], (names[0],), [[names[0]]], names[0])],
        "warning": names[0],
        **changes,
    }
    return Page(**facts)  # type: ignore[arg-type]


def test_text_stays_text() -> None:
    page = page_of([HOSTILE, "caf\udce9.png"])
    text = page.encoded().decode("utf-8")
    assert text.count("<script") == 2 and text.count("</script>") == 2  # the data, and ours
    assert "<img src=x" not in text and 'onerror="' not in text
    assert html.escape(HOSTILE, quote=False).split("&#")[0].split("'")[0] in text
    found = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    rows = json.loads(found[1])["rows"]
    assert rows[0] == [HOSTILE, HOSTILE, HOSTILE, "0.10000000"]
    assert rows[1][0] == "caf\\udce9.png"  # as the CSV has it
    assert text.count("caf\\udce9.png") > 1


def test_only_its_own_style_and_script_may_run() -> None:
    text = page_of(["a.png"]).html()
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])  # type: ignore[index]
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag, kind in (("style", "style-src"), ("script", "script-src")):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]  # type: ignore[index]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert "http://" not in text and "https://" not in text


def test_ten_thousand_pairs_are_less_than_20_mb() -> None:
    """At the most that pictures may take, with long names and many columns."""
    rng = np.random.default_rng()
    largest = max(
        (
            pictures.thumbnail(rng.integers(256, size=(400, 400, 3), dtype=np.uint8) // spread)
            for spread in (1, 2, 3, 4, 6, 8)
        ),
        key=lambda picture: len(picture.address),
    )
    # Padded to what the bound allows: the next picture may be as large as that.
    padded = pictures.Picture(largest.address.ljust(26_700, "A"), largest.width, largest.height)
    panels = tuple(Panel("a/name of an image.png", padded, "0.12345678") for _ in range(3))
    parts = tuple(Part(f"relu{k}_3", "0.12345678", 50.0) for k in range(7))
    columns = [Column(f"column_{k}", f"column {k}") for k in range(6)]
    entries = [
        Entry(
            f"scene_{k:06d}/a name of an image.png",
            tuple(f"{x:.8f}" for x in rng.random(6)),
            panels=panels if k < 200 else (),
            parts=parts if k < 200 else (),
        )
        for k in range(10_000)
    ]
    size = len(Page("a", "b", {}, columns, entries, range(200)).encoded())
    print(f"{size / 1e6:.1f} MB")
    assert size < 20e6
