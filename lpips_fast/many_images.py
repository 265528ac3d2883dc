"""Methods of a model for many images: doors to :mod:`lpips_fast.pairs`, which stands on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .pairs.sources import Images


class ManyImages:
    """What :class:`lpips_fast.LPIPS` offers beside the distance of pairs."""

    def pairwise(self: Any, X: Images, Y: Images | None = None, **options: Any) -> Tensor:
        """Distances (N, M) between all pairs, from one trunk pass an image instead of a pair.

        See :func:`lpips_fast.pairs.pairwise` for the arguments.
        """
        from .pairs.all_pairs import pairwise

        return pairwise(self, X, Y, **options)

    def nearest(
        self: Any, X: Images, gallery: Images, k: int, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Distances and positions (N, k) of the k nearest images of a gallery.

        See :func:`lpips_fast.pairs.nearest` for the arguments.
        """
        from .pairs.all_pairs import nearest

        return nearest(self, X, gallery, k, **options)

    def embed(self: Any, x: Images, **options: Any) -> Tensor:
        """Vectors (N, D) whose squared Euclidean distance is LPIPS, for a vector index.

        See :func:`lpips_fast.pairs.embed` for the arguments.
        """
        from .pairs.embedding import embed

        return embed(self, x, **options)
