"""Distances of many pairs of image files: decoded and measured in parallel, returned in order.

The pairs are cut into chunks, and a chunk is one thread's work from the files to the distances. On
a CPU every thread computes on one core: while one decodes, the others compute, and no thread waits
for the slices of another's convolution. On a GPU the threads decode and take turns to compute.

The last bits of a convolution can depend on the shape of the batch and on the number of cores that
share it (torch's own of SqueezeNet on a CPU do). Here both are functions of the list of pairs and
of ``batch`` alone: a chunk's borders, and how the images of one size within it are batched. So the
same list gives the same bits on any number of threads, in any number of processes, and when an
interrupted run goes on at a later chunk.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from ..images.reading import Alpha, image_to_tensor, read_image_uint8
from ..images.resizing import Preprocessing
from .pairing import Pair

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..lpips import LPIPS

__all__ = ["Evaluation", "FolderGoneError", "Row", "default_workers"]

# A batch holds at most so many pixels of one side (four pairs of 256x256 on a CPU). More is no
# faster there, and takes memory in every thread.
_BATCH_PIXELS = {"cpu": 4 * 256 * 256}
_BATCH_PIXELS_OF_A_GPU = 64 * 256 * 256

# Chunks are small enough that every thread and process gets its share, but no smaller than that.
_CHUNKS = 64
_BATCHES_PER_CHUNK = 4

# Measured, per pixel of a pair, without a graph: inputs, activations, features and scratch.
_BYTES_PER_PIXEL = {"alex": 100, "squeeze": 350, "vgg": 1050}

Item = TypeVar("Item")
Result = TypeVar("Result")


class FolderGoneError(RuntimeError):
    """A whole folder went away while its images were read."""


class StoppedError(RuntimeError):
    """The evaluation was abandoned while this chunk was measured."""


@dataclass(frozen=True)
class Row:
    """The outcome of one pair.

    Attributes:
        name: the pair's.
        distances: one per model; ``None`` where it could not be measured.
        error: why not, in one sentence; empty if all could.
    """

    name: str
    distances: tuple[float | None, ...]
    error: str = ""


def default_workers(processes: int = 1) -> int:
    """Threads for one of ``processes`` on this machine: its share of the usable cores."""
    try:
        cores = len(os.sched_getaffinity(0))  # what a container or taskset leaves of them
    except AttributeError:  # not on macOS or Windows
        cores = os.cpu_count() or 1
    return max(1, cores // processes)


class Evaluation:
    """Measures pairs of image files.

    Args:
        models: one or several :class:`~lpips_fast.LPIPS`, all on one device, in evaluation mode;
            an image is decoded once for all of them.
        folders: where the files lie. When one of them vanishes, the evaluation ends with
            :class:`FolderGoneError` instead of an error in every further row.
        alpha: as for :func:`lpips_fast.images.read_image`.
        preprocessing: resizing and cropping; by default none.
        batch: at most so many pairs of one size are measured in one call.
        workers: threads; by default one for each core that the process may use.

    >>> from lpips_fast import LPIPS
    >>> from lpips_fast.folders import pair_folders
    >>> pairs = pair_folders("originals", "decoded").pairs      # doctest: +SKIP
    >>> with Evaluation([LPIPS(net="alex")]) as evaluation:     # doctest: +SKIP
    ...     for rows in evaluation.rows(pairs):
    ...         print(rows)
    [Row(name='1.png', distances=(0.123,), error='')]
    """

    def __init__(
        self,
        models: Sequence[LPIPS],
        *,
        folders: Iterable[str | os.PathLike[str]] = (),
        alpha: Alpha = "white",
        preprocessing: Preprocessing | None = None,
        batch: int = 16,
        workers: int | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch is {batch}, expected at least 1")
        if workers is not None and workers < 1:
            raise ValueError(f"workers is {workers}, expected at least 1")
        self.models = list(models)
        if any(model.spatial or model.reduction != "none" for model in self.models):
            raise ValueError(
                "an evaluation needs one distance a pair: models with spatial=False and "
                "reduction='none'"
            )
        self.device = self.models[0].scaling_layer.shift.device
        self.folders = [Path(folder) for folder in folders]
        self.alpha: Alpha = alpha
        self.preprocessing = preprocessing or Preprocessing()
        self.batch = batch
        self.workers = workers or default_workers()
        bytes_per_pixel = max(_BYTES_PER_PIXEL.get(m.net_name, 1050) for m in self.models)
        # One at a time on a GPU: it runs one after the other anyway, and memory is scarcer.
        pixels = 0 if self.device.type != "cpu" else _physical_memory() // 2 // bytes_per_pixel
        self._room = _Room(pixels)
        self._stop = threading.Event()
        self._threads_before: int | None = None

    def __enter__(self) -> Evaluation:
        # Of the whole process: threads that start from here on compute on one core each.
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._threads_before is not None
        torch.set_num_threads(self._threads_before)

    def chunks(self, count: int) -> list[range]:
        """How ``count`` pairs are cut into chunks; a function of ``count`` and ``batch`` alone."""
        size = min(max(count // _CHUNKS, 1), _BATCHES_PER_CHUNK * self.batch)
        return [range(first, min(first + size, count)) for first in range(0, count, size)]

    def rows(
        self, pairs: Sequence[Pair], chunks: Iterable[range] | None = None
    ) -> Generator[list[Row], None, None]:
        """The rows of each chunk, in order.

        Args:
            pairs: all of them.
            chunks: those of :meth:`chunks` to measure; by default all.

        Raises:
            FolderGoneError: one of the folders vanished.
        """
        chunks = self.chunks(len(pairs)) if chunks is None else chunks

        def measure(chunk: range) -> list[Row]:
            return self.measure([pairs[i] for i in chunk])

        return _in_order(measure, chunks, self.workers, self._stop)

    def measure(self, pairs: Sequence[Pair]) -> list[Row]:
        """The rows of one chunk, in the calling thread."""
        rows: list[Row | None] = [None] * len(pairs)
        waiting: dict[tuple[int, ...], list[_Decoded]] = {}
        pixels_waiting = 0
        for index, pair in enumerate(pairs):
            if self._stop.is_set():
                raise StoppedError("the evaluation was stopped")
            try:
                decoded = self._read(index, pair)
            except ValueError as error:  # ImageError is one
                rows[index] = self._failed(pair, str(error))
                continue
            group = waiting.setdefault(decoded.size, [])
            group.append(decoded)
            pixels_waiting += decoded.pixels
            if len(group) >= self._batch_of(decoded.pixels):
                pixels_waiting -= decoded.pixels * len(group)
                self._compute(waiting.pop(decoded.size), pairs, rows)
            elif pixels_waiting > self._pixels_per_batch():
                # Images of many sizes: what waits for partners must not pile up.
                for size in list(waiting):
                    self._compute(waiting.pop(size), pairs, rows)
                pixels_waiting = 0
        for group in waiting.values():
            self._compute(group, pairs, rows)
        done = [row for row in rows if row is not None]
        if any(row.error for row in done):
            self._check_folders()
        return done

    # ---------------------------------------------------------------------------- one pair

    def _read(self, index: int, pair: Pair) -> _Decoded:
        image0, image1 = (
            self.preprocessing(read_image_uint8(path, alpha=self.alpha))
            for path in (pair.path0, pair.path1)
        )
        if image0.shape != image1.shape:
            raise ValueError(
                f"the images differ in size, {_size(image0.shape)} and {_size(image1.shape)} "
                "pixels; crop or resize them"
            )
        return _Decoded(index, image0, image1)

    def _failed(self, pair: Pair, reason: str) -> Row:
        return Row(pair.name, (None,) * len(self.models), reason)

    def _check_folders(self) -> None:
        for folder in self.folders:
            # A share that was unmounted leaves an empty folder behind.
            try:
                holds_something = any(folder.iterdir())
            except OSError:  # gone, or going
                holds_something = False
            if not holds_something:
                raise FolderGoneError(f"the folder {folder} is gone, or empty now")

    # ---------------------------------------------------------------------------- one batch

    def _pixels_per_batch(self) -> int:
        return _BATCH_PIXELS.get(self.device.type, _BATCH_PIXELS_OF_A_GPU)

    def _batch_of(self, pixels: int) -> int:
        return min(self.batch, max(1, self._pixels_per_batch() // pixels))

    def _compute(
        self, group: list[_Decoded], pairs: Sequence[Pair], rows: list[Row | None]
    ) -> None:
        """Measure images of one size and put their rows in place."""
        if self._stop.is_set():
            raise StoppedError("the evaluation was stopped")
        pixels, size = group[0].pixels, group[0].size
        per_model: list[list[float | None]] = []
        reasons = []
        with self._room.take(pixels * len(group)), torch.inference_mode():
            in0, in1 = (
                torch.cat([image_to_tensor(image) for image in images]).to(self.device)
                for images in zip(*((d.image0, d.image1) for d in group))
            )
            for model in self.models:
                if min(size) < model.minimum_size:
                    per_model.append([None] * len(group))
                    reasons.append(
                        f"{_size(size)} pixels are too small for trunk {model.pnet_type!r}, which "
                        f"needs {model.minimum_size}x{model.minimum_size}"
                    )
                else:
                    per_model.append(model(in0, in1).flatten().tolist())
        for decoded, distances in zip(group, zip(*per_model)):
            wrong = reasons + [
                f"the distance is {d}: the trunk's weights must be damaged"
                for d in distances
                if d is not None and not math.isfinite(d)
            ]
            finite = tuple(d if d is not None and math.isfinite(d) else None for d in distances)
            name = pairs[decoded.index].name
            rows[decoded.index] = Row(name, finite, "; ".join(dict.fromkeys(wrong)))


@dataclass(frozen=True, eq=False)
class _Decoded:
    index: int  # in its chunk
    image0: NDArray[np.uint8]  # (H, W, 3)
    image1: NDArray[np.uint8]

    @property
    def size(self) -> tuple[int, ...]:
        return self.image0.shape[:2]

    @property
    def pixels(self) -> int:
        return self.image0.shape[0] * self.image0.shape[1]


class _Room:
    """Lets threads compute at once as long as their pixels fit; one alone always may."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._taken = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(
                lambda: self._taken == 0 or self._taken + pixels <= self._capacity
            )
            self._taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self._taken -= pixels
                self._changed.notify_all()


def _in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, stop: threading.Event
) -> Generator[Result, None, None]:
    """``map`` on threads, a bounded number of items ahead; leaving it early stops the threads."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="lpips-fast")
    ahead: deque[Future[Result]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 8 << 30


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"
