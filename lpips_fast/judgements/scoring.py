"""How well a distance agrees with people: the 2AFC score and the JND average precision.

The formulas are those of ``score_2afc_dataset`` and ``score_jnd_dataset`` of lpips 0.1.4, which are
here too, under the same names. :func:`evaluate_2afc` and :func:`evaluate_jnd` do the same for an
LPIPS model, with one trunk pass an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..compat import voc_ap
from ..weights import WeightsError
from .datasets import load_batches

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..lpips import LPIPS

__all__ = [
    "JNDResult",
    "TwoAFCResult",
    "average_precision",
    "evaluate_2afc",
    "evaluate_jnd",
    "people_agreement",
    "score_2afc_dataset",
    "score_jnd_dataset",
    "triplet_distances",
    "two_afc_agreement",
]


def two_afc_agreement(d0: Any, d1: Any, judge: Any) -> Any:
    """Fraction of people who agree with a distance, for each triplet: (N,) in [0, 1].

    Args:
        d0, d1: distances of the two patches to the reference, tensors or arrays (N,).
        judge: fraction of people who chose the second patch.

    The distance chooses the nearer patch. Where both are equally near it is right half of the time.

    >>> two_afc_agreement(np.array([0.1, 0.3]), np.array([0.2, 0.3]), np.array([0.2, 0.9]))
    array([0.8, 0.5])
    """
    return (d0 < d1) * (1.0 - judge) + (d1 < d0) * judge + (d0 == d1) * 0.5


def people_agreement(judge: Any) -> Any:
    """What one more person would reach in a distance's place: p² + (1 - p)² for each triplet.

    Its mean is the paper's human score, to which a 2AFC score is to be held.
    """
    return judge**2 + (1.0 - judge) ** 2


def average_precision(distances: NDArray[Any], same: NDArray[Any]) -> float:
    """Area under the curve of precision against recall of "these two look the same", in [0, 1].

    Pairs are taken in the order of their distance: a good metric puts first those that people could
    not tell apart. Every pair counts as same by the fraction of people who said so.

    Args:
        distances: (N,).
        same: fraction of people who took the two patches for the same, (N,).

    Raises:
        ValueError: lengths differ, or nobody took any pair for the same, which leaves recall
            undefined.
    """
    distances, same = np.ravel(distances), np.ravel(same)
    if len(distances) != len(same):
        raise ValueError(f"got {len(distances)} distances for {len(same)} judgements")
    if not np.sum(same) > 0:
        raise ValueError("nobody took any pair for the same: average precision is undefined")
    sorted_same = same[np.argsort(distances, kind="stable")]
    true_positives = np.cumsum(sorted_same)
    precision = true_positives / np.arange(1, len(same) + 1)
    # The original divides by true positives plus false negatives, which is their sum throughout.
    recall = true_positives / np.sum(sorted_same)
    return float(voc_ap(recall, precision))


# ----------------------------------------------------------------------- of an LPIPS model


@dataclass(frozen=True)
class TwoAFCResult:
    """Agreement of a metric with people on 2AFC triplets.

    Attributes:
        score: mean of :func:`two_afc_agreement`, in [0, 1]; guessing reaches 0.5.
        people: mean of :func:`people_agreement`, what one more person would reach.
        d0, d1, judge: distances and judgements, (N,) each.
    """

    score: float
    people: float
    d0: NDArray[Any]
    d1: NDArray[Any]
    judge: NDArray[Any]


@dataclass(frozen=True)
class JNDResult:
    """Agreement of a metric with people on JND pairs.

    Attributes:
        score: :func:`average_precision`, in [0, 1].
        distances, same: distances and judgements, (N,) each.
    """

    score: float
    distances: NDArray[Any]
    same: NDArray[Any]


def require_one_distance(model: LPIPS) -> None:
    """Refuses a model that does not return one distance an image."""
    if model.spatial or model.reduction != "none":
        raise ValueError(
            f"the model has spatial={model.spatial} and reduction={model.reduction!r}; judgements "
            "are compared with one distance an image: make it with spatial=False, reduction='none'"
        )


def triplet_distances(model: LPIPS, ref: Tensor, p0: Tensor, p1: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (ref, p0) and (ref, p1), (N,) each, with one trunk pass for all three."""
    features = model.encode(torch.cat((ref, p0, p1)))
    first, second, third = (features[k * len(ref) : (k + 1) * len(ref)] for k in range(3))
    return model(first, second).flatten(), model(first, third).flatten()


