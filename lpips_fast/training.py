"""The path of version 0.1 to :mod:`lpips_fast.judgements`: learning linear weights."""

from .judgements.training import (
    EpochRecord,
    Initialization,
    Mode,
    Trainer,
    TrainingError,
    TrainingOptions,
    new_model,
)

__all__ = [
    "EpochRecord",
    "Initialization",
    "Mode",
    "Trainer",
    "TrainingError",
    "TrainingOptions",
    "new_model",
]
