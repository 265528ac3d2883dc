"""``lpips-fast info``: versions, build, devices and weights."""

from __future__ import annotations

import argparse
import sys

from .command import Command, print_to


def _add_info_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # it has none


def _run_info(options: argparse.Namespace) -> None:
    from ..info import report

    print_to(report(), sys.stdout)


COMMAND = Command(
    "print versions, build and devices, for a bug report", _add_info_arguments, _run_info
)
