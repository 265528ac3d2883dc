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

from ..images.files import Fingerprint, quoted
from ..images.masks import read_mask
from ..images.reading import Alpha, ImageError, read_pixels
from ..images.resizing import Preprocessing
from ..trunk import architecture
from .measures import Batch, Distance, Measure
from .pairing import Pair

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..lpips import LPIPS

__all__ = ["Evaluation", "FolderGoneError", "Row", "default_workers", "is_out_of_memory"]

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
        name, folder: the pair's.
        values: one a column; ``None`` where it could not be measured.
        error: why not, in one sentence; empty if all could.
        files: by what the two files, and the mask's, are known again; ``None`` of one that could
            not be read.
    """

    name: str
    values: tuple[float | None, ...]
    error: str = ""
    folder: str = ""
    files: tuple[Fingerprint | None, ...] = (None, None)


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
        measures: one or several :class:`~lpips_fast.LPIPS` in evaluation mode, or other measures
            of :mod:`.measures`, all on one device; an image is decoded once for all of them.
        device: where to measure; by default where the models are, or the CPU.
        folders: where the files lie. When one of them vanishes, the evaluation ends with
            :class:`FolderGoneError` instead of an error in every further row.
        alpha, max_pixels: as for :func:`lpips_fast.images.read_image`.
        preprocessing: resizing and cropping; by default none.
        batch: at most so many pairs of one size are measured in one call.
        workers: threads; by default one for each core that the process may use.

    >>> from lpips_fast import LPIPS
    >>> from lpips_fast.folders import pair_folders
    >>> pairs = pair_folders("originals", "decoded").pairs      # doctest: +SKIP
    >>> with Evaluation([LPIPS(net="alex")]) as evaluation:     # doctest: +SKIP
    ...     for rows in evaluation.rows(pairs):
    ...         print(rows)
    [Row(name='1.png', values=(0.123,), …)]

    Attributes:
        columns: of the numbers of a row.
    """

    def __init__(
        self,
        measures: Sequence[LPIPS | Measure],
        *,
        device: torch.device | None = None,
        folders: Iterable[str | os.PathLike[str]] = (),
        alpha: Alpha = "white",
        max_pixels: int | None = None,
        preprocessing: Preprocessing | None = None,
        batch: int = 16,
        workers: int | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch is {batch}, expected at least 1")
        if workers is not None and workers < 1:
            raise ValueError(f"workers is {workers}, expected at least 1")
        self.measures: list[Measure] = [
            Distance(measure) if isinstance(measure, torch.nn.Module) else measure
            for measure in measures
        ]
        self.columns = [column for measure in self.measures for column in measure.columns]
        self._may_be_infinite = [
            measure.may_be_infinite for measure in self.measures for _ in measure.columns
        ]
        models = [measure.model for measure in self.measures if isinstance(measure, Distance)]
        places = {model.scaling_layer.shift.device for model in models}
        self.device = device or next(iter(places), torch.device("cpu"))
        self.folders = [Path(folder) for folder in folders]
        self.alpha: Alpha = alpha
        self.max_pixels = max_pixels
        self.preprocessing = preprocessing or Preprocessing()
        self.batch = batch
        self.workers = workers or default_workers()
        bytes_per_pixel = max(
            (_BYTES_PER_PIXEL.get(architecture(model.net_name), 1050) for model in models),
            default=100,
        )
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

    def read(self, pair: Pair) -> Batch:
        """A pair, and its mask, as they are measured: resized and cropped, a batch of its own.

        Raises:
            ValueError: an image cannot be read, or the two do not go together.
        """
        decoded = self._read(0, pair, None)
        masks = [] if decoded.mask is None else [decoded.mask]
        return Batch([decoded.image0], [decoded.image1], self.device, masks)

    def measure(self, pairs: Sequence[Pair]) -> list[Row]:
        """The rows of one chunk, in the calling thread."""
        rows: list[Row | None] = [None] * len(pairs)
        waiting: dict[tuple[tuple[int, ...], bool], list[_Decoded]] = {}
        pixels_waiting = 0
        decoded: _Decoded | None = None
        for index, pair in enumerate(pairs):
            if self._stop.is_set():
                raise StoppedError("the evaluation was stopped")
            try:
                decoded = self._read(index, pair, decoded)
            except (ValueError, MemoryError) as error:  # ImageError is one
                rows[index] = self._failed(pair, str(error) or "there is no memory to resize it")
                continue
            group = waiting.setdefault(decoded.kind, [])
            group.append(decoded)
            pixels_waiting += decoded.pixels
            if len(group) >= self._batch_of(decoded.pixels):
                pixels_waiting -= decoded.pixels * len(group)
                self._compute(waiting.pop(decoded.kind), pairs, rows)
            elif pixels_waiting > self._pixels_per_batch():
                # Images of many sizes: what waits for partners must not pile up.
                for kind in list(waiting):
                    self._compute(waiting.pop(kind), pairs, rows)
                pixels_waiting = 0
        for group in waiting.values():
            self._compute(group, pairs, rows)
        done = [row for row in rows if row is not None]
        if any(row.error for row in done):
            self._check_folders()
        return done

    # ---------------------------------------------------------------------------- one pair

    def _read(self, index: int, pair: Pair, before: _Decoded | None) -> _Decoded:
        if before is not None and before.path0 == pair.path0:  # it is compared with several
            image0, file0 = before.image0, before.files[0]
        else:
            image0, file0 = self._read_one(pair.path0)
        image1, file1 = self._read_one(pair.path1)
        if image0.shape != image1.shape:
            raise ImageError(
                f"the images differ in size, {_size(image0.shape)} and {_size(image1.shape)} "
                "pixels; crop or resize them"
            )
        if pair.mask is None:
            return _Decoded(index, image0, image1, (file0, file1), pair.path0)
        if before is not None and before.path_of_mask == pair.mask:  # one for many pairs
            mask, file = before.mask, before.files[2]
        else:
            mask, file = read_mask(
                pair.mask, max_pixels=self.max_pixels, preprocessing=self.preprocessing
            )
        assert mask is not None
        if mask.shape != image0.shape[:2]:
            raise ImageError(
                f"the mask {quoted(pair.mask)} has {_size(mask.shape)} pixels and the images have "
                f"{_size(image0.shape)}"
            )
        files = (file0, file1, file)
        return _Decoded(index, image0, image1, files, pair.path0, mask, pair.mask)

    def _read_one(self, path: Path) -> tuple[NDArray[np.uint8], Fingerprint]:
        image, file = read_pixels(path, alpha=self.alpha, max_pixels=self.max_pixels)
        return self.preprocessing(image), file

    def _failed(self, pair: Pair, reason: str) -> Row:
        return Row(pair.name, (None,) * len(self.columns), reason, pair.folder)

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
        try:
            with self._room.take(group[0].pixels * len(group)), torch.inference_mode():
                values, reasons = self._measured(group)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(group) > 1:  # together they do not fit; one by one they may
                for decoded in group:
                    self._compute([decoded], pairs, rows)
                return
            pair = pairs[group[0].index]
            rows[group[0].index] = self._failed(
                pair,
                f"there is no memory to measure {_size(group[0].size)} pixels: '{pair.path0}' and "
                f"'{pair.path1}'; resize or crop them",
            )
            return
        for decoded, numbers in zip(group, values):
            wrong = []
            known = []
            for column, may_be_infinite, number in zip(
                self.columns, self._may_be_infinite, numbers
            ):
                is_sound = number is None or math.isfinite(number) or may_be_infinite
                known.append(number if is_sound else None)
                if not is_sound:
                    wrong.append(
                        f"the {column.name} is {number}: the trunk's weights must be damaged"
                    )
            pair = pairs[decoded.index]
            error_text = "; ".join(dict.fromkeys([*reasons, *wrong]))
            rows[decoded.index] = Row(
                pair.name, tuple(known), error_text, pair.folder, decoded.files
            )

    def _measured(self, group: list[_Decoded]) -> tuple[list[tuple[float | None, ...]], list[str]]:
        """Each pair's numbers, and why some of them are missing."""
        masks = [d.mask for d in group if d.mask is not None]
        batch = Batch([d.image0 for d in group], [d.image1 for d in group], self.device, masks)
        parts: list[list[list[float]] | list[list[None]]] = []
        reasons = []
        for measure in self.measures:
            if min(batch.size) < measure.minimum_size:
                parts.append([[None] * len(measure.columns) for _ in group])
                reasons.append(
                    f"{_size(batch.size)} pixels are too small for {measure.name}, which needs "
                    f"{measure.minimum_size}x{measure.minimum_size}"
                )
            else:
                parts.append(measure(batch))
        return [tuple(x for part in of_one for x in part) for of_one in zip(*parts)], reasons


@dataclass(frozen=True, eq=False)
class _Decoded:
    index: int  # in its chunk
    image0: NDArray[np.uint8]  # (H, W, 3)
    image1: NDArray[np.uint8]
    files: tuple[Fingerprint, ...]
    path0: Path
    mask: NDArray[np.uint8] | None = None  # (H, W)
    path_of_mask: Path | None = None

    @property
    def size(self) -> tuple[int, ...]:
        return self.image0.shape[:2]

    @property
    def kind(self) -> tuple[tuple[int, ...], bool]:
        """Of which all in a batch are: the size, and with masks or without."""
        return self.size, self.mask is not None

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


def is_out_of_memory(error: Exception) -> bool:
    """On a CPU torch says so in words alone."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return "can't allocate memory" in text or "not enough memory" in text


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 8 << 30


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"
