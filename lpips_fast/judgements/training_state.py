"""What a run needs to go on: all of a file is looked at before any of it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_state"]

_NUMBERS = ("learning_rate", "loss", "train_2afc", "seconds")


def check_state(
    state: Mapping[str, Any],
    *,
    learned: Mapping[str, Tensor],
    ranking_loss: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    total_epochs: int,
) -> None:
    """Whether a state fits the run that is to go on from it.

    Args:
        state: as it was read.
        learned, ranking_loss: the run's own tensors, by name.
        optimizer: the run's own.
        total_epochs: the last epoch there is.

    Raises:
        ValueError: it does not; the message says what is wrong in a few words.
    """
    epoch = state.get("epoch")
    if not isinstance(epoch, int) or not 0 <= epoch <= total_epochs:
        raise ValueError(f"its epoch is {_short(epoch)}, expected 0 to {total_epochs}")
    _check_history(state.get("history"), epoch)
    people = state.get("people_2afc")
    if people is not None and not _is_number(people):
        raise ValueError(f"people_2afc is {_short(people)}, expected a number or None")
    _check_tensors("learned", state.get("learned"), learned)
    _check_tensors("ranking_loss", state.get("ranking_loss"), ranking_loss)
    _check_optimizer(state.get("optimizer"), optimizer)


def _check_history(history: Any, epochs: int) -> None:
    if not isinstance(history, list) or len(history) != epochs:
        held = len(history) if isinstance(history, list) else "no"
        raise ValueError(f"it has {held} records of {epochs} epochs")
    for k, record in enumerate(history, start=1):
        names = {"epoch", "validation_2afc", *_NUMBERS}
        if not isinstance(record, dict) or record.keys() != names or record["epoch"] != k:
            raise ValueError(f"its record of epoch {k} is none")
        scores = record["validation_2afc"]
        if not isinstance(scores, dict) or not all(isinstance(name, str) for name in scores):
            raise ValueError(f"its record of epoch {k} has no scores by name")
        numbers = [record[name] for name in _NUMBERS] + list(scores.values())
        if not all(map(_is_number, numbers)):
            raise ValueError(f"its record of epoch {k} holds what is no finite number")


def _check_tensors(part: str, found: Any, expected: Mapping[str, Tensor]) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"{part} is {_short(found)}, expected tensors by name")
    for name in sorted(expected.keys() - found.keys()):
        raise ValueError(f"{part} lacks {name}")
    for name in sorted(map(str, found.keys() - expected.keys())):
        raise ValueError(f"{part} has {name}, which the model has not")
    for name, tensor in expected.items():
        _check_tensor(f"{part} {name}", found[name], tensor)


def _check_tensor(name: str, found: Any, expected: Tensor) -> None:
    if not isinstance(found, Tensor):
        raise ValueError(f"{name} is {_short(found)}, expected a tensor")
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ValueError(
            f"{name} is {found.dtype} {tuple(found.shape)}, expected {expected.dtype} "
            f"{tuple(expected.shape)}"
        )
    if not torch.isfinite(found).all():
        raise ValueError(f"{name} holds NaN or infinity")


def _check_optimizer(found: Any, optimizer: torch.optim.Optimizer) -> None:
    expected = optimizer.state_dict()["param_groups"]
    groups = found.get("param_groups") if isinstance(found, Mapping) else None
    moments = found.get("state") if isinstance(found, Mapping) else None
    if not isinstance(groups, list) or not isinstance(moments, Mapping):
        raise ValueError("its optimizer is none")
    # Of the rate each epoch has its own; all else is as the run's options say.
    if [_settings(group) for group in groups] != [_settings(group) for group in expected]:
        raise ValueError("its optimizer has other parameters or settings")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moment in moments.items():
        if not isinstance(index, int) or not 0 <= index < len(parameters):
            raise ValueError(f"its optimizer has moments of parameter {_short(index)}")
        if not isinstance(moment, dict) or moment.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"its optimizer's moments of parameter {index} are none")
        for name in ("exp_avg", "exp_avg_sq"):
            _check_tensor(f"{name} of parameter {index}", moment[name], parameters[index])
        _check_tensor(f"step of parameter {index}", moment["step"], torch.tensor(0.0))
        if (moment["exp_avg_sq"] < 0).any() or moment["step"] < 0:
            raise ValueError(f"its optimizer's moments of parameter {index} are negative")


def _settings(group: Any) -> dict[str, Any] | None:
    if not isinstance(group, dict) or any(isinstance(value, Tensor) for value in group.values()):
        return None
    return {name: value for name, value in group.items() if name != "lr"}


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def _short(value: Any) -> str:
    if isinstance(value, (int, float, str, type(None))) and len(repr(value)) < 40:
        return repr(value)
    return type(value).__name__
