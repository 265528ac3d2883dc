"""Folders of images: which belong together, their distances, and the file of results.

:mod:`.pairing` finds the pairs, :mod:`.evaluating` measures them, :mod:`.results` writes the CSV
and takes it up again, :mod:`.ranks` shares the work among processes.
"""

from .evaluating import Evaluation, FolderGoneError, Row, default_workers
from .pairing import (
    IMAGE_SUFFIXES,
    FolderError,
    Match,
    Pair,
    Pairing,
    list_images,
    natural_key,
    pair_folders,
)
from .ranks import RankError, Ranks
from .results import DIGITS, ResultFile, ResultFileError, Statistics

__all__ = [
    "DIGITS",
    "IMAGE_SUFFIXES",
    "Evaluation",
    "FolderError",
    "FolderGoneError",
    "Match",
    "Pair",
    "Pairing",
    "RankError",
    "Ranks",
    "ResultFile",
    "ResultFileError",
    "Row",
    "Statistics",
    "default_workers",
    "list_images",
    "natural_key",
    "pair_folders",
]
