"""The command line: ``lpips-fast``, also ``python -m lpips_fast``.

A sub-command is a module of this folder and an entry in :data:`COMMANDS`: one function that adds
its arguments, one that runs it. A command line that starts with an image is ``pair``; an image that
is named like a sub-command is ``./info``.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 the work
failed, 2 the command line was wrong. A failure is told in one sentence; ``--debug`` shows where.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..version import __version__
from . import (
    analyze,
    argument_types,
    bench,
    dirs,
    evaluate,
    export,
    info,
    map,
    nearest,
    pair,
    pairwise,
    recommend,
    train,
    weights,
)
from .command import PROGRAM, Command, CommandError, UsageError, sentence, show_warning, tell
from .termination import flush_output, terminable

__all__ = ["COMMANDS", "Command", "CommandError", "main"]

#: Every sub-command by name, in the order in which ``--help`` lists them.
COMMANDS: dict[str, Command] = {
    "pair": pair.COMMAND,
    "dirs": dirs.COMMAND,
    "pairwise": pairwise.COMMAND,
    "nearest": nearest.COMMAND,
    "map": map.COMMAND,
    "analyze": analyze.COMMAND,
    "weights": weights.COMMAND,
    "bench": bench.COMMAND,
    "recommend": recommend.COMMAND,
    "info": info.COMMAND,
    "train": train.COMMAND,
    "evaluate": evaluate.COMMAND,
    "export": export.COMMAND,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments without the program's name; ``None``: those of the process.

    Raises:
        SystemExit: by argparse, after ``--help`` (0) and for a wrong command line (2).

    Example:
        >>> main(["pair", "a.png", "b.png", "--net", "vgg"])      # doctest: +SKIP
        Distance: 0.569
        …
        0
    """
    command_line = sys.argv[1:] if argv is None else list(argv)
    arguments = _name_the_command(command_line)
    arguments = argument_types.join_patterns(arguments)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    options.command_line = command_line
    # argparse takes all folders that stand together, and leaves those behind an option over.
    if rest and hasattr(options, "folders") and not any(text.startswith("-") for text in rest):
        options.folders += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with warnings.catch_warnings(), terminable():
            warnings.showwarning = show_warning
            try:
                COMMANDS[options.command].run(options)
            finally:
                flush_output()
    except KeyboardInterrupt:
        if options.debug:
            raise
        return 130  # what a shell expects of a program ended by Ctrl-C
    except BrokenPipeError:
        return 141  # and of one whose reader, head for example, wants no more
    except Exception as error:
        if options.debug:
            raise
        tell("error", sentence(error))
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="LPIPS: how different two images look to people.",
        epilog=f"{PROGRAM} A.png B.png is short for {PROGRAM} pair A.png B.png.",
        allow_abbrev=False,
    )
    parser.add_argument("--package-version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            allow_abbrev=False,
        )
        # Without SUPPRESS the sub-parser's default would undo a --debug before the sub-command.
        sub.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show the traceback of a failure",
        )
        command.add_arguments(sub)
    return parser


def _name_the_command(arguments: list[str]) -> list[str]:
    """Put ``pair`` where a command line starts with an image, or with an option of ``pair``."""
    start = 0
    while start < len(arguments) and arguments[start] == "--debug":
        start += 1
    rest = arguments[start:]
    if rest == ["--version"]:  # elsewhere it is LPIPS's version and takes a value
        return ["--package-version"]
    if not rest or rest[0] in COMMANDS or rest[0] in ("-h", "--help", "--package-version"):
        return arguments
    first = rest[0]
    looks_like_a_file = first.startswith("-") or Path(first).suffix or os.path.exists(first)
    if not looks_like_a_file:  # a mistyped sub-command: argparse lists the right ones
        return arguments
    return [*arguments[:start], "pair", *rest]
