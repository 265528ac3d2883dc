"""Which trunk: measured here (:mod:`.trunk_costs`), weighed against published agreement with people
(:mod:`.recommendation`).
"""

from .peak_memory import added_at_peak
from .recommendation import (
    NEAR,
    PEOPLE_2AFC,
    PUBLISHED_2AFC,
    Candidate,
    Miss,
    Published2AFC,
    Recommendation,
    recommend_trunk,
)

__all__ = [
    "NEAR",
    "PEOPLE_2AFC",
    "PUBLISHED_2AFC",
    "Candidate",
    "Miss",
    "Published2AFC",
    "Recommendation",
    "added_at_peak",
    "recommend_trunk",
]
