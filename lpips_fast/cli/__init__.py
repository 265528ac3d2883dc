"""The command line: ``lpips-fast``, also ``python -m lpips_fast``.

A sub-command is a module of this folder and an entry in :data:`COMMANDS`: one function that adds
its arguments, one that runs it. A command line that starts with an image is ``pair``; an image that
is named like a sub-command is ``./info``.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 the work
failed, 2 the command line was wrong. A failure is told in one sentence; ``--debug`` shows where.

One grammar for all: ``-o``/``--output`` is what is written, ``--device`` where to compute (a GPU if
there is one), ``--batch`` how many at once, ``--size`` the size of images that are made up,
``--resize`` to which those of files are brought, ``--quiet`` no bars and notes, ``--version`` that
of this package. :mod:`.spellings` knows how they were spelled before.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from . import (
    analyze,
    argument_types,
    bench,
    compress,
    dirs,
    evaluate,
    export,
    info,
    map,
    nearest,
    pair,
    pairwise,
    recommend,
    spellings,
    train,
    weights,
)
from .command import (
    ANYWHERE,
    PROGRAM,
    Command,
    CommandError,
    Parser,
    UsageError,
    add_common_arguments,
    sentence,
    set_quiet,
    show_warning,
    tell,
)
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
    "compress": compress.COMMAND,
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
    set_quiet("--quiet" in command_line)  # of notes on the command line itself, too
    command, arguments = _split(command_line)
    arguments, notes = spellings.renewed(command, arguments)
    for note in notes:
        tell("note", note)
    arguments = argument_types.join_patterns(arguments)
    parser = _parser()
    if not [argument for argument in arguments if argument not in ANYWHERE]:
        parser.print_help()
        return 0
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
    width = max(len(name) for name in COMMANDS)
    listed = "\n".join(f"  {name:<{width}}  {c.summary}" for name, c in COMMANDS.items())
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--help] [--version] [--quiet] [--debug] command …",
        description=f"LPIPS: how different two images look to people.\n\ncommands:\n{listed}",
        epilog=f"{PROGRAM} A.png B.png is short for {PROGRAM} pair A.png B.png.\n"
        f"{PROGRAM} command --help says what a command takes.",
        # argparse's own list would break lines, and not at the same place in every Python.
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_common_arguments(parser, default=False)
    commands = parser.add_subparsers(
        dest="command", required=True, prog=PROGRAM, metavar="command", help=argparse.SUPPRESS
    )
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            allow_abbrev=False,
        )
        command.add_arguments(sub)
        # Without SUPPRESS the sub-parser's default would undo a --debug before the sub-command.
        add_common_arguments(sub, default=argparse.SUPPRESS)
    return parser


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """The sub-command, and the arguments with its name.

    ``pair`` is put where a command line starts with an image, or with an option of ``pair``.
    """
    start = 0
    while start < len(arguments) and arguments[start] in ANYWHERE:
        start += 1
    rest = arguments[start:]
    if not rest or rest[0] in COMMANDS:
        return (rest or [""])[0], arguments
    first = rest[0]
    if first in ("-h", "--help", "--package-version") or rest == ["--version"]:
        return "", arguments
    looks_like_a_file = first.startswith("-") or Path(first).suffix or os.path.exists(first)
    if not looks_like_a_file:  # a mistyped sub-command: argparse lists the right ones
        return "", arguments
    return "pair", [*arguments[:start], "pair", *rest]
