"""How options are spelled: what was spelled otherwise before is understood, with a note, and what
the library says of its arguments is said of the command line's options.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

#: By sub-command (``""``: all of them) and old spelling, the new one.
RENAMED = {
    ("", "--package-version"): "--version",
    ("analyze", "--out"): "--output",
    ("train", "--batch-size"): "--batch",
    ("train", "--size"): "--resize",
    ("evaluate", "--batch-size"): "--batch",
    ("evaluate", "--size"): "--resize",
}

# `--version` alone is this package's; with such a value behind it, it was that of LPIPS.
_VERSION_OF_LPIPS = re.compile(r"[0-9]+(\.[0-9]+)+")


# The library's arguments, and values of them, as they stand in its messages; never in a path.
_ARGUMENTS = {
    r"max_pixels \(--max-pixels\)": "--max-pixels",
    r"refresh \(--refresh\)": "--refresh",
    r"batch_size": "--batch",
    r"(alpha)=[\"'](\w+)[\"']": r"--\1 \2",
    r"(max_pixels|memory_limit|min_2afc|max_latency_ms|max_memory_mb|learning_rate|weight_decay)"
    r"|(decay_epochs|dropout(?= is)|epochs(?= is)|layers(?= holds))": None,
}
_OF_NO_PATH = r"(?<![\w/.'\"-])(?:{})(?![\w/.'\"])"


def as_options(message: str) -> str:
    """A message of the library, in terms of the command line.

    >>> as_options("max_latency_ms is 0.0, expected a number above 0")
    '--max-latency-ms is 0.0, expected a number above 0'
    >>> as_options('flatten it first, or pass alpha="white"')
    'flatten it first, or pass --alpha white'
    """
    for pattern, option in _ARGUMENTS.items():
        message = re.sub(
            _OF_NO_PATH.format(pattern),
            (lambda found: f"--{found[0].replace('_', '-')}") if option is None else option,
            message,
        )
    return message


def renewed(command: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of a sub-command in today's spelling, and a note for each that was not.

    >>> renewed("train", ["2afc", "--batch-size", "8"])
    (['2afc', '--batch', '8'], ['--batch-size is --batch now'])
    """
    spelled, notes = [], []
    following = [*arguments[1:], ""]
    are_options = True
    for argument, behind in zip(arguments, following):
        are_options = are_options and argument != "--"
        option, equals, value = argument.partition("=")
        new = RENAMED.get((command, option), RENAMED.get(("", option)))
        if option == "--version" and _VERSION_OF_LPIPS.fullmatch(value if equals else behind):
            new = "--lpips-version"
        if are_options and new is not None:
            notes.append(f"{option} is {new} now")
            spelled.append(f"{new}{equals}{value}")
        else:
            spelled.append(argument)
    return spelled, notes
