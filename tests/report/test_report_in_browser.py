"""The page in a browser: sorting, the filter, the keyboard, wide and narrow, light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from chromium import Tab, browser, executable

from lpips_fast.report.histogram import histograms
from lpips_fast.report.page import Card, Column, Entry, Page, Panel, Part, Spread, Table
from lpips_fast.report.pictures import thumbnail

pytest.importorskip("jinja2", reason="reports are written with Jinja2")
pytest.importorskip("matplotlib", reason="the colours of maps are Matplotlib's")
pytest.importorskip("PIL.Image", reason="pictures are written with Pillow")
pytestmark = pytest.mark.skipif(executable() is None, reason="there is no Chromium")

COUNT = 450
RUN = "document.title='run'"
HOSTILE = f"</script><script>{RUN}</script><img src=x onerror={RUN}>.png"
FAILED = 7  # the row that could not be measured
IDENTICAL = 11  # the row whose PSNR is infinite


def rows() -> list[Entry]:
    """A distance that falls with the row's number, and a PSNR in another order."""
    picture = thumbnail(np.full((20, 30, 3), 128, np.uint8))
    entries = []
    for k in range(COUNT):
        name = HOSTILE if k == 5 else f"image {k}.png"
        psnr = "inf" if k == IDENTICAL else f"{20 + k * 37 % COUNT / 100:.8f}"
        panels = tuple(Panel(title, picture) for title in ("a", "b", "where")) if k < 200 else ()
        parts = (Part("relu1", "0.10000000", 100.0),) if k < 200 else ()
        numbers = ("", "") if k == FAILED else (f"{1 - k / COUNT:.8f}", psnr)
        entries.append(
            Entry(
                name,
                numbers,
                "ours" if k % 2 else "theirs",
                "cannot be read" if k == FAILED else "",
                () if k == FAILED else panels,
                () if k == FAILED else parts,
            )
        )
    return entries


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    entries = rows()
    drawn = histograms([[float(e.numbers[0]) for e in entries if e.numbers[0]]])
    page = Page(
        "originals  vs  ours  vs  theirs",
        "LPIPS alex",
        {"command": HOSTILE, "a long word": "x" * 300},
        [Column("distance", "LPIPS (alex)"), Column("psnr", "PSNR", higher_is_better=True)],
        entries,
        [k for k in range(201) if k != FAILED],
        cards=[Card("LPIPS (alex)", [Spread("ours", "mean 0.5", drawn[0], "0.0", "1.0")])],
        tables=[Table("Differences", ("", "mean", *("more",) * 9), [["a − b", *("0.1",) * 10]])],
    )
    written = tmp_path_factory.mktemp("report") / "report.html"
    written.write_bytes(page.encoded())
    return written


@pytest.fixture(scope="module")
def one_browser() -> Iterator[Tab]:
    with browser() as tab:
        yield tab


@pytest.fixture
def tab(one_browser: Tab, path: Path) -> Iterator[Tab]:
    """The page, freshly loaded; at the end it has asked for nothing and complained of nothing."""
    one_browser.requests.clear()
    one_browser.complaints.clear()
    one_browser.show_as(1280, 900)
    one_browser.open(path)
    yield one_browser
    assert one_browser("document.title") != "run"
    assert one_browser.complaints == []
    assert {unquote(address) for address in one_browser.requests} == {path.resolve().as_uri()}


def order(tab: Tab) -> list[int]:
    return tab("[...document.querySelectorAll('#entries > tbody > tr')].map(r => +r.dataset.entry)")


def status(tab: Tab) -> str:
    return tab("document.getElementById('status').textContent")


def choose(tab: Tab, name: str, value: str) -> None:
    tab(
        f"{{const chosen = document.getElementById('{name}'); chosen.value = '{value}';"
        "for (const kind of ['input', 'change']) chosen.dispatchEvent(new Event(kind))}"
    )


def focused(tab: Tab) -> str:
    return tab(
        "document.activeElement.id || document.activeElement.className "
        "|| document.activeElement.textContent"
    )


