"""Runs the code blocks of a Markdown page, from its first to its last, as a reader would.

Python blocks of a page share one namespace. Shell blocks run in bash, but for the commands of this
package and its examples, which run in this process and so need not load torch again. All of it
happens in an empty folder that holds what a reader's clone has at hand (see :data:`AT_HAND`).

What a page may say to this file, in comments that readers do not see::

    <!-- not run: the reason -->      the next block is not run
    <!-- setup                        Python that runs here: what the reader has, and the page needs
    target = torch.zeros(1, 3, 64, 64)
    -->

A block of ``text`` straight after a block that ran is what that block prints: the same words, and
numbers within 1e-3 of each other. Of a distance that is AlexNet's: another trunk may be random.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

REPOSITORY = Path(__file__).resolve().parents[1]
#: Folders of a clone that commands on the pages name.
AT_HAND = ("examples", "benchmarks", "scripts")
LANGUAGES = {"python": "python", "bash": "shell", "text": "text"}

_NOT_RUN = re.compile(r"<!--\s*not run:\s*(?P<reason>.*?)\s*-->", re.DOTALL)
_SETUP = re.compile(r"<!--\s*setup\n(?P<code>.*?)-->", re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A part of a page that says something to this file.

    Attributes:
        kind: ``python``, ``shell`` or ``text`` for a fenced block, ``setup`` for a comment.
        code: what is in it.
        line: where the code begins in the page, from 1.
        not_run: why it does not run, where a comment says so.
    """

    kind: str
    code: str
    line: int
    not_run: str | None = None


class DocumentationError(Exception):
    """A block failed, or printed something else than the page says."""


def blocks(markdown: str) -> list[Block]:
    """The blocks of a page, in order; an unknown language is an error, an empty one is a figure."""
    found, not_run = [], None
    for token in MarkdownIt("commonmark").parse(markdown):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "html_block":
            if setup := _SETUP.search(token.content):
                found.append(Block("setup", setup["code"], line + 1))
            if marker := _NOT_RUN.search(token.content):
                not_run = marker["reason"]
        elif token.type == "fence" and token.info.strip():
            kind = LANGUAGES.get(token.info.split()[0])
            if kind is None:
                raise DocumentationError(
                    f"line {line}: a block of {token.info!r}; expected one of {list(LANGUAGES)}"
                )
            found.append(Block(kind, token.content, line + 1, not_run))
            not_run = None
        elif token.type == "code_block":
            raise DocumentationError(f"line {line}: code by indentation; fence it with ```")
    if not_run is not None:
        raise DocumentationError(f"no block follows the comment 'not run: {not_run}'")
    return found


@dataclass
class Page:
    """A page that runs in the current folder.

    Attributes:
        path: of the page, for messages and tracebacks.
    """

    path: Path
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})

    def run(self) -> None:
        printed: str | None = None
        for block in blocks(self.path.read_text(encoding="utf-8")):
            if block.not_run is not None:
                printed = None
                continue
            place = f"{self.path.name}, line {block.line}"
            try:
                if block.kind == "text":
                    if printed is not None:
                        compare(printed, block.code)
                    printed = None
                else:
                    printed = self._run(block)
            except BaseException as error:  # a command's SystemExit too
                raise DocumentationError(f"{place}: {type(error).__name__}: {error}") from error

    def _run(self, block: Block) -> str:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            if block.kind == "shell":
                for command in commands(block.code):
                    self._shell(command)
            else:
                # Lines of the page, so that a traceback shows where it was.
                code = "\n" * (block.line - 1) + block.code
                exec(compile(code, str(self.path), "exec"), self.namespace)
        return output.getvalue()

    def _shell(self, command: str) -> None:
        words = [] if re.search(r"[|<>&;$*`]", command) else shlex.split(command, comments=True)
        errors = io.StringIO()
        if words[:1] == ["lpips-fast"]:
            from lpips_fast.cli import main

            with contextlib.redirect_stderr(errors):
                code = main(words[1:])
        elif words[:1] == ["python"] and len(words) > 1 and words[1].endswith(".py"):
            with script_arguments(words[1:]):
                runpy.run_path(words[1], run_name="__main__")
            code = 0
        else:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command],
                env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
                capture_output=True,
                text=True,
            )
            print(done.stdout, end="")
            errors.write(done.stderr)
            code = done.returncode
        if code:
            raise DocumentationError(f"exit code {code} of: {command}\n{errors.getvalue()}")


def commands(code: str) -> Iterator[str]:
    """The commands of a shell block: lines, joined by a backslash or an open quote."""
    pending = ""
    for line in code.splitlines():
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # an open quote
            pending += "\n"
            continue
        if words:
            yield pending
        pending = ""
    if pending:
        raise DocumentationError(f"an unfinished command: {pending}")


@contextlib.contextmanager
def script_arguments(arguments: list[str]) -> Iterator[None]:
    """Lets a script find its arguments, and what lies beside it."""
    before = sys.argv, sys.path[:]
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    try:
        yield
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        sys.argv, sys.path[:] = before


def compare(printed: str, expected: str) -> None:
    """Fails unless both have the same words, and numbers within 1e-3 of each other."""
    ours, page = (_NUMBER.sub("#", text).split() for text in (printed, expected))
    numbers = [[float(n) for n in _NUMBER.findall(text)] for text in (printed, expected)]
    alike = ours == page and all(
        math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6) for a, b in zip(*numbers, strict=True)
    )
    if not alike:
        raise DocumentationError(f"printed\n{printed}\nand the page says\n{expected}")


def run_page(path: Path, folder: Path, weights: Path) -> None:
    """Runs a page in a folder: the whole life of a process, whose exit code tells the outcome."""
    import torch

    torch.manual_seed(0)
    os.environ["LPIPS_FAST_WEIGHTS"] = str(weights)
    os.environ["LPIPS_FAST_OFFLINE"] = "1"
    os.environ["XDG_CACHE_HOME"] = str(folder / ".cache")
    for name in AT_HAND:
        (folder / name).symlink_to(REPOSITORY / name)
    if "LPIPSMetric" in path.read_text(encoding="utf-8"):  # torchmetrics imports torchvision
        from conftest import declare_torchvision_operators

        declare_torchvision_operators()
    os.chdir(folder)
    Page(path).run()
