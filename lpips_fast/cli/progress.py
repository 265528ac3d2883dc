"""Bars on standard error, where somebody looks at it and did not ask for quiet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from .command import is_quiet


def progress_bar(
    total: int, unit: str, *, label: str | None = None, done: int = 0, leave: bool = True
) -> tqdm:
    """A bar of ``total`` steps, of which ``done`` are taken; with ``leave`` it stays at its end."""
    return tqdm(
        total=total,
        initial=done,
        desc=label,
        unit=f" {unit}",
        leave=leave,
        file=sys.stderr,
        disable=True if is_quiet() else None,  # None: where standard error is no terminal
    )


@contextmanager
def open_ended(total: int, unit: str, label: str) -> Iterator[Callable[[int], None]]:
    """A bar for work that may turn out to be more than ``total``: then it only counts.

    It would else stand at 100% while work goes on.
    """
    with progress_bar(total, unit, label=label) as bar:

        def advance(count: int) -> None:
            if not bar.disable and bar.total is not None and bar.n + count > bar.total:
                bar.total = None
            bar.update(count)

        yield advance
