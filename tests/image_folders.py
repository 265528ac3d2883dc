"""Pairs of folders of small random images, and the command line run on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lpips_fast import cli

# Sizes that the trunks take; few, so that batches form, and mixed, so that they have to.
SIZES = ((32, 32), (40, 33), (64, 48))


def write_png(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    # Fast to write; what is tested is not compression.
    Image.fromarray(pixels).save(path, compress_level=1)


def random_pixels(height: int, width: int, generator: torch.Generator) -> np.ndarray:
    shape = (height, width, 3)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8).numpy()


def make_folders(
    parent: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]] = SIZES
) -> tuple[Path, Path]:
    """Folders ``A`` and ``B`` with images of the same names, of sizes drawn from ``sizes``."""
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    folders = parent / "A", parent / "B"
    for name in names:
        size = sizes[int(torch.randint(len(sizes), (), generator=generator))]
        for folder in folders:
            write_png(folder / name, random_pixels(*size, generator))
    return folders


def call(*arguments: object) -> int:
    """Run the command line in this process and return its exit code."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


def start(*arguments: object, program: Sequence[str] = ("-m", "lpips_fast")) -> subprocess.Popen:
    """Run the command line, or another program that calls it, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The tests of this process and the program see the same package.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def rows_of(path: Path) -> list[str]:
    """The rows of a CSV file of distances, without the header row."""
    return path.read_text(encoding="utf-8").splitlines()[1:]


def settings_of(path: Path) -> dict[str, str]:
    """How a CSV file of distances was made, as its record says."""
    record = path.with_name(f"{path.name}.jsonl")
    return json.loads(record.read_text().splitlines()[0])["lpips-fast"]