def evaluate_2afc(
    model: LPIPS,
    dataset: Any,
    *,
    batch_size: int = 50,
    workers: int = 0,
    progress: str | None = None,
) -> TwoAFCResult:
    """2AFC score of a model, in evaluation mode.

    Args:
        model: LPIPS, or its baseline.
        dataset: :class:`~lpips_fast.judgements.TwoAFCDataset`, or any sequence of such items.
        batch_size: triplets a batch.
        workers: processes that read images.
        progress: label of a progress bar; ``None`` shows none.

    Raises:
        JudgementsError, ImageError: the data set cannot be read.
        WeightsError: a distance is NaN or infinite.

    >>> evaluate_2afc(model, TwoAFCDataset("dataset/2afc/val/cnn")).score   # doctest: +SKIP
    0.83
    """
    columns = _run(
        model,
        dataset,
        lambda batch: triplet_distances(model, batch["ref"], batch["p0"], batch["p1"]),
        "judge",
        batch_size,
        workers,
        progress,
    )
    d0, d1, judge = columns
    return TwoAFCResult(
        float(two_afc_agreement(d0, d1, judge).mean()),
        float(people_agreement(judge).mean()),
        d0,
        d1,
        judge,
    )


def evaluate_jnd(
    model: LPIPS,
    dataset: Any,
    *,
    batch_size: int = 50,
    workers: int = 0,
    progress: str | None = None,
) -> JNDResult:
    """JND average precision of a model, in evaluation mode.

    Arguments and errors are those of :func:`evaluate_2afc`, with
    :class:`~lpips_fast.judgements.JNDDataset`, and those of :func:`average_precision`.
    """
    distances, same = _run(
        model,
        dataset,
        lambda batch: (model(batch["p0"], batch["p1"]).flatten(),),
        "same",
        batch_size,
        workers,
        progress,
    )
    return JNDResult(average_precision(distances, same), distances, same)


def _run(
    model: LPIPS,
    dataset: Any,
    measure: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
    judgement: str,
    batch_size: int,
    workers: int,
    progress: str | None,
) -> list[NDArray[Any]]:
    """Distances and judgements of a whole data set, one float64 array (N,) each."""
    require_one_distance(model)
    was_training = model.training
    model.eval()
    rows: list[tuple[Tensor, ...]] = []
    device = model.scaling_layer.shift.device
    hidden = True if progress is None else None  # None: where standard error is no terminal
    try:
        with (
            torch.no_grad(),
            tqdm(total=len(dataset), desc=progress, disable=hidden, leave=False) as bar,
        ):
            for batch in load_batches(dataset, batch_size, workers=workers, device=device):
                rows.append((*measure(batch), batch[judgement]))
                bar.update(len(batch[judgement]))
    finally:
        model.train(was_training)
    columns = [torch.cat(column).double().cpu().numpy() for column in zip(*rows)]
    for distances in columns[:-1]:
        if not np.isfinite(distances).all():
            raise WeightsError(
                f"{(~np.isfinite(distances)).sum()} of {len(distances)} distances are NaN or "
                "infinite: the model's weights must be damaged"
            )
    return columns


# ------------------------------------------------------------- the original's, by its names


def score_2afc_dataset(
    data_loader: Any, func: Callable[[Tensor, Tensor], Tensor], name: str = ""
) -> tuple[float, dict[str, NDArray[Any]]]:
    """``lpips.score_2afc_dataset``: the 2AFC score of any distance function.

    Args:
        data_loader: batches with ``ref``, ``p0``, ``p1`` and ``judge``: an iterable, or an object
            whose ``load_data()`` returns one, as the original's loaders do.
        func: takes two batches (N, 3, H, W), returns N distances.
        name: label of the progress bar.

    Returns:
        The score, and a dictionary of arrays (N,): ``d0s``, ``d1s``, ``gts``, ``scores``.
    """
    rows = [
        (func(batch["ref"], batch["p0"]), func(batch["ref"], batch["p1"]), batch["judge"])
        for batch in tqdm(_batches_of(data_loader), desc=name)
    ]
    d0s, d1s, gts = (_flat_array(column) for column in zip(*rows))
    scores = two_afc_agreement(d0s, d1s, gts)
    return float(np.mean(scores)), {"d0s": d0s, "d1s": d1s, "gts": gts, "scores": scores}


def score_jnd_dataset(
    data_loader: Any, func: Callable[[Tensor, Tensor], Tensor], name: str = ""
) -> tuple[float, dict[str, NDArray[Any]]]:
    """``lpips.score_jnd_dataset``: the JND average precision of any distance function.

    Its arguments are those of :func:`score_2afc_dataset`, with batches of ``p0``, ``p1``, ``same``.
    The original does not flatten what ``func`` returns and so takes (N,) only: on LPIPS's own
    (N, 1, 1, 1) it returns a number that does not depend on the distances. Here both are right.

    Returns:
        The score, and a dictionary of arrays (N,): ``ds``, ``sames``.
    """
    rows = [
        (func(batch["p0"], batch["p1"]), batch["same"])
        for batch in tqdm(_batches_of(data_loader), desc=name)
    ]
    ds, sames = (_flat_array(column) for column in zip(*rows))
    return average_precision(ds, sames), {"ds": ds, "sames": sames}


def _batches_of(data_loader: Any) -> Any:
    return data_loader.load_data() if hasattr(data_loader, "load_data") else data_loader


def _flat_array(parts: tuple[Tensor, ...]) -> NDArray[Any]:
    return torch.cat([part.detach().flatten() for part in parts]).double().cpu().numpy()
