"""What PSNR and SSIM cost beside LPIPS: pairs of image files, in turn with and without them.

``python benchmarks/bench_folders.py --pairs 1000 --turns 3``. Each turn reads and measures all
pairs on one thread; times are of the processor, so that other programs count less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lpips_fast import LPIPS
from lpips_fast.folders import PSNR, SSIM, Distance, Evaluation, Measure, pair_folders


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--net", default="alex")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    model = LPIPS(net=options.net, verbose=False)
    runs: dict[str, list[Measure]] = {
        "lpips": [Distance(model)],
        "lpips, psnr, ssim": [Distance(model), PSNR(), SSIM()],
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as folder:
        pairs = pair_folders(*_make_folders(Path(folder), options)).pairs
        for turn in range(options.turns + 1):
            for name, measures in runs.items():
                chosen = pairs[:16] if turn == 0 else pairs  # the first turn warms up
                begin = time.process_time()
                with Evaluation(measures, workers=1) as evaluation:
                    rows = sum(len(chunk) for chunk in evaluation.rows(chosen))
                assert rows == len(chosen)
                if turn:
                    times[name].append(time.process_time() - begin)
    alone = statistics.median(times["lpips"])
    ratios = [b / a for a, b in zip(*times.values())]
    for name, values in times.items():
        per_pair = 1e3 * statistics.median(values) / len(pairs)
        print(f"{name}: {statistics.median(values):.1f} s, {per_pair:.2f} ms a pair")
    print(
        f"{len(pairs)} pairs of {options.size}x{options.size}, {options.net}: "
        f"{statistics.median(times['lpips, psnr, ssim']) / alone:.3f} times LPIPS alone "
        f"({min(ratios):.3f} to {max(ratios):.3f} in {options.turns} turns), torch "
        f"{torch.__version__}"
    )


def _make_folders(parent: Path, options: argparse.Namespace) -> list[Path]:
    """Smooth images with some noise: their PNGs take as long to read as photographs'."""
    generator = np.random.default_rng(0)
    folders = [parent / "A", parent / "B"]
    for folder in folders:
        folder.mkdir()
    for k in range(options.pairs):
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        size = (options.size, options.size)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), float)
        for folder in folders:
            noisy = (smooth + generator.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{k}.png", compress_level=1)
    return folders


if __name__ == "__main__":
    main()
