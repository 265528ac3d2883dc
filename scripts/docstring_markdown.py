"""Our docstrings as Markdown, for the API reference: an extension of Griffe, which reads them.

Docstrings are written to be read in a terminal: examples without a heading, roles, and tables and
blocks of reStructuredText. Markdown would take ``>>>`` for a quotation and run tables into
paragraphs; here they become fenced blocks, and a role becomes the name in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?\.?([^`]+)`")
_FLAG = re.compile(r"\s*# doctest: \+\w+")
_RULE = re.compile(r"\s*=+(?: +=+)+\s*")
_LITERAL = re.compile(r"(.*\S)?(?:\.\. code-block:: \w+|::)\s*")


def markdown(docstring: str) -> str:
    """Roles as names, and examples, tables and literal blocks between fences.

    >>> markdown("Of :class:`~torch.Tensor`.")
    'Of `torch.Tensor`.'
    """
    return "\n".join(_fenced(docstring.splitlines()))


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _fenced(lines: list[str]) -> Iterator[str]:
    k = 0
    while k < len(lines):
        line, first = lines[k], k
        if line.lstrip().startswith(">>> "):
            while k < len(lines) and lines[k].strip():
                k += 1
            yield from _fence("pycon", [_FLAG.sub("", x) for x in lines[first:k]])
        elif _RULE.fullmatch(line):
            while k < len(lines) and lines[k].strip():
                k += 1
            yield from _fence("text", lines[first:k])
        elif (literal := _LITERAL.fullmatch(line)) and k + 1 < len(lines) and not lines[k + 1]:
            k += 1
            while k < len(lines) and (not lines[k] or len(_indent(lines[k])) > len(_indent(line))):
                k += 1
            body = lines[first + 1 : k]
            while body and not body[-1]:
                body.pop()
            if literal[1]:
                yield _ROLE.sub(r"`\1`", f"{literal[1]}:")
                yield ""
            deeper = len(_indent(body[1])) - len(_indent(line))
            yield from _fence("text", [x[deeper:] for x in body[1:]])
            yield ""
        else:
            yield _ROLE.sub(r"`\1`", line)
            k += 1


def _fence(language: str, lines: list[str]) -> Iterator[str]:
    indent = _indent(lines[0])
    yield f"{indent}```{language}"
    yield from lines
    yield f"{indent}```"


class DocstringMarkdown(griffe.Extension):
    """Rewrites each docstring once, before its sections are read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
