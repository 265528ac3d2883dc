"""What a page holds, and how it becomes one HTML file.

Everything that is shown comes as text or as a :class:`~.pictures.Picture`; Jinja2 escapes it. The
file has its style, script and pictures within itself, and a content security policy that lets
nothing be loaded and no other script be run, whatever a file is named.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..folders.csv_text import as_written
from ..version import __version__
from .histogram import HEIGHT, WIDTH, Histogram
from .pictures import Picture, colour_stops

if TYPE_CHECKING:
    import jinja2

__all__ = [
    "Card",
    "Column",
    "Entry",
    "Figure",
    "Page",
    "Panel",
    "Part",
    "Spread",
    "Table",
    "require_jinja2",
]

_TEMPLATES = Path(__file__).parent / "templates"


def require_jinja2() -> None:
    """Raises an ImportError that says what to install, before any work and not after."""
    try:
        import jinja2
        import matplotlib  # noqa: F401  # the colours of the maps
    except ImportError as error:
        raise ImportError(
            'a report needs Jinja2 and Matplotlib: pip install "lpips-fast[report]"'
        ) from error
    del jinja2


@dataclass(frozen=True)
class Column:
    """A number of every entry.

    Attributes:
        name: as the CSV has it.
        title: for people.
        higher_is_better: of two entries, the worse is the one with the lower number.
    """

    name: str
    title: str
    higher_is_better: bool = False


@dataclass(frozen=True)
class Panel:
    """A picture of an entry; of a map, ``scale`` says at which distance its colours end."""

    title: str
    picture: Picture
    scale: str = ""


@dataclass(frozen=True)
class Part:
    """What one layer adds: the number, and its bar in percent of the longest of the entry."""

    layer: str
    number: str
    percent: float


@dataclass(frozen=True)
class Entry:
    """A pair of images.

    Attributes:
        name, folder: the pair's; the folder is empty where there is but one.
        numbers: a text a column, empty where there is none.
        error: why there is none.
        panels, parts: pictures and layers, of those entries that have them.
        note: why an entry that should have pictures has none.
    """

    name: str
    numbers: tuple[str, ...]
    folder: str = ""
    error: str = ""
    panels: tuple[Panel, ...] = ()
    parts: tuple[Part, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Spread:
    """How the numbers of a column are spread, of one folder."""

    label: str
    words: str
    histogram: Histogram | None
    low: str = ""
    high: str = ""


@dataclass(frozen=True)
class Card:
    """A column's summary."""

    title: str
    spreads: Sequence[Spread]
    higher_is_better: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading; the first cell of each names it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    is_open: bool = True


@dataclass(frozen=True)
class Figure:
    """A drawing under a heading."""

    title: str
    address: str
    width: int
    height: int


@dataclass(frozen=True)
class Page:
    """One report.

    Attributes:
        title, subtitle: what was compared, and by which metric.
        facts: how it was made.
        columns: of the entries' numbers.
        entries: all, in the order of the run.
        first: which of them are shown at first, in this order; of no others there are pictures.
        sorted_by: the number of the column whose worst come first.
        cards, tables: what stands above the entries.
        tables_below, figures: what stands below them.
        warning: what a reader has to know before anything else; mostly empty.
    """

    title: str
    subtitle: str
    facts: Mapping[str, str]
    columns: Sequence[Column]
    entries: Sequence[Entry]
    first: Sequence[int]
    sorted_by: int = 0
    cards: Sequence[Card] = ()
    tables: Sequence[Table] = ()
    tables_below: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    warning: str = ""

    def html(self) -> str:
        """The whole file.

        Raises:
            ImportError: Jinja2 is not installed.
        """
        scale = f":root {{ --scale: {', '.join(colour_stops())}; }}\n"
        style, script = scale + _text("page.css"), _text("page.js")
        policy = (
            "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
            f"style-src '{_digest(style)}'; script-src '{_digest(script)}'"
        )
        return _template().render(
            page=self,
            folders=list(dict.fromkeys(entry.folder for entry in self.entries)),
            has_folders=any(entry.folder for entry in self.entries),
            failed=sum(1 for entry in self.entries if entry.error),
            has_panels=any(entry.panels or entry.note for entry in self.entries),
            has_parts=any(entry.parts for entry in self.entries),
            data=self._data(),
            width=WIDTH,
            height=HEIGHT,
            style=style,
            script=script,
            policy=policy,
            version=__version__,
        )

    def encoded(self) -> bytes:
        """The whole file as it is written: UTF-8, with the bytes of a name that is no text as
        ``\\udcXX``, as the CSV has them.
        """
        return self.html().encode("utf-8", "backslashreplace")

    def _data(self) -> dict[str, Any]:
        """For the script: what sorting and filtering all entries needs."""
        return {
            "columns": [[c.name, c.title, c.higher_is_better] for c in self.columns],
            "rows": [
                [*map(as_written, (e.name, e.folder, e.error)), *e.numbers] for e in self.entries
            ],
            "first": list(self.first),
            "sortedBy": self.sorted_by,
        }


@functools.cache
def _template() -> jinja2.Template:
    require_jinja2()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """By which a content security policy knows a style or a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}"
