"""Folders of images: which belong together, what is measured of them, and the file of results.

:mod:`.pairing` finds the pairs, :mod:`.evaluating` measures them with the :mod:`.measures`,
:mod:`.results` writes the CSV (:mod:`.csv_text`) and its :mod:`.record` and takes both up again,
:mod:`.summary` and :mod:`.tables` say what came out, :mod:`.ranks` shares the work among processes.
:mod:`.folder_images` are the images of one folder, for all pairs.
"""

from .evaluating import Evaluation, FolderGoneError, Row, default_workers
from .measures import PSNR, SSIM, Column, Distance, Measure
from .pairing import (
    IMAGE_SUFFIXES,
    FolderError,
    Match,
    Pair,
    Pairing,
    Patterns,
    list_images,
    natural_key,
    pair_folders,
    pair_several,
    read_pairs,
    with_masks,
)
from .ranks import RankError, Ranks
from .results import ResultFile, ResultFileError, ResultStream
from .summary import DIGITS, Statistics
from .tables import table

__all__ = [
    "DIGITS",
    "IMAGE_SUFFIXES",
    "PSNR",
    "SSIM",
    "Column",
    "Distance",
    "Evaluation",
    "FolderError",
    "FolderGoneError",
    "Match",
    "Measure",
    "Pair",
    "Pairing",
    "Patterns",
    "RankError",
    "Ranks",
    "ResultFile",
    "ResultFileError",
    "ResultStream",
    "Row",
    "Statistics",
    "default_workers",
    "list_images",
    "natural_key",
    "pair_folders",
    "pair_several",
    "read_pairs",
    "table",
    "with_masks",
]
