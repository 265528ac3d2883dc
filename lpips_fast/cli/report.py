"""``--report FILE.html``, of every sub-command whose result is worth a page."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..report import require_jinja2
from ..weights.whole_files import appearing
from .command import PROGRAM, CommandError
from .outputs import check_output

if TYPE_CHECKING:
    from ..report import Page

_SUFFIXES = (".html", ".htm")


def add_report_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """``--report``; ``what`` the page shows."""
    parser.add_argument(
        "--report",
        type=_page_path,
        metavar="HTML",
        help=f"write a page to look at, one file that needs no network: {what}",
    )


def _page_path(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in _SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .html")
    return path


def check_report(options: argparse.Namespace, inputs: Iterable[str | Path]) -> None:
    """Before any work: the page can be made, and is written over nothing that is read."""
    if options.report is not None:
        require_jinja2()
        check_output(options.report, inputs)


def how_made(options: argparse.Namespace, settings: Mapping[str, str]) -> dict[str, str]:
    """The settings of a run, and what else a reader of its page asks."""
    command = shlex.join([PROGRAM, *options.command_line])
    return {"command": command, "written": time.strftime("%Y-%m-%d %H:%M %Z"), **settings}


def write_report(path: Path, page: Page) -> None:
    try:
        with appearing(path) as file:
            file.write(page.encoded())
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
