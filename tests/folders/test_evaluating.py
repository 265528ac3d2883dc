"""Many pairs of files: the model's numbers, in order, the same bits whatever the scheduling."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest
import torch
from image_folders import make_folders, random_pixels, write_png
from parity import trunk_weights

import lpips_fast
from lpips_fast.folders.evaluating import (
    Evaluation,
    FolderGoneError,
    Row,
    StoppedError,
    _in_order,
    _Room,
    default_workers,
)
from lpips_fast.folders.pairing import Pair, pair_folders
from lpips_fast.images.reading import read_image
from lpips_fast.images.resizing import Preprocessing

pytest.importorskip("PIL.Image", reason="image files are read with Pillow")


@pytest.fixture(scope="module")
def models() -> dict[str, lpips_fast.LPIPS]:
    return {
        net: lpips_fast.LPIPS(net=net, weights=trunk_weights(net), verbose=False)
        for net in ("alex", "squeeze")
    }


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """150 pairs of three sizes."""
    folder = tmp_path_factory.mktemp("evaluation")
    return pair_folders(*make_folders(folder, [f"{i}.png" for i in range(150)])).pairs


def all_rows(models: list, pairs: list[Pair], **options) -> list[Row]:
    with Evaluation(models, **options) as evaluation:
        return [row for rows in evaluation.rows(pairs) for row in rows]


# ------------------------------------------------------------------------------- values


def test_rows_are_the_models_distances_in_order(models: dict, pairs: list[Pair]) -> None:
    rows = all_rows([models["alex"], models["squeeze"]], pairs, workers=2)
    assert [row.name for row in rows] == [pair.name for pair in pairs]
    assert len({row.values for row in rows}) == len(rows)
    for row, pair in list(zip(rows, pairs, strict=True))[::15]:
        in0, in1 = read_image(pair.path0), read_image(pair.path1)
        with torch.no_grad():
            expected = [models[net](in0, in1).item() for net in ("alex", "squeeze")]
        assert row.values == pytest.approx(expected, rel=1e-5)
        assert row.error == ""


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_the_same_bits_on_any_number_of_threads(models: dict, pairs: list[Pair], net: str) -> None:
    one = all_rows([models[net]], pairs, workers=1)
    assert all_rows([models[net]], pairs, workers=3) == one
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun starts processes
    try:
        assert all_rows([models[net]], pairs, workers=2) == one
    finally:
        torch.set_num_threads(threads)


def test_the_same_bits_from_a_later_chunk_on(models: dict, pairs: list[Pair]) -> None:
    whole = all_rows([models["squeeze"]], pairs)
    with Evaluation([models["squeeze"]]) as evaluation:
        chunks = evaluation.chunks(len(pairs))[40:]
        later = [row for rows in evaluation.rows(pairs, chunks) for row in rows]
    assert later == whole[chunks[0].start :]


def test_images_are_preprocessed(models: dict, pairs: list[Pair]) -> None:
    preprocessing = Preprocessing(resize=(40, 40), crop=(36, 38))
    rows = all_rows([models["alex"]], pairs[:3], preprocessing=preprocessing)
    for row, pair in zip(rows, pairs[:3], strict=True):
        in0, in1 = (
            lpips_fast.images.image_to_tensor(
                preprocessing(lpips_fast.images.read_image_uint8(path))
            )
            for path in (pair.path0, pair.path1)
        )
        assert in0.shape == (1, 3, 38, 36)
        with torch.no_grad():
            assert row.values[0] == pytest.approx(models["alex"](in0, in1).item(), rel=1e-5)


# ------------------------------------------------------------------------------- chunks and batches


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000, 100_000])
@pytest.mark.parametrize("batch", [1, 16])
def test_chunks_cover_everything_once(models: dict, count: int, batch: int) -> None:
    chunks = Evaluation([models["alex"]], batch=batch).chunks(count)
    assert [i for chunk in chunks for i in chunk] == list(range(count))
    assert max(map(len, chunks)) <= 4 * batch
    assert len(chunks) >= min(count, 64)


class Recorder(torch.nn.Module):
    """A model that notes the shapes that it is called with, and measures nothing."""

    def __init__(self, minimum_size: int = 1) -> None:
        super().__init__()
        self.scaling_layer = lpips_fast.ScalingLayer()
        self.net = lpips_fast.trunk.Trunk("alex")
        self.spatial, self.reduction, self.normalization = False, "none", "l2"
        self.net_name = self.pnet_type = "alex"
        self.minimum_size = minimum_size
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, in0: torch.Tensor, in1: torch.Tensor) -> torch.Tensor:
        self.shapes.append((len(in0), *in0.shape[2:]))
        return (in0 - in1).abs().mean((1, 2, 3))


def test_one_size_is_batched_and_memory_bounded(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for i in range(20):
        size = (8, 8) if i % 4 else (600, 500)  # of the larger, one is more than a batch's pixels
        write_png(tmp_path / f"{i}.png", random_pixels(*size, generator))
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    pairs = [Pair(path.name, path, path) for path in paths]
    model = Recorder()
    rows = Evaluation([model], batch=4).measure(pairs)  # type: ignore[list-item]
    assert [row.name for row in rows] == [pair.name for pair in pairs]
    large, small = (1, 600, 500), (4, 8, 8)
    assert model.shapes == [*(large, large, small), *(large, small) * 2, large, (3, 8, 8)]


def test_images_of_many_sizes_do_not_pile_up(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for i in range(8):
        path = tmp_path / f"{i}.png"
        write_png(path, random_pixels(300 + i, 300, generator))
        pairs.append(Pair(path.name, path, path))
    waiting_at_a_call: list[int] = []
    model = Recorder()
    evaluation = Evaluation([model], batch=16)  # type: ignore[list-item]
    read, computed = evaluation._read, evaluation._compute
    decoded = 0

    def counted_read(*arguments):
        nonlocal decoded
        decoded += 1
        return read(*arguments)

    def counted_compute(group, *arguments):
        nonlocal decoded
        waiting_at_a_call.append(decoded)
        decoded -= len(group)
        return computed(group, *arguments)

    evaluation._read, evaluation._compute = counted_read, counted_compute  # type: ignore
    evaluation.measure(pairs)
    # 90,000 pixels each, and 4 * 256 * 256 may wait.
    assert max(waiting_at_a_call) == 3
    assert len(model.shapes) == 8


# ------------------------------------------------------------------------------- failures


def test_what_cannot_be_measured_is_a_row_and_no_more(models: dict, tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(8)]
    a, b = make_folders(tmp_path, names, sizes=[(32, 32)])
    pairs = pair_folders(a, b).pairs
    sound = all_rows([models["alex"], models["squeeze"]], pairs)
    content = (b / "1.png").read_bytes()
    (b / "1.png").write_bytes(content[: len(content) // 2])
    (a / "2.png").unlink()
    generator = torch.Generator().manual_seed(0)
    write_png(a / "4.png", random_pixels(32, 33, generator))
    for folder in (a, b):
        write_png(folder / "5.png", random_pixels(20, 24, generator))
    rows = all_rows([models["alex"], models["squeeze"]], pairs, folders=(a, b))
    for i in (0, 3, 6, 7):
        assert rows[i] == sound[i]
    for i in (1, 2, 4):
        assert rows[i].name == names[i] and rows[i].values == (None, None)
    assert "B/1.png': the file is damaged or cut short" in rows[1].error
    assert rows[2].error == f"cannot read '{a}/2.png': no such file"
    assert rows[4].error == "the images differ in size, 33x32 and 32x32 pixels; crop or resize them"
    assert rows[5].values[0] is None and rows[5].values[1] is not None
    assert rows[5].error == "24x20 pixels are too small for trunk 'alex', which needs 31x31"


def test_damaged_weights_are_told(models: dict, pairs: list[Pair]) -> None:
    broken = lpips_fast.LPIPS(weights=trunk_weights("alex"), verbose=False)
    with torch.no_grad():
        broken.net.slice1[0].bias.fill_(float("nan"))
    (row,) = all_rows([broken], pairs[:1])
    assert row.values == (None,)
    assert row.error == "the distance is nan: the trunk's weights must be damaged"


@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_a_folder_that_vanishes_ends_it(models: dict, tmp_path: Path, how: str) -> None:
    a, b = make_folders(tmp_path, [f"{i}.png" for i in range(70)], sizes=[(32, 32)])
    pairs = pair_folders(a, b).pairs
    rows = []
    with (
        Evaluation([models["alex"]], folders=(a, b), workers=1) as evaluation,
        pytest.raises(FolderGoneError, match=r"the folder .*B is gone, or empty now"),
    ):
        for chunk in evaluation.rows(pairs):
            rows += chunk
            if len(rows) == 3:
                b.rename(tmp_path / "elsewhere")  # at once, unlike a removal file by file
                if how == "emptied":
                    b.mkdir()
    assert 3 <= len(rows) < 70
    assert not any(row.error for row in rows)


# ------------------------------------------------------------------------------- threads


def test_leaving_early_stops_the_threads(models: dict, pairs: list[Pair]) -> None:
    with Evaluation([models["alex"]], workers=2) as evaluation:
        rows = evaluation.rows(pairs)
        next(rows)
        rows.close()
        assert not [t for t in threading.enumerate() if t.name.startswith("lpips-fast")]
        with pytest.raises(StoppedError):
            evaluation.measure(pairs[:1])


def test_torchs_threads_are_given_back(models: dict, pairs: list[Pair]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Evaluation([models["alex"]]) as evaluation:
            next(evaluation.rows(pairs[:1]))
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_in_order_is_in_order_and_a_bounded_number_ahead() -> None:
    taken: list[int] = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    def work(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i

    results = _in_order(work, items(), 3, threading.Event())
    for expected in range(100):
        assert next(results) == expected
        assert len(taken) <= expected + 4 * 3 + 2
    with pytest.raises(StopIteration):
        next(results)


def test_room_bounds_what_is_computed_at_once() -> None:
    room, now, most = _Room(10), 0, 0
    lock = threading.Lock()

    def take(pixels: int) -> None:
        nonlocal now, most
        with room.take(pixels):
            with lock:
                now += pixels
                most = max(most, now)
            time.sleep(0.005)
            with lock:
                now -= pixels

    threads = [threading.Thread(target=take, args=(4,)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 4 <= most <= 10
    with room.take(100):  # alone, anything may
        pass


def test_room_is_given_back_after_an_error() -> None:
    room = _Room(1)
    with contextlib.suppress(KeyError), room.take(1):
        raise KeyError
    with room.take(1):
        pass


def test_default_workers() -> None:
    assert default_workers() >= 1
    assert default_workers(10_000) == 1


# ------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("options", [{"batch": 0}, {"workers": 0}])
def test_numbers_below_one(models: dict, options: dict) -> None:
    with pytest.raises(ValueError, match="is 0, expected at least 1"):
        Evaluation([models["alex"]], **options)


@pytest.mark.parametrize("options", [{"spatial": True}, {"reduction": "mean"}])
def test_models_that_return_something_else(options: dict) -> None:
    model = lpips_fast.LPIPS(pnet_rand=True, verbose=False, **options)
    with pytest.raises(ValueError, match="needs one distance a pair"):
        Evaluation([model])
