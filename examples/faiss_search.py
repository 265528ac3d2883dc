"""Nearest neighbours by LPIPS in a vector index: FAISS on the CPU.

    pip install faiss-cpu
    python examples/faiss_search.py

LPIPS is the squared Euclidean distance of the vectors that ``model.embed`` returns, and that is
what ``faiss.IndexFlatL2`` searches. The vectors are long: 31,872 numbers for AlexNet at 64x64
pixels, 640,128 at 256x256. So the gallery is of small images; and two layers of the five are
embedded besides, whose distances are lower bounds of LPIPS at a seventh of the length. The whole
takes about ten seconds on two cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import faiss
import torch

import lpips_fast
from lpips_fast.images.reading import read_image

HERE = Path(__file__).resolve().parent


def variations(count: int) -> torch.Tensor:
    """The example images, shifted, mixed and faded: a stand-in for a gallery, (count, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    photos = torch.cat([read_image(path) for path in sorted((HERE / "images").glob("ex_*.png"))])
    gallery = []
    for _ in range(count):
        shares = torch.rand(len(photos), 1, 1, 1, generator=generator) ** 2
        mixed = (photos * shares).sum(dim=0) / shares.sum()
        shift = torch.randint(mixed.shape[1], (2,), generator=generator).tolist()
        gallery.append(mixed.roll(shift, dims=(1, 2)) * torch.rand(1, generator=generator))
    return torch.stack(gallery)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="a file or folder with the trunk's weights")
    parser.add_argument("--gallery", type=int, default=300, help="the number of images in it")
    parser.add_argument("-k", type=int, default=3, help="neighbours")
    options = parser.parse_args(arguments)
    print(f"{options.gallery} images as vectors: some seconds for 300.", file=sys.stderr)

    model = lpips_fast.LPIPS(net="alex", weights=options.weights, verbose=False)
    gallery = variations(options.gallery)
    queries = (gallery[:4] + 0.05 * torch.randn_like(gallery[:4])).clamp(-1, 1)

    vectors = model.embed(gallery)
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors.numpy())
    distances, neighbours = index.search(model.embed(queries).numpy(), options.k)

    print(f"{len(gallery)} images as vectors of {vectors.shape[1]:,} numbers")
    for row in range(len(queries)):
        found = zip(neighbours[row], distances[row])
        print(f"  query {row}:", ", ".join(f"{i} at {d:.4f}" for i, d in found))

    # For many queries FAISS expands the square, which cancels; the direct kernel does not.
    exact, order = model.nearest(queries, gallery, options.k)
    agree = torch.equal(order, torch.from_numpy(neighbours))
    difference = (exact - torch.from_numpy(distances)).abs().max().item()
    print(f"model.nearest: {'the same' if agree else 'other'} neighbours, to {difference:.1e}")

    # Fewer layers: a short list by lower bounds, then LPIPS itself of what is on it.
    layers = [3, 4]
    vectors = model.embed(gallery, layers=layers)
    short = faiss.IndexFlatL2(vectors.shape[1])
    short.add(vectors.numpy())
    _, candidates = short.search(model.embed(queries, layers=layers).numpy(), 10 * options.k)
    recalled = sum(
        len(set(candidates[row]) & set(order[row].tolist())) for row in range(len(queries))
    )
    print(
        f"layers {layers}, vectors of {short.d:,}: "
        f"{recalled} of {order.numel()} neighbours are among {10 * options.k} candidates"
    )


if __name__ == "__main__":
    main()
