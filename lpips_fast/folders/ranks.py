"""One evaluation on many processes, as ``torchrun`` starts them.

Chunk ``i`` is measured by rank ``i mod N`` and sent to rank 0, which has them all in order. What
travels is rows of numbers and text, so that gloo carries them whatever device the ranks compute on;
a rank computes on the GPU of its local rank. A rank that fails says why before it ends; one that
dies closes its connection, which rank 0 notices when it waits for that rank's next chunk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist

from .evaluating import Row

__all__ = ["RankError", "Ranks"]

T = TypeVar("T")


class RankError(RuntimeError):
    """Another process failed or died; the message is one sentence that names its rank."""


class Ranks:
    """The processes of one run; a context manager that joins and leaves them.

    Without ``torchrun`` there is one rank, and nothing is sent.

    Attributes:
        rank: of this process, from 0.
        size: the number of processes.
        local_rank, local_size: the same, of those on this machine.

    >>> with Ranks() as ranks:
    ...     ranks.broadcast("to all")
    'to all'
    """

    def __init__(self) -> None:
        launched = dist.is_torchelastic_launched()
        self.rank = int(os.environ["RANK"]) if launched else 0
        self.size = int(os.environ["WORLD_SIZE"]) if launched else 1
        self.local_rank = int(os.environ["LOCAL_RANK"]) if launched else 0
        self.local_size = int(os.environ["LOCAL_WORLD_SIZE"]) if launched else 1
        self._joined = False

    def __enter__(self) -> Ranks:
        if self.size > 1:
            dist.init_process_group("gloo")
            self._joined = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._joined:
            dist.destroy_process_group()

    def device(self, device: torch.device) -> torch.device:
        """The device of this rank: ``cuda`` becomes the GPU of the local rank."""
        if self.size == 1 or device.type == "cpu" or device.index is not None:
            return device
        count = torch.accelerator.device_count()
        return torch.device(device.type, self.local_rank % max(1, count))

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value, on all ranks.

        Raises:
            RankError: rank 0 has stopped.
        """
        values = [value]
        if self.size > 1:
            try:
                dist.broadcast_object_list(values, src=0)
            except RuntimeError as error:
                raise RankError("rank 0 has stopped; its own message says why") from error
        return values[0]  # type: ignore[return-value]

    def share(self, chunks: Sequence[range]) -> Sequence[range]:
        """The chunks that this rank measures."""
        return chunks[self.rank :: self.size]

    def gather(self, own: Iterator[list[Row]], count: int) -> Iterator[list[Row]]:
        """On rank 0: the rows of all ``count`` chunks, in order.

        Args:
            own: the rows of :meth:`share`.

        Raises:
            RankError: a rank failed, or died.
        """
        for chunk in range(count):
            source = chunk % self.size
            yield next(own) if source == 0 else self._receive(source)

    def send(self, own: Generator[list[Row], None, None]) -> None:
        """On any other rank: send the rows of :meth:`share` to rank 0, and on failure the reason.

        Raises:
            RankError: rank 0 has stopped.
        """
        try:
            with contextlib.closing(own):
                for rows in own:
                    self._send(rows)
        except RankError:
            raise
        except Exception as error:
            self._send(f"{error}")
            raise

    def _send(self, message: list[Row] | str) -> None:
        try:
            dist.send_object_list([message], dst=0)
        except RuntimeError as error:
            raise RankError("rank 0 has stopped; its own message says why") from error

    def _receive(self, source: int) -> list[Row]:
        messages: list[list[Row] | str] = [""]
        try:
            dist.recv_object_list(messages, src=source)
        except RuntimeError as error:
            raise RankError(f"rank {source} died") from error
        message = messages[0]
        if isinstance(message, str):
            raise RankError(f"rank {source} failed: {message}")
        return message
