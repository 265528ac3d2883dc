"""The history of a training run as a picture.

Matplotlib is the extra ``plots`` (``pip install "lpips-fast[plots]"``). It is used through its
object interface: no window, no display, no ``pyplot`` state.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..weights.whole_files import appearing

if TYPE_CHECKING:
    from .training import EpochRecord

__all__ = ["draw_learning_curve", "require_matplotlib", "save_learning_curve"]

# Paul Tol's bright palette, which readers with any colour vision can tell apart.
_TRAINING, _VALIDATION, _PEOPLE = "#4477aa", "#ee6677", "#555555"
_SUBSETS = ("#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000")


def require_matplotlib() -> None:
    """Raises an ImportError that says what to install, before hours of work and not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'drawing a learning curve needs Matplotlib: pip install "lpips-fast[plots]"'
        ) from error


def save_learning_curve(
    history: Sequence[EpochRecord],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    decay_from: int | None = None,
    people: float | None = None,
) -> Path:
    """Draw loss and 2AFC scores by epoch.

    Args:
        history: of at least one epoch; :attr:`lpips_fast.training.Trainer.history`.
        path: of the picture, in a format that Matplotlib writes.
        title: over both panels.
        decay_from: the first epoch of falling learning rates, to be marked.
        people: what one more person would reach, in [0, 1], to be marked.

    Returns:
        The path.

    Raises:
        ValueError: the history is empty.
        ImportError: Matplotlib is not installed.
        OSError: the picture cannot be written; what had its name before is still there.
    """
    path = Path(path)
    with appearing(path) as file:
        draw_learning_curve(
            history,
            file,
            path.suffix.removeprefix(".") or "png",
            title=title,
            decay_from=decay_from,
            people=people,
        )
    return path


def draw_learning_curve(
    history: Sequence[EpochRecord],
    file: BinaryIO,
    format: str,
    *,
    title: str | None = None,
    decay_from: int | None = None,
    people: float | None = None,
) -> None:
    """:func:`save_learning_curve` into an open file, in a format that Matplotlib writes."""
    if not history:
        raise ValueError("the history is empty: there is nothing to draw")
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [record.epoch for record in history]
    marker = "o" if len(epochs) <= 30 else None
    figure = Figure(figsize=(10.0, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    loss_axes, score_axes = figure.subplots(1, 2)

    style = {"marker": marker, "markersize": 4}
    thin = {"marker": marker, "markersize": 2, "linewidth": 1}
    loss_axes.plot(epochs, [r.loss for r in history], color=_TRAINING, **style)
    loss_axes.set(title="Ranking loss, training", ylabel="binary cross-entropy")

    score_axes.plot(
        epochs,
        [100 * r.train_2afc for r in history],
        color=_TRAINING,
        label="training",
        **style,
    )
    means = [r.mean_validation_2afc for r in history]
    if all(mean is not None for mean in means):
        score_axes.plot(
            epochs,
            [100 * mean for mean in means if mean is not None],
            color=_VALIDATION,
            label="validation" + (", mean" if len(history[-1].validation_2afc) > 1 else ""),
            **style,
        )
    subsets = list(history[-1].validation_2afc)
    for name, colour in zip(subsets if len(subsets) > 1 else [], itertools.cycle(_SUBSETS)):
        scores = [100 * record.validation_2afc[name] for record in history]
        score_axes.plot(epochs, scores, color=colour, label=name, **thin)
    if people is not None:
        score_axes.axhline(
            100 * people,
            color=_PEOPLE,
            linestyle="--",
            label="one more person" + (", validation" if history[-1].validation_2afc else ""),
        )
    score_axes.set(title="2AFC score", ylabel="agreement with people in %")

    for axes in (loss_axes, score_axes):
        if decay_from is not None and decay_from <= epochs[-1]:
            axes.axvspan(
                decay_from - 0.5, epochs[-1] + 0.5, color="#eeeeee", zorder=0, label="rate falls"
            )
        axes.set_xlabel("epoch")
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.spines[["top", "right"]].set_visible(False)
    score_axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=150, format=format)
