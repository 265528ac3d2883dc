"""What is held and recomputed: as planned, counted and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from many_images import DataSet, model_of, pair_by_pair, smallest_limit, some_images
from parity import NETS

from lpips_fast import LPIPS
from lpips_fast.choice.peak_memory import ENVIRONMENT
from lpips_fast.pairs.all_pairs import RELATIVE_ERROR, plan
from lpips_fast.pairs.embedding import tap_sizes


@pytest.fixture(scope="module")
def model() -> LPIPS:
    return model_of()


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("size", [(48, 40), (65, 83)])
def test_sizes_are_the_taps(net: str, size: tuple[int, int]) -> None:
    model = model_of(net)
    taps = model.encode(some_images(1, size)).taps
    assert tap_sizes(net, size) == [tap.numel() for tap in taps]
    assert plan(model, 3, size).floats_per_image == sum(tap.numel() for tap in taps)


def test_two_thousand_images_in_8_gib() -> None:
    limit = 8 * 2**30
    alex = plan(model_of("alex"), 2000, (256, 256), memory_limit=limit)
    assert (alex.groups, alex.held, alex.trunk_passes) == (1, 2000, 2000)
    assert 2000 * alex.floats_per_image * 4 < alex.peak_bytes < 6 * 2**30
    vgg = plan(model_of("vgg"), 2000, (256, 256), memory_limit=limit)
    assert vgg.floats_per_image == 7_995_392
    assert 2 * 2000 < vgg.trunk_passes < 12_000  # pair by pair: 2 x 1,999,000
    assert vgg.held * vgg.floats_per_image * 4 < vgg.peak_bytes <= limit
    words = str(vgg)
    for part in (f"{vgg.groups} groups of up to {vgg.held}", "recomputed", "spilled to disk"):
        assert part in words
    assert f"trunk passes: {vgg.trunk_passes:,}" in words and "8.00 GiB allowed" in words


def test_sides_of_different_length(model: LPIPS) -> None:
    wide = plan(model, 10, (256, 256), 5000)
    tall = plan(model, 5000, (256, 256), 10)
    assert (wide.groups, wide.trunk_passes, wide.holds_others) == (1, 5010, False)
    assert (tall.groups, tall.trunk_passes, tall.holds_others) == (1, 5010, True)
    images = some_images(7)
    matrix = model.pairwise(images[:5], images[5:])
    torch.testing.assert_close(matrix, model.pairwise(images[5:], images[:5]).T)
    expected = pair_by_pair(model, images[:5], images[5:])
    torch.testing.assert_close(matrix, expected, rtol=RELATIVE_ERROR, atol=1e-10)


@pytest.mark.parametrize("held", [1, 2, 5])
def test_groups(model: LPIPS, held: int) -> None:
    images = some_images(11)
    images[8] = images[2] + 1e-3 * images[0]  # near, and far apart in the order
    images[7] = images[4]
    limit = smallest_limit(model, (48, 40), held)
    scheme = plan(model, 11, (48, 40), memory_limit=limit, max_batch=2)
    assert scheme.groups == -(-11 // scheme.held) > 1
    assert scheme.peak_bytes <= limit
    assert scheme.trunk_passes == sum(11 - k for k in range(0, 11, scheme.held))
    data = DataSet(images)
    passes: list[int] = []
    matrix = model.pairwise(data, memory_limit=limit, max_batch=2, progress=passes.append)
    assert torch.equal(matrix, matrix.T) and (matrix.diagonal() == 0).all()
    torch.testing.assert_close(matrix, model.pairwise(images), rtol=1e-5, atol=1e-8)
    assert scheme.trunk_passes < sum(passes) <= 2 * scheme.trunk_passes
    assert data.reads == 1 + sum(passes)
    across = model.pairwise(images[:8], images[3:], memory_limit=limit, max_batch=2)
    torch.testing.assert_close(across, matrix[:8, 3:], rtol=1e-5, atol=1e-8)


def test_progress_adds_up(model: LPIPS) -> None:
    images = some_images(9)
    passes: list[int] = []
    model.pairwise(images, max_batch=4, progress=passes.append)
    assert passes == [4, 4, 1]
    assert sum(passes) == plan(model, 9, (48, 40)).trunk_passes
    model.pairwise(model.encode(images).detach(), progress=passes.append)
    assert len(passes) == 3  # features cost no pass


def test_max_batch_of_the_model() -> None:
    assert plan(model_of(max_batch=3), 20, (48, 40)).batch == 3
    assert plan(model_of(max_batch=3), 20, (48, 40), max_batch=5).batch == 5
    with pytest.raises(ValueError, match="max_batch must be at least 1, got 0"):
        model_of().pairwise(some_images(2), max_batch=0)


@pytest.mark.parametrize("numbers", [(0, (64, 64)), (3, (64, 30)), (3, (64, 64), 0)])
def test_plans_of_nothing(model: LPIPS, numbers: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="expected at least one image of at least 31x31 pixels"):
        plan(model, *numbers)


def test_a_limit_that_is_too_small(model: LPIPS) -> None:
    with pytest.raises(ValueError, match=r"2 images of 48x40 with trunk 'alex' need at least"):
        model.pairwise(some_images(2), memory_limit=1000)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.usefixtures("usual_allocator")
@pytest.mark.parametrize(("net", "count", "mebibytes"), [("alex", 60, 30), ("vgg", 6, 65)])
def test_memory_of_a_run(run_python: Any, net: str, count: int, mebibytes: int) -> None:
    """A whole run in its own process, near pairs included, takes no more than was planned."""
    report = run_python(
        f"""
        import sys, threading, time
        sys.path.insert(0, {str(REPOSITORY / "tests")!r})
        import torch
        from parity import trunk_weights
        from lpips_fast import LPIPS
        from lpips_fast.pairwise import pairwise, plan

        class Images:
            def __len__(self): return {count}
            def __getitem__(self, k):
                k = 0 if k == {count} - 1 else k
                return torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(k)) * 2 - 1

        def resident():
            with open("/proc/self/status") as file:
                line = next(line for line in file if line.startswith("VmRSS"))
            return int(line.split()[1]) * 1024

        model = LPIPS(net={net!r}, weights=trunk_weights({net!r}), verbose=False)
        pairwise(model, torch.stack([Images()[0], Images()[1], Images()[0]]))  # loads libraries
        limit = {mebibytes} * 2**20
        before = peak = resident()
        done = threading.Event()
        def watch():
            global peak
            while not done.wait(0.001):
                peak = max(peak, resident())
        watcher = threading.Thread(target=watch)
        watcher.start()
        matrix = pairwise(model, Images(), memory_limit=limit)
        done.set()
        watcher.join()
        scheme = plan(model, {count}, (128, 128), memory_limit=limit)
        assert matrix[0, -1] == 0 and scheme.groups > 1, scheme
        print(peak - before, scheme.peak_bytes)
        """,
        **ENVIRONMENT,
    )
    taken, planned = map(int, report.split())
    print(f"taken {taken / 2**20:.0f} MiB, planned {planned / 2**20:.0f} MiB")
    assert planned <= mebibytes * 2**20
    assert planned / 3 < taken < planned + 8 * 2**20  # what libraries allocate
