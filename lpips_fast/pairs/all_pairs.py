"""Distances between all pairs of many images, and nearest neighbours.

LPIPS is the squared Euclidean distance of vectors phi (:mod:`.embedding`). So N images
cost N trunk passes and matrix products, instead of a trunk pass for each image of each of N² pairs.

**Precision.** ``|x|² + |y|² - 2 x·y`` cancels where x is near y. Three things hold it:

- phi is centred on the mean of some of the images, which changes no distance and takes away what
  all images share, the larger part of its norm.
- Products and norms are summed over short blocks, in float32 (float64 for float64), whatever TF32
  or autocast the program allows elsewhere.
- A distance below :data:`NEAR` times the sum of the two squared norms is computed again by the
  direct kernel (:func:`lpips_fast.functional.distance`), which takes the difference first.

What is not computed again has a relative error below :data:`RELATIVE_ERROR`. The matrix of images
against themselves is symmetric to the bit and zero on the diagonal; no distance is negative.

**Memory** is bounded: :mod:`.memory_plan` says what is held and what is recomputed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import functional
from .embedding import Embedding, euclidean_weights
from .memory_plan import BLOCK_LENGTH, DEFAULT_MEMORY_LIMIT, Plan, make_plan, plan
from .sources import Images, ImageSource, as_index, check_alike
from .trunk_share import TrunkShare

if TYPE_CHECKING:
    from ..lpips import LPIPS

__all__ = [
    "DEFAULT_MEMORY_LIMIT",
    "NEAR",
    "RELATIVE_ERROR",
    "Plan",
    "mean_diversity",
    "nearest",
    "pairwise",
    "plan",
    "serve_pairwise",
]

#: A distance below this part of the two squared norms' sum is computed again by the direct kernel.
NEAR = 0.02

#: Bound of the relative error of distances that are not computed again.
RELATIVE_ERROR = 5e-5

# One part in so many of the memory in which neighbours are sorted.
MATRIX_SHARE = 4


def _split(positions: Sequence[int], size: int) -> list[Any]:
    return [positions[first : first + size] for first in range(0, len(positions), size)]


# -------------------------------------------------------------------------------------- all pairs


def pairwise(
    model: LPIPS,
    X: Images,
    Y: Images | None = None,
    *,
    normalize: bool = False,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    max_batch: int | None = None,
    progress: Callable[[int], object] | None = None,
    share: TrunkShare | None = None,
) -> Tensor:
    """Distances between all pairs of images, from one trunk pass an image.

    Args:
        model: the model; ``spatial``, negative weights and active dropout are refused.
        X: images of one size: a tensor (N, 3, H, W), on any device; :class:`Features` of
            :meth:`LPIPS.encode`; or anything with a length and items by position, a list or a data
            set, whose items are tensors (3, H, W), paths of image files, or tuples that start with
            one. Items are read when they are needed, and again for every group of the plan.
        Y: images to compare X with; ``None``: X with itself, at half the price.
        normalize: tensors are in [0, 1]. Files are always read to what the model takes.
        memory_limit: bytes that the call may take beside the model and its arguments, the returned
            matrix included. Less memory costs more trunk passes: see :func:`plan`.
        max_batch: images that go through the trunk at a time; ``None``: as many as pays, at most
            the model's ``max_batch``.
        progress: called with the number of images that just went through the trunk; they add up to
            :attr:`Plan.trunk_passes`, and to more where near pairs are computed again.
        share: processes that take part of the trunk passes, each of which calls
            :func:`serve_pairwise`; this one is rank 0.

    Returns:
        (N, M) on the model's device, float32 (float64 for a float64 model). No graph is kept.
        Without Y it is symmetric to the bit and 0 on the diagonal.

    Raises:
        ValueError: images of different sizes, no images, features of another trunk, a model that
            is no Euclidean distance, a limit too small for one image, or images that want a
            gradient.
        TypeError: something that cannot be read by position and again, or is no image.

    Source: Zhang et al., CVPR 2018, equation 1, with the square written out.

    >>> import lpips_fast
    >>> model = lpips_fast.LPIPS(pnet_rand=True, verbose=False)
    >>> images = torch.rand(5, 3, 64, 64)
    >>> matrix = pairwise(model, images, normalize=True)
    >>> matrix.shape, bool((matrix == matrix.T).all()), matrix.diagonal().tolist()
    (torch.Size([5, 5]), True, [0.0, 0.0, 0.0, 0.0, 0.0])
    """
    rows = ImageSource("X", X, model, normalize)
    columns = None if Y is None or Y is X else ImageSource("Y", Y, model, normalize)
    if columns is not None:
        check_alike(rows, columns)
    with torch.no_grad():
        return _matrix(model, rows, columns, memory_limit, max_batch, progress, share)[0]


def serve_pairwise(
    model: LPIPS,
    X: Images,
    Y: Images | None = None,
    *,
    share: TrunkShare,
    normalize: bool = False,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    max_batch: int | None = None,
) -> None:
    """This process's part of the trunk passes of a :func:`pairwise` that rank 0 calls.

    All arguments are those of that call, the model on a device of this process.

    Raises:
        ShareError: rank 0 has stopped.
    """
    rows = ImageSource("X", X, model, normalize)
    columns = None if Y is None or Y is X else ImageSource("Y", Y, model, normalize)
    with torch.no_grad():
        scheme = _scheme(model, rows, columns, memory_limit, max_batch)
        held, streamed = rows, columns
        if columns is not None and scheme.holds_others:
            held, streamed = columns, rows
        share.serve(
            (source, part)
            for _, turns in _groups(held, streamed, scheme)
            for source, part, _ in turns
        )


def _scheme(
    model: LPIPS,
    rows: ImageSource,
    columns: ImageSource | None,
    memory_limit: int,
    max_batch: int | None,
) -> Plan:
    others = None if columns is None else len(columns)
    is_encoded = (rows.is_encoded, columns is not None and columns.is_encoded)
    return make_plan(
        model, len(rows), others, rows.size, rows.dtype, memory_limit, max_batch, is_encoded
    )


def _matrix(
    model: LPIPS,
    rows: ImageSource,
    columns: ImageSource | None,
    memory_limit: int,
    max_batch: int | None,
    progress: Callable[[int], object] | None,
    share: TrunkShare | None = None,
) -> tuple[Tensor, Tensor]:
    """Distances, and which of them are the direct kernel's."""
    others = None if columns is None else len(columns)
    scheme = _scheme(model, rows, columns, memory_limit, max_batch)
    device = model.scaling_layer.shift.device
    shape = (len(rows), len(rows) if others is None else others)
    matrix = torch.zeros(shape, dtype=rows.dtype, device=device)
    is_near = torch.zeros(shape, dtype=torch.bool, device=device)

    # The held side first. Views, so that what is written there is in the matrix.
    held, streamed = rows, columns
    target, near = matrix, is_near
    if columns is not None and scheme.holds_others:
        held, streamed, target, near = columns, rows, matrix.T, is_near.T
    for i, j, distances, norms in _blocks(model, held, streamed, scheme, progress, share):
        is_small = distances < NEAR * norms
        distances.clamp_(min=0)
        if streamed is None:
            # Each pair once, above the diagonal, which leaves the diagonal 0.
            above = i.start - j.start + 1
            distances.triu_(above)
            is_small.triu_(above)
            target[as_index(j), as_index(i)] += distances.T
            target[as_index(i), as_index(j)] += distances
        else:
            target[as_index(i), as_index(j)] = distances
        near[as_index(i), as_index(j)] |= is_small
    _refine(model, held, streamed, near, target, scheme, progress)
    return matrix, is_near


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in the dtype of their arguments, whatever the program allows elsewhere."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    lowered = [(s, p) for s, p in zip(settings, before) if p not in ("none", "ieee")]
    try:
        for setting, _ in lowered:
            setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, precision in lowered:
            setting.fp32_precision = precision


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of (n, K) and (m, K): (n, m), block by block of K."""
    (blocks_a, rest_a), (blocks_b, rest_b) = _blocked(a), _blocked(b)
    with _full_precision(a.device):
        sums = torch.bmm(blocks_a.transpose(0, 1), blocks_b.permute(1, 2, 0)).sum(dim=0)
        return sums.addmm_(rest_a, rest_b.T)


def _squares(a: Tensor) -> Tensor:
    """Squared norms of (n, K): (n,), block by block of K."""
    blocks, rest = _blocked(a)
    norms = torch.linalg.vector_norm(blocks, dim=2).square_().sum(dim=1)
    return norms + torch.linalg.vector_norm(rest, dim=1).square_()


def _blocked(a: Tensor) -> tuple[Tensor, Tensor]:
    """(n, K) as blocks (n, K // length, length), and the rest; both are views."""
    count = a.shape[1] // BLOCK_LENGTH
    whole = count * BLOCK_LENGTH
    return a[:, :whole].unflatten(1, (count, BLOCK_LENGTH)), a[:, whole:]


def _groups(
    held: ImageSource, streamed: ImageSource | None, scheme: Plan
) -> Iterator[tuple[range, list[tuple[ImageSource, range, bool]]]]:
    """Each group that is held, and the batches that go through the trunk for it, in order.

    A batch is a source, positions in it, and whether it is a part of the group.
    """
    for start in range(0, len(held), scheme.held):
        group = range(start, min(start + scheme.held, len(held)))
        others = range(group.stop, len(held)) if streamed is None else range(len(streamed))
        turns = [(held, part, True) for part in _split(group, scheme.batch)]
        turns += [(streamed or held, part, False) for part in _split(others, scheme.batch)]
        yield group, turns


def _blocks(
    model: LPIPS,
    held: ImageSource,
    streamed: ImageSource | None,
    scheme: Plan,
    progress: Callable[[int], object] | None,
    share: TrunkShare | None,
) -> Iterator[tuple[range, range, Tensor, Tensor]]:
    """Squared distances of phi, block by block, every pair of different images at least once.

    Yields:
        The rows and columns of a block, its distances by the expanded square, and the sums of the
        two squared norms that were in it.
    """
    embedding = Embedding(model)
    turn = 0
    for group, turns in _groups(held, streamed, scheme):
        phis: list[Tensor] = []  # of the group, one tensor a layer
        centres: list[Tensor] = []
        norms = torch.empty(len(group), dtype=held.dtype, device=held.device)
        filled = 0
        for source, part, fills in turns:
            end = filled + len(part) if fills else filled
            is_compared = not fills or streamed is None
            squares: Any = 0
            products: Any = 0
            taps = source.taps(part) if share is None else share.taps(turn, source, part)
            turn += 1
            for layer, tap in enumerate(taps):
                if filled == 0:
                    phis.append(norms.new_empty(len(group), tap[0].numel()))
                phi = embedding(layer, tap, phis[layer][filled:end] if fills else None)
                if filled == 0:
                    centres.append(_centre(phi))
                phi -= centres[layer]
                squares = squares + _squares(phi)
                if is_compared:
                    products = products + _products(phis[layer][:end], phi)
                del tap, phi  # not kept while the next layer is computed
            if fills:
                norms[filled:end] = squares
                filled = end
            if progress is not None and not source.is_encoded:
                progress(len(part))
            if is_compared:
                sums = norms[:end, None] + squares
                yield range(group.start, group.start + end), part, sums - 2 * products, sums


def _centre(phi: Tensor) -> Tensor:
    """The mean of (n, K), in which an image of NaN does not count: others' distances are theirs."""
    mean = phi.mean(dim=0)
    return mean if bool(torch.isfinite(mean).all()) else phi.nan_to_num(0.0).mean(dim=0)


# ------------------------------------------------------------------------------- the direct kernel


class _Taps:
    """Taps of some images in memory, for the direct kernel."""

    def __init__(
        self,
        source: ImageSource,
        positions: Sequence[int],
        batch: int,
        progress: Callable[[int], object] | None,
    ) -> None:
        self.layers: list[Tensor] = []
        for start in range(0, len(positions), batch):
            part = positions[start : start + batch]
            for layer, tap in enumerate(source.taps(part)):
                if start == 0:
                    shape = (len(positions), *tap.shape[1:])
                    layout = torch.channels_last
                    room = torch.empty(
                        shape, dtype=tap.dtype, device=tap.device, memory_format=layout
                    )
                    self.layers.append(room)
                self.layers[layer][start : start + len(part)] = tap
            if progress is not None and not source.is_encoded:
                progress(len(part))

    def __getitem__(self, index: Tensor | slice) -> list[Tensor]:
        return [tap[index] for tap in self.layers]


def _refine(
    model: LPIPS,
    held: ImageSource,
    streamed: ImageSource | None,
    chosen: Tensor,
    matrix: Tensor,
    scheme: Plan,
    progress: Callable[[int], object] | None,
) -> None:
    """Writes the direct kernel's distance of every chosen pair into ``matrix``.

    In groups as in :func:`_blocks`, but only of images that are part of a chosen pair.
    """
    weights = euclidean_weights(model)

    def direct(taps0: list[Tensor], taps1: list[Tensor]) -> Tensor:
        taps1 = [tap.expand(len(taps0[0]), -1, -1, -1) for tap in taps1]
        layers = functional.distance(taps0, taps1, weights).unbind(dim=1)
        return functools.reduce(torch.add, layers)  # in the order of LPIPS.forward: the same bits

    involved = chosen.any(dim=1)
    if streamed is None:
        involved = involved | chosen.any(dim=0)
    for group in _split(involved.nonzero().flatten().tolist(), scheme.held):
        mask = chosen[group]
        if not bool(mask.any()):
            continue
        taps = _Taps(held, group, scheme.batch, progress)
        columns = mask.any(dim=0).nonzero().flatten().tolist()
        inside = {column: k for k, column in enumerate(group)} if streamed is None else {}
        turns = [[c for c in columns if c in inside]]
        turns += _split([c for c in columns if c not in inside], scheme.batch)
        for turn, part in enumerate(turns):
            if not part:
                continue
            other = taps if turn == 0 else _Taps(streamed or held, part, scheme.batch, progress)
            for k, column in enumerate(part):
                position = inside[column] if turn == 0 else k
                partners = mask[:, column].nonzero().flatten()
                for some in partners.split(scheme.batch):
                    values = direct(taps[some], other[position : position + 1])
                    lines = [group[s] for s in some.tolist()]
                    matrix[lines, column] = values
                    if streamed is None:
                        matrix[column, lines] = values


# ------------------------------------------------------------------------------ nearest neighbours


def nearest(
    model: LPIPS,
    X: Images,
    gallery: Images,
    k: int,
    *,
    normalize: bool = False,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    max_batch: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest images of a gallery for each image, with the direct kernel's distances.

    Candidates are chosen by :func:`pairwise`: k, and whatever lies within the error of its matrix
    of the k-th. The direct kernel then gives their distances, and their order.

    Args:
        X: images to find neighbours of, as for :func:`pairwise`.
        gallery: images to find them in. An image of X that is in it finds itself, at 0.
        k: the number of neighbours, at most the gallery's size.
        model, normalize, memory_limit, max_batch, progress: as for :func:`pairwise`. Where the
            matrix does not fit, images of X are taken in turns.

    Returns:
        Distances (N, k), ascending, and the neighbours' positions in the gallery (N, k), int64. Of
        equal distances the first in the gallery comes first.

    Raises:
        ValueError, TypeError: as :func:`pairwise`, and for a k that is not 1 to the gallery's size.

    >>> import lpips_fast
    >>> model = lpips_fast.LPIPS(pnet_rand=True, verbose=False)
    >>> images = torch.rand(6, 3, 64, 64)
    >>> distances, indices = nearest(model, images[2:4], images, k=2, normalize=True)
    >>> indices[:, 0].tolist(), distances[:, 0].tolist()
    ([2, 3], [0.0, 0.0])
    """
    queries = ImageSource("X", X, model, normalize)
    others = ImageSource("gallery", gallery, model, normalize)
    check_alike(queries, others)
    if not 1 <= k <= len(others):
        raise ValueError(
            f"k is {k}, expected 1 to {len(others)}, the number of images in the gallery"
        )
    # A part of the memory is for what is done with the matrix: masks and a sort.
    each = len(others) * (2 + queries.dtype.itemsize + torch.int64.itemsize)
    at_a_time = max(1, memory_limit // MATRIX_SHARE // each)
    limit = memory_limit - memory_limit // MATRIX_SHARE
    found = []
    with torch.no_grad():
        for first in range(0, len(queries), at_a_time):
            turn = queries.part(range(first, min(first + at_a_time, len(queries))))
            found.append(_nearest(model, turn, others, k, limit, max_batch, progress))
    return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])


def _nearest(
    model: LPIPS,
    queries: ImageSource,
    gallery: ImageSource,
    k: int,
    memory_limit: int,
    max_batch: int | None,
    progress: Callable[[int], object] | None,
) -> tuple[Tensor, Tensor]:
    matrix, is_direct = _matrix(model, queries, gallery, memory_limit, max_batch, progress)
    bound = matrix.kthvalue(k, dim=1, keepdim=True).values * (1 + 2 * RELATIVE_ERROR)
    is_far = matrix > bound
    chosen = (matrix <= bound) & ~is_direct
    scheme = make_plan(
        model,
        len(queries),
        len(gallery),
        queries.size,
        queries.dtype,
        memory_limit,
        max_batch,
        (queries.is_encoded, gallery.is_encoded),
    )
    if scheme.holds_others:
        _refine(model, gallery, queries, chosen.T, matrix.T, scheme, progress)
    else:
        _refine(model, queries, gallery, chosen, matrix, scheme, progress)
    matrix.masked_fill_(is_far, math.inf)
    distances, indices = matrix.sort(dim=1, stable=True)
    return distances[:, :k].clone(), indices[:, :k].clone()


# -------------------------------------------------------------------------------------- diversity


def mean_diversity(matrix: Tensor) -> tuple[float, float]:
    """The mean distance between different images, and its standard error.

    The mean over i < j is what papers on generative models report as LPIPS diversity. Its pairs
    share images and are not independent: N images tell no more than N images. So the standard error
    is the jackknife's over images (Arvesen, "Jackknifing U-statistics", 1969), which is several
    times larger, and right, where the deviation over the root of N (N - 1) / 2 is too small.

    Args:
        matrix: (N, N), as :func:`pairwise` returns it for one set of images; N at least 2.

    Returns:
        The mean and its standard error, which is NaN for two images.

    >>> mean_diversity(torch.tensor([[0.0, 0.2, 0.4], [0.2, 0.0, 0.6], [0.4, 0.6, 0.0]]))
    (0.4..., 0.23...)
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(
            f"expected the matrix (N, N) of at least two images with each other, "
            f"got {tuple(matrix.shape)}"
        )
    count = len(matrix)
    sums = matrix.detach().cpu().sum(dim=1, dtype=torch.float64)
    total = sums.sum() / 2
    mean = total / (count * (count - 1) / 2)
    if count < 3:
        return mean.item(), math.nan
    without_one = (total - sums) / ((count - 1) * (count - 2) / 2)
    variance = (count - 1) / count * (without_one - without_one.mean()).square().sum()
    return mean.item(), variance.sqrt().item()
