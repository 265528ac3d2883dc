"""What can go wrong with weights, in one sentence each."""

from __future__ import annotations


class WeightsError(RuntimeError):
    """Weights were found, but they cannot be used: damaged, foreign, or of the wrong shape.

    Attributes:
        command_line: the message for a user of the command line, who passes ``--weights PATH``
            where Python code passes ``weights=``. Mostly the message itself.
    """

    def __init__(self, message: str = "", command_line: str | None = None) -> None:
        super().__init__(message)
        self.command_line = message if command_line is None else command_line


class WeightsNotFoundError(WeightsError, FileNotFoundError):
    """No weights were found where they were asked for, nor could they be downloaded."""