def test_at_first_the_worst_are_shown(tab: Tab) -> None:
    assert order(tab) == [k for k in range(201) if k != FAILED]
    assert status(tab) == "200 of 450 pairs, by LPIPS (alex), descending"
    sorts = "[...document.querySelectorAll('th[aria-sort]')].map(h => [h.textContent, h.ariaSort])"
    assert tab(sorts) == [["LPIPS (alex)", "descending"]]
    assert tab("document.querySelectorAll('.entries img').length") == 3 * 199
    assert tab("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_sorting_by_every_column(tab: Tab) -> None:
    entries = rows()
    head = "document.querySelector('th[data-column=\"{}\"] button').click()"
    tab(head.format(1))  # higher is better: the lowest first, at the end what is not known
    known = [k for k in range(COUNT) if k != FAILED]
    by_psnr = sorted(known, key=lambda k: float(entries[k].numbers[1]))
    assert order(tab) == by_psnr[:200] and by_psnr[-1] == IDENTICAL
    assert status(tab) == "200 of 450 pairs, by PSNR, ascending"
    tab(head.format(1))
    assert order(tab) == by_psnr[::-1][:200]
    tab("document.getElementById('direction').click()")
    assert order(tab) == by_psnr[:200]
    choose(tab, "sort", "0")
    assert order(tab)[:9] == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    choose(tab, "sort", "-1")
    assert order(tab)[:4] == [5, 0, 1, 2]  # the hostile name, and then 2 before 10
    assert order(tab)[10:12] == [10, 11]


def test_more_rows_come_on_demand_and_the_last_has_no_number(tab: Tab) -> None:
    for expected in (400, 450):
        tab("document.getElementById('more').click()")
        assert len(order(tab)) == expected
    assert tab("document.getElementById('more').hidden")
    assert order(tab) == [*(k for k in range(COUNT) if k != FAILED), FAILED]
    last = tab("document.querySelector('#entries > tbody').lastElementChild.innerText")
    assert "image 7.png" in last and "cannot be read" in last and "–" in last
    # What the script makes has as many cells as what the template makes.
    cells = "[...new Set([...document.querySelectorAll('#entries tr')].map(r => r.cells.length))]"
    assert tab(cells) == [5]


def test_filtering(tab: Tab) -> None:
    choose(tab, "filter", "IMAGE 44")
    assert order(tab) == [44, *range(440, 450)]
    assert status(tab) == "11 of 450 pairs, by LPIPS (alex), descending"
    choose(tab, "folder", "ours")
    assert order(tab) == [441, 443, 445, 447, 449]
    choose(tab, "filter", "no such name")
    assert order(tab) == [] and status(tab).startswith("0 of 450 pairs")
    choose(tab, "filter", "")
    assert status(tab) == "200 of 225 found, of 450 pairs, by LPIPS (alex), descending"
    choose(tab, "filter", "document.title")
    assert order(tab) == [5]
    choose(tab, "folder", "theirs")
    assert order(tab) == []
    choose(tab, "folder", "")
    choose(tab, "filter", "")
    tab("document.getElementById('failed').click()")
    assert order(tab) == [FAILED]


def test_by_keyboard_alone(tab: Tab) -> None:
    tab.press("/", "/")
    assert focused(tab) == "filter"
    tab.type("image 12")
    assert order(tab) == [12, *range(120, 130)]
    for _ in range(3):  # folder, sort, direction
        tab.press("Tab")
    assert focused(tab) == "direction"
    tab.press("Enter")
    assert order(tab) == [*range(129, 119, -1), 12]
    tab("document.querySelector('th[data-column=\"-1\"] button').focus()")
    tab.press(" ", " ")
    assert order(tab) == [12, *range(120, 130)] and "by name" in status(tab)
    while focused(tab) != "strip":
        tab.press("Tab")
    tab.press("Enter")
    name = (
        "document.querySelector('#large').open && document.querySelector('#large-name').innerText"
    )
    assert tab(name) == "image 12.png, theirs"
    assert tab("document.querySelectorAll('#large img').length") == 3
    assert "0.97333333" in tab("document.getElementById('large-numbers').innerText")
    tab.press("ArrowRight")
    tab.press("ArrowRight")
    assert tab(name) == "image 121.png, ours"
    tab.press("ArrowLeft")
    assert tab(name) == "image 120.png, theirs"
    tab.press("ArrowLeft")
    tab.press("ArrowLeft")  # there is none before
    assert tab(name) == "image 12.png, theirs"
    assert tab("document.activeElement.closest('dialog') !== null")
    tab.press("Escape")
    assert tab(name) is False and focused(tab) == "strip"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844), (320, 568)])
def test_wide_and_narrow_light_and_dark(tab: Tab, width: int, height: int, scheme: str) -> None:
    tab.show_as(width, height, scheme)
    assert tab("document.scrollingElement.scrollWidth") <= width  # nothing to push sideways
    colours = "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(%s))"
    for element in ("document.body", "document.querySelector('#filter')"):
        ink, paper = (luminance(text) for text in tab(colours % element))
        assert (ink < paper) == (scheme == "light")
        contrast = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert contrast > 7  # WCAG 2.2, level AAA
    soft = luminance(tab("getComputedStyle(document.querySelector('#status')).color"))
    page = luminance(tab("getComputedStyle(document.body).backgroundColor"))
    assert (max(soft, page) + 0.05) / (min(soft, page) + 0.05) > 4.5  # level AA
    tab("document.querySelector('.strip').click()")
    box = tab(
        "(box => [box.left, box.right])(document.querySelector('dialog').getBoundingClientRect())"
    )
    assert box[0] >= 0 and box[1] <= width
    if width < 600:  # a card a pair: each number has its name beside it
        labels = "getComputedStyle(document.querySelector('td.number'), '::before').content"
        assert tab(labels) == '"LPIPS (alex)"'


def luminance(colour: str) -> float:
    """Of ``rgb(r, g, b)``, as WCAG 2.2 defines it."""
    values = [float(x) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in values]
    return math.fsum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear))


def test_without_javascript_the_worst_are_there(one_browser: Tab, path: Path) -> None:
    one_browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        one_browser.show_as(1280, 900)
        one_browser.open(path)
        assert order(one_browser) == [k for k in range(201) if k != FAILED]
        assert status(one_browser) == "200 of 450 pairs, the worst first"
        assert one_browser("getComputedStyle(document.querySelector('.tools')).display") == "none"
        assert "Without JavaScript" in one_browser("document.querySelector('noscript').innerText")
    finally:
        one_browser.send("Emulation.setScriptExecutionDisabled", value=False)


def test_what_is_tested_here_would_be_noticed(one_browser: Tab, tmp_path: Path) -> None:
    """A request, an error and a warning of another page are seen."""
    other = tmp_path / "other.html"
    other.write_text("<img src='no such.png'><script>console.error('loud'); undefined.x</script>")
    one_browser.requests.clear()
    one_browser.complaints.clear()
    one_browser.open(other)
    assert any("no%20such.png" in address for address in one_browser.requests)
    told = " ".join(one_browser.complaints)
    assert "loud" in told and "TypeError" in told and "ERR_FILE_NOT_FOUND" in told
