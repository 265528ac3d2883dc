"""What every sub-command is made of, and how it speaks to the user."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TextIO

from ..version import __version__
from ..weights import WeightsError
from .spellings import as_options

PROGRAM = "lpips-fast"


#: Options of all sub-commands, which stand before its name or behind it.
ANYWHERE = {
    "--quiet": "no bars and no notes on standard error, only warnings and errors",
    "--debug": "show the traceback of a failure",
}


class CommandError(Exception):
    """The work cannot be done; the message is one sentence for the user."""


class UsageError(CommandError):
    """The command line was wrong, in a way that argparse does not see."""


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        summary: one line for the list of sub-commands.
        add_arguments: adds its arguments to its own parser.
        run: does the work and writes the result to standard output.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """Argparse's, which says of a wrong command line what is wrong, in one line."""

    def error(self, message: str) -> NoReturn:
        # Not the usage before it: of a command with twenty options, it hides what is wrong.
        print_to(f"{PROGRAM}: error: {message}; {self.prog} --help says what it takes", sys.stderr)
        sys.exit(2)


def add_common_arguments(parser: argparse.ArgumentParser, default: Any) -> None:
    """:data:`ANYWHERE` and ``--version``, of all sub-commands."""
    for flag, text in ANYWHERE.items():
        parser.add_argument(flag, action="store_true", default=default, help=text)
    parser.add_argument(
        "--version",
        action="version",
        version=f"{PROGRAM} {__version__}",
        help=f"show the version of {PROGRAM}",
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """``--json``, of every sub-command that can report to a program."""
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on standard output, nothing else"
    )


_quiet = False


def set_quiet(quiet: bool) -> None:
    """From now on this process shows bars and notes, or neither (``--quiet``)."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    return _quiet


def tell(kind: str, message: str) -> None:
    """A line on standard error; ``--quiet`` leaves out what is only a note."""
    if kind == "note" and _quiet:
        return
    print_to(f"{PROGRAM}: {kind}: {message}", sys.stderr)


def print_to(text: str, stream: TextIO) -> None:
    # A file name may hold what the terminal's encoding, or any encoding, cannot express.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CommandError(f"cannot write to standard output: {error.strerror}") from error


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    tell("warning", " ".join(str(message).split()))


def sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, WeightsError):
        return error.command_line  # lists the ways to supply them, one a line
    # Torch's messages go on for paragraphs; the first says what happened.
    text = as_options(" ".join(str(error).strip().split("\n\n")[0].split()))
    if isinstance(error, (CommandError, ValueError, RuntimeError, OSError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text} (this is a bug; --debug shows where)"
