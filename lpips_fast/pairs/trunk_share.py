"""The trunk passes of one call of ``pairwise``, shared among processes of ``torch.distributed``.

A call goes through the images batch by batch, in an order that its plan fixes. Batch t is read and
taken through the trunk by rank t mod N, which sends the taps to rank 0; rank 0 compares. Batches
are those of one process, and a tap arrives as it was, memory order included, so that the matrix has
the same bits. What travels is taps, some megabytes an image of 256x256, so that this pays where the
trunk is the work, not for tiny images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from .sources import ImageSource

__all__ = ["ShareError", "TrunkShare"]

#: How a tap lies in memory, its shape and dtype; or why there is none.
_Header = tuple[bool, tuple[int, ...], torch.dtype]


class ShareError(RuntimeError):
    """Another process failed or died; the message is one sentence that names its rank."""


class TrunkShare:
    """One of the processes; the default group is initialised, with a backend for CPU tensors.

    Args:
        rank: of this process, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def taps(self, turn: int, source: ImageSource, part: Sequence[int]) -> Iterator[Tensor]:
        """On rank 0: the taps of a turn, computed here or received.

        Raises:
            ShareError: the rank whose turn it is failed, or died.
        """
        owner = turn % self.size
        if owner == 0:
            yield from source.taps(part)
            return
        try:
            messages: list[list[_Header] | str] = [""]
            dist.recv_object_list(messages, src=owner)
            headers = messages[0]
            if isinstance(headers, str):
                raise ShareError(f"rank {owner} failed: {headers}")
            for is_channels_last, shape, dtype in headers:
                tap = torch.empty(shape, dtype=dtype)
                dist.recv(tap.view(torch.uint8), src=owner)
                tap = tap.to(source.device)
                yield tap.permute(0, 3, 1, 2) if is_channels_last else tap
        except ShareError:
            raise
        except RuntimeError as error:
            raise ShareError(f"rank {owner} died") from error

    def serve(self, turns: Iterable[tuple[ImageSource, Sequence[int]]]) -> None:
        """On any other rank: compute and send what is its part of all turns.

        Raises:
            ShareError: rank 0 has stopped.
        """
        for turn, (source, part) in enumerate(turns):
            if turn % self.size != self.rank:
                continue
            try:
                taps = [_as_sent(tap) for tap in source.taps(part)]
            except Exception as error:
                self._send_object(f"{error}")
                raise
            self._send_object([header for header, _ in taps])
            for _, tap in taps:
                self._guarded(dist.send, tap.view(torch.uint8), 0)

    def _send_object(self, what: list[_Header] | str) -> None:
        self._guarded(dist.send_object_list, [what], 0)

    def _guarded(self, send: object, what: object, to: int) -> None:
        try:
            send(what, dst=to)  # type: ignore[operator]
        except RuntimeError as error:
            raise ShareError("rank 0 has stopped; its own message says why") from error


def _as_sent(tap: Tensor) -> tuple[_Header, Tensor]:
    is_channels_last = not tap.is_contiguous() and tap.is_contiguous(
        memory_format=torch.channels_last
    )
    plain = (tap.permute(0, 2, 3, 1) if is_channels_last else tap).contiguous().cpu()
    return (is_channels_last, tuple(plain.shape), plain.dtype), plain
