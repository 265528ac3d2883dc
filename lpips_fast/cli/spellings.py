"""Options as they were spelled before: understood, with a note on today's spelling."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from .command import tell

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


def renewed(command: str, arguments: Sequence[str]) -> list[str]:
    """The arguments of a sub-command, in today's spelling; each old one is told.

    >>> renewed("pair", ["a.png", "b.png", "--net", "vgg"])
    ['a.png', 'b.png', '--net', 'vgg']
    """
    return list(_renewed(command, arguments))


def _renewed(command: str, arguments: Sequence[str]) -> Iterator[str]:
    following = [*arguments[1:], ""]
    are_options = True
    for argument, behind in zip(arguments, following):
        are_options = are_options and argument != "--"
        option, equals, value = argument.partition("=")
        new = RENAMED.get((command, option), RENAMED.get(("", option)))
        if option == "--version" and _VERSION_OF_LPIPS.fullmatch(value if equals else behind):
            new = "--lpips-version"
        if are_options and new is not None:
            tell("note", f"{option} is {new} now")
            yield f"{new}{equals}{value}"
        else:
            yield argument
