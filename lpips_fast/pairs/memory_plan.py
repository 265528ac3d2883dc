"""What all pairs of many images cost: what is held in memory, recomputed, and spilled.

phi (:mod:`.embedding`) has as many floats as all taps together. At 256x256 pixels:

=======  ========================  =========  ============
net      floats an image           64 images  2,000 images
=======  ========================  =========  ============
alex       640,128 (2.6 MB)           0.2 GB        5.1 GB
squeeze  2,189,504 (8.8 MB)           0.6 GB       17.5 GB
vgg      7,995,392 (32 MB)            2.0 GB       64.0 GB
=======  ========================  =========  ============

*Held* is phi of one group of images, as many as fit in ``memory_limit`` beside the matrix and the
batch in flight. Every batch that goes through the trunk is multiplied with the group, layer by
layer as its taps come out, and forgotten. *Recomputed* is phi of the images behind the group, once
for each group. 2,000 images of 256x256 within 8 GiB are one group for alex, 2,000 trunk passes; for
vgg they are 10 groups and some 10,000 trunk passes, where the pairs one by one take 4 million.
*Spilled* to disk is nothing: to read 32 MB back takes no less time than to make them again.
:func:`plan` says all this for other numbers, before anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..composed import accumulator_dtype
from ..trunk.table import Fire, ReLU, trunk_spec
from .embedding import layer_outputs, tap_sizes

if TYPE_CHECKING:
    from ..lpips import LPIPS

#: Bytes that a call may take beside the model, its arguments and the program: 4 GiB. A constant,
#: not a part of what happens to be free: the same call gives the same bits everywhere.
DEFAULT_MEMORY_LIMIT = 4 * 2**30

# Images in flight: more gain nothing on a CPU, and take memory from those that are held.
MAX_BATCH = 16

#: Elements of phi that are summed in one go. One product of some million elements is off by 5e-4 on
#: a CPU, which adds them one after the other; sums of such blocks are right to 1e-7.
BLOCK_LENGTH = 4096


@dataclass(frozen=True)
class Plan:
    """What a call holds in memory and what it computes how often; ``str(plan)`` says it in words.

    Attributes:
        net: the trunk.
        image_size: height and width.
        images: the number of images.
        others: the number of images to compare them with; ``None``: all with each other.
        floats_per_image: elements of phi, and so of a vector that ``embed`` returns.
        held: images whose phi is in memory at a time, one group.
        groups: so many groups there are, one after the other.
        holds_others: the groups are made of ``others``, because that is cheaper.
        batch: images that go through the trunk at a time.
        trunk_passes: images that go through the trunk in all, each as often as it is needed.
            Near pairs, which are computed again, come on top: at most as many once more.
        peak_bytes: memory at the fullest moment, beside the model and the arguments.
        memory_limit: bytes that were allowed.
    """

    net: str
    image_size: tuple[int, int]
    images: int
    others: int | None
    floats_per_image: int
    held: int
    groups: int
    holds_others: bool
    batch: int
    trunk_passes: int
    peak_bytes: int
    memory_limit: int

    def __str__(self) -> str:
        height, width = self.image_size
        among = "with each other" if self.others is None else f"with {self.others:,} others"
        held = f"{self.held:,} images"
        if self.groups > 1:
            held = f"{self.groups} groups of up to {self.held:,} images, one after the other"
        return (
            f"{self.images:,} images of {height}x{width} {among}, {self.net}: "
            f"{self.floats_per_image:,} floats an image\n"
            f"  held in memory: {held}, and {self.batch} in flight\n"
            f"  trunk passes: {self.trunk_passes:,}\n"
            f"  recomputed: {self._recomputed()}\n"
            f"  spilled to disk: nothing\n"
            f"  peak memory: {_gib(self.peak_bytes)} of {_gib(self.memory_limit)} allowed"
        )

    def _recomputed(self) -> str:
        once = self.images + (self.others or 0)
        if self.trunk_passes <= once:  # fewer where features were given
            return "near pairs only"
        again = self.trunk_passes - once
        return f"near pairs, and features {again:,} times ({self.trunk_passes / once:.1f} x in all)"


def _gib(count: float) -> str:
    if count < 2**30 // 100:  # which would be 0.00
        return f"{count / 2**20:.2f} MiB"
    return f"{count / 2**30:.2f} GiB"


def plan(
    model: LPIPS,
    images: int,
    image_size: tuple[int, int],
    others: int | None = None,
    *,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    max_batch: int | None = None,
) -> Plan:
    """How ``pairwise`` would go about so many images, without any.

    Args:
        model: the model.
        images: the number of images.
        image_size: their height and width.
        others: the number of images to compare them with; ``None``: all with each other.
        memory_limit: bytes it may take; see ``pairwise``.
        max_batch: images that go through the trunk at a time; see ``pairwise``.

    Raises:
        ValueError: the limit is too small for one image; the message says what is needed.

    >>> import lpips_fast
    >>> model = lpips_fast.LPIPS(pnet_rand=True, verbose=False)
    >>> print(plan(model, 2000, (256, 256), memory_limit=8 * 2**30))
    2,000 images of 256x256 with each other, alex: 640,128 floats an image
      held in memory: 2,000 images, and 16 in flight
      trunk passes: 2,000
      recomputed: near pairs only
      spilled to disk: nothing
      peak memory: 4.96 GiB of 8.00 GiB allowed
    """
    dtype = accumulator_dtype(model.scaling_layer.shift.dtype)
    return make_plan(model, images, others, image_size, dtype, memory_limit, max_batch)


def make_plan(
    model: LPIPS,
    images: int,
    others: int | None,
    image_size: tuple[int, int],
    dtype: torch.dtype,
    memory_limit: int,
    max_batch: int | None,
    is_encoded: tuple[bool, bool] = (False, False),
) -> Plan:
    if max_batch is not None and max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}")
    if min(image_size) < model.minimum_size or images < 1 or (others is not None and others < 1):
        raise ValueError(
            f"expected at least one image of at least {model.minimum_size}x{model.minimum_size} "
            f"pixels on either side, got {images} images of {image_size[0]}x{image_size[1]}"
            + ("" if others is None else f" and {others} others")
        )
    sizes = tap_sizes(model.net_name, image_size)
    layers = [sizes[layer] for layer in model.layers]
    live = _elements_alive(model.net_name, image_size, model.layers[-1])
    floats = sum(layers)
    item = dtype.itemsize
    trunk_item = (model.dtype or dtype).itemsize
    pixels = 3 * image_size[0] * image_size[1]
    # One image in flight: as pixels (read, batched, scaled, reordered), in the trunk, and either as
    # one layer of phi (and once more to find the centre) or, for the direct kernel, as two sets of
    # taps.
    reading = 4 * pixels * item + live * trunk_item
    in_flight = reading + max(2 * max(layers) * item, 2 * floats * trunk_item)
    matrix = images * (images if others is None else others) * (item + 1)  # and a mask
    free = memory_limit - matrix - floats * item  # the centre
    batch = min(max_batch or model.max_batch or MAX_BATCH, max(images, others or 0))
    if max_batch is None:
        batch = max(1, min(batch, free // 4 // in_flight))
    partial = max(layers) // BLOCK_LENGTH + 8
    each = floats * item + partial * batch * item  # phi, and its products with a batch
    held = (free - batch * in_flight) // each
    if held < 1:
        least = memory_limit - free + in_flight + each
        raise ValueError(
            f"memory_limit is {_gib(memory_limit)}, but {images:,} images of "
            f"{image_size[0]}x{image_size[1]} with trunk {model.pnet_type!r} need at least "
            f"{_gib(least)}{'' if max_batch is None else ' with max_batch=1'}: raise it"
        )

    def passes(rows: int, columns: int | None, encoded: tuple[bool, bool]) -> int:
        starts = range(0, rows, held)
        if columns is None:
            return 0 if encoded[0] else sum(rows - start for start in starts)
        return (0 if encoded[0] else rows) + (0 if encoded[1] else len(starts) * columns)

    trunk_passes, holds_others, rows = passes(images, others, is_encoded), False, images
    if others is not None:
        swapped = passes(others, images, is_encoded[::-1])
        if swapped < trunk_passes:
            trunk_passes, holds_others, rows = swapped, True, others
    held = min(held, rows)
    return Plan(
        net=model.net_name,
        image_size=image_size,
        images=images,
        others=others,
        floats_per_image=floats,
        held=held,
        groups=-(-rows // held),
        holds_others=holds_others,
        batch=batch,
        trunk_passes=trunk_passes,
        peak_bytes=memory_limit - free + batch * in_flight + held * each,
        memory_limit=memory_limit,
    )


def _elements_alive(net: str, image_size: tuple[int, int], last_layer: int) -> int:
    """The most elements that one image's pass to a tap of the trunk has in memory at a time.

    A slice of the trunk keeps its input, the tap before, until its own tap is done.
    """
    taps = list(trunk_spec(net).taps.values())[: last_layer + 1]
    before = current = 3 * image_size[0] * image_size[1]
    most = 0
    for index, (layer, output) in enumerate(layer_outputs(net, image_size)):
        if not isinstance(layer, ReLU):  # in place
            made = 2 * output if isinstance(layer, Fire) else output  # two halves, put together
            most = max(most, before + current + made)
        current = output
        if index in taps:
            before = output
        if index == taps[-1]:
            break
    return most
