"""What people judged: learning linear weights from it, and scoring a metric by it.

:mod:`.datasets` reads the two kinds of judgements, :mod:`.training` learns, :mod:`.scoring` scores;
:mod:`.cached_triplets` caches what learning needs of the trunk.
"""

from .cached_triplets import CachedTriplets, cache_triplets, channel_means, dropout_deviations
from .datasets import JNDDataset, JudgementsError, TwoAFCDataset, load_batches
from .learning_curve import save_learning_curve
from .scoring import (
    JNDResult,
    TwoAFCResult,
    average_precision,
    evaluate_2afc,
    evaluate_jnd,
    people_agreement,
    score_2afc_dataset,
    score_jnd_dataset,
    triplet_distances,
    two_afc_agreement,
)
from .training import (
    EpochRecord,
    Initialization,
    Mode,
    Trainer,
    TrainingError,
    TrainingOptions,
    new_model,
)

__all__ = [
    "CachedTriplets",
    "EpochRecord",
    "Initialization",
    "JNDDataset",
    "JNDResult",
    "JudgementsError",
    "Mode",
    "Trainer",
    "TrainingError",
    "TrainingOptions",
    "TwoAFCDataset",
    "TwoAFCResult",
    "average_precision",
    "cache_triplets",
    "channel_means",
    "dropout_deviations",
    "evaluate_2afc",
    "evaluate_jnd",
    "load_batches",
    "new_model",
    "people_agreement",
    "save_learning_curve",
    "score_2afc_dataset",
    "score_jnd_dataset",
    "triplet_distances",
    "two_afc_agreement",
]
