"""The torchmetrics metric: torchmetrics' own numbers, in constant memory, over processes."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import declare_torchvision_operators
from many_images import some_images
from parity import NETS, trunk_weights
from torch import Tensor

from lpips_fast import LPIPS
from lpips_fast.trunk import feature_shapes

declare_torchvision_operators()  # torchmetrics imports torchvision where there is one
torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")

from lpips_fast.metrics import LPIPSMetric  # noqa: E402

REDUCTIONS = ("mean", "sum", "none", None)


def metric_of(net: str = "alex", *arguments: Any, **options: Any) -> LPIPSMetric:
    return LPIPSMetric(net, *arguments, weights=trunk_weights(net), **options)


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(some_images(size), some_images(size)) for size in sizes]


def distances_of(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    model = LPIPS(weights=trunk_weights("alex"), verbose=False)
    with torch.no_grad():
        return torch.cat([model(a, b).flatten() for a, b in pairs])


def reduced(distances: Tensor, reduction: str | None) -> Tensor:
    return getattr(distances, reduction)() if reduction in ("mean", "sum") else distances


def test_by_torchmetrics_own_name() -> None:
    """The import is all that changes in a program."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity as Theirs

    from lpips_fast.metrics import LearnedPerceptualImagePatchSimilarity as Ours

    assert Ours is LPIPSMetric
    theirs, ours = (inspect.signature(metric).parameters for metric in (Theirs, Ours))
    assert list(ours)[:3] == [name for name in theirs if name != "kwargs"]
    assert all(ours[name].default == theirs[name].default for name in list(ours)[:3])


# -------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_value(reduction: Any) -> None:
    metric, pairs = metric_of(reduction=reduction), batches(3, 1, 2)
    for pair in pairs:
        metric.update(*pair)
    expected = distances_of(pairs)
    value = metric.compute()
    assert value.dtype == torch.float32
    assert value.shape == (() if reduction in ("mean", "sum") else (6,))
    torch.testing.assert_close(value, reduced(expected, reduction))
    metric.reset()
    metric.update(*pairs[1])
    # Of a single number torchmetrics makes a scalar.
    torch.testing.assert_close(metric.compute(), expected[3])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_forward_returns_the_batch(reduction: Any) -> None:
    metric, pairs = metric_of(reduction=reduction), batches(2, 3)
    values = [metric(*pair) for pair in pairs]
    for value, pair in zip(values, pairs):
        torch.testing.assert_close(value, reduced(distances_of([pair]), reduction))
    torch.testing.assert_close(metric.compute(), reduced(distances_of(pairs), reduction))


def test_normalize() -> None:
    (pair,) = batches(3)
    metric = metric_of("alex", "mean", True)
    metric.update(*((image + 1) / 2 for image in pair))
    torch.testing.assert_close(metric.compute(), distances_of([pair]).mean())


def test_our_options() -> None:
    (pair,) = batches(2)
    for options in ({"version": "0.0"}, {"lpips": False}, {"max_batch": 1}):
        model = LPIPS(weights=trunk_weights("alex"), verbose=False, **options)
        metric = metric_of(**options)
        metric.update(*pair)
        torch.testing.assert_close(metric.compute(), model(*pair).mean().detach())
    metric = metric_of(dtype=torch.bfloat16)
    metric.update(*pair)
    torch.testing.assert_close(metric.compute(), distances_of([pair]).mean(), rtol=0.05, atol=0)
    metric = metric_of(check_inputs=True)
    with pytest.warns(UserWarning, match="expected"):
        metric.update(pair[0] * 3, pair[1])


def test_features() -> None:
    (pair,) = batches(2)
    metric = metric_of()
    with torch.no_grad():
        metric.update(metric.net.encode(pair[0]), pair[1])
    torch.testing.assert_close(metric.compute(), distances_of([pair]).mean())


# ------------------------------------------------------------------------------- torchmetrics'


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TORCH_HOME with seeded trunks under the official names of torchvision's files."""
    pytest.importorskip("torchvision", reason="torchmetrics' own LPIPS needs torchvision")
    folder = tmp_path_factory.mktemp("torch") / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    # What LPIPS has no use for is one number, shown as large as it should be.
    shapes = {
        "alex": {"1": (4096, 9216), "4": (4096, 4096), "6": (1000, 4096)},
        "vgg": {"0": (4096, 25088), "3": (4096, 4096), "6": (1000, 4096)},
        "squeeze": {"1": (1000, 512, 1, 1)},
    }
    names = {
        "alex": "alexnet-owt-7be5be79.pth",
        "vgg": "vgg16-397923af.pth",
        "squeeze": "squeezenet1_1-b8a52dc0.pth",
    }
    for net, classifier in shapes.items():
        weights = trunk_weights(net)
        assert weights.keys() == feature_shapes(net).keys()
        for layer, shape in classifier.items():
            weights[f"classifier.{layer}.weight"] = torch.zeros(1).expand(shape)
            weights[f"classifier.{layer}.bias"] = torch.zeros(1).expand(shape[0])
        torch.save(weights, folder / names[net])
    return folder.parents[1]


@pytest.mark.parametrize(("net", "normalize"), [*((net, False) for net in NETS), ("alex", True)])
def test_parity(
    net: str, normalize: bool, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same words, same weights, same numbers; eps inside the norm or outside is some 1e-6."""
    monkeypatch.setenv("TORCH_HOME", str(checkpoints))
    monkeypatch.delenv("LPIPS_FAST_WEIGHTS", raising=False)
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    pairs = batches(2, 3)
    if normalize:
        pairs = [((a + 1) / 2, (b + 1) / 2) for a, b in pairs]
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.load and torchvision
        theirs = LearnedPerceptualImagePatchSimilarity(net, "none", normalize)
    ours = metric_of(net, "none", normalize)
    for metric in (theirs, ours):
        for pair in pairs:
            metric.update(*pair)
        values.append(metric.compute().detach())
    torch.testing.assert_close(values[1], values[0], rtol=2e-5, atol=1e-7)
    for reduction in ("mean", "sum"):
        theirs.reduction = reduction
        theirs._computed = None
        ours = metric_of(net, reduction, normalize)
        for pair in pairs:
            ours.update(*pair)
        torch.testing.assert_close(ours.compute(), theirs.compute().detach(), rtol=2e-5, atol=0)


def test_the_same_words() -> None:
    import inspect

    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity as Theirs

    theirs, ours = (inspect.signature(c.__init__).parameters for c in (Theirs, LPIPSMetric))
    words = [name for name, p in theirs.items() if p.kind is not p.VAR_KEYWORD]
    assert list(ours)[: len(words)] == words
    for word in words[1:]:
        assert ours[word].default == theirs[word].default
    for attribute in ("is_differentiable", "higher_is_better", "full_state_update"):
        assert getattr(LPIPSMetric, attribute) == getattr(Theirs, attribute)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet",), "unknown trunk 'resnet'"),
        (("alex", "median"), "unknown reduction 'median'"),
        (("alex", "mean", 1), "normalize is 1, expected True or False"),
        (("alex", "mean", False, "0.1"), "positional"),
    ],
)
def test_words_that_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        LPIPSMetric(*arguments)


def test_options_of_torchmetrics_are_passed_on() -> None:
    assert metric_of(sync_on_compute=False).sync_on_compute is False
    with pytest.raises(ValueError, match="no_such_option"):
        metric_of(no_such_option=1)


# --------------------------------------------------------------------------------------- state


def state_numbers(metric: LPIPSMetric) -> int:
    states = [getattr(metric, name) for name in metric._defaults]
    return sum(t.numel() for s in states for t in (s if isinstance(s, list) else [s]))


def test_the_state_does_not_grow() -> None:
    (pair,) = batches(4)
    metric, growing = metric_of(), metric_of(reduction="none")
    for count in range(1, 4):
        metric.update(*pair)
        metric(*pair)
        growing.update(*pair)
        assert state_numbers(metric) == 2
        assert state_numbers(growing) == 4 * count


def test_sums_are_float64() -> None:
    metric, (pair,) = metric_of(), batches(1)
    metric.update(*pair)
    distance = metric.total.item()
    metric.total = metric.total * 2**28  # as after many images
    metric.count = metric.count * 2**28
    for _ in range(4):
        metric(*pair)
    assert metric.total.item() == pytest.approx(distance * (2**28 + 4), rel=1e-15)
    metric.set_dtype(torch.float32)  # for devices that have no float64
    assert metric.total.dtype == torch.float32
    torch.testing.assert_close(metric.compute(), torch.tensor(distance, dtype=torch.float32))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_flow_and_graphs_do_not_pile_up(reduction: Any) -> None:
    metric = metric_of(reduction=reduction)
    for pair in batches(2, 2):
        image = pair[0].requires_grad_()
        metric(image, pair[1]).sum().backward()
        assert image.grad is not None and image.grad.abs().sum() > 0
    for name in metric._defaults:
        state = getattr(metric, name)
        assert not any(t.requires_grad for t in (state if isinstance(state, list) else [state]))
    assert not any(p.requires_grad for p in metric.parameters())


def test_dropout_stays_off() -> None:
    metric, (pair,) = metric_of(), batches(2)
    holder = torch.nn.ModuleList([metric]).train()
    assert holder.training and not any(m.training for m in metric.net.modules())
    metric.update(*pair)
    torch.testing.assert_close(metric.compute(), distances_of([pair]).mean())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compute_before_update(reduction: Any) -> None:
    """As torchmetrics' own of the same reduction, warning included."""
    theirs = {"mean": torchmetrics.MeanSquaredError(), "sum": torchmetrics.SumMetric()}
    other = theirs.get(reduction) or torchmetrics.image.StructuralSimilarityIndexMeasure(
        reduction="none"
    )
    results = []
    for metric in (metric_of(reduction=reduction), other):
        with pytest.warns(UserWarning, match=f"{type(metric).__name__} was called before"):
            try:
                results.append(metric.compute())
            except ValueError as error:
                results.append(str(error))
    if isinstance(results[1], str):
        assert results[0] == results[1]
    else:
        torch.testing.assert_close(*results, equal_nan=True)
    metric = metric_of(reduction=reduction)
    (pair,) = batches(2)
    metric.update(*pair)
    metric.reset()
    metric.update(*pair)
    torch.testing.assert_close(metric.compute(), reduced(distances_of([pair]), reduction))


def test_copies() -> None:
    metric, pairs = metric_of(), batches(2, 2)
    metric.update(*pairs[0])
    for copied in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        copied.update(*pairs[1])
        torch.testing.assert_close(copied.compute(), distances_of(pairs).mean())
    torch.testing.assert_close(metric.compute(), distances_of(pairs[:1]).mean())


def test_in_a_collection() -> None:
    collection = torchmetrics.MetricCollection(
        {"lpips": metric_of(), "mse": torchmetrics.MeanSquaredError()}
    )
    pairs = batches(2, 3)
    for pair in pairs:
        collection.update(*pair)
    torch.testing.assert_close(collection.compute()["lpips"], distances_of(pairs).mean())


def test_a_running_mean() -> None:
    """Of the last two updates."""
    pairs = batches(2, 3, 1, 2)
    for reduction in ("mean", "sum"):
        running = torchmetrics.wrappers.Running(metric_of(reduction=reduction), window=2)
        for k, pair in enumerate(pairs):
            value = running(*pair) if k % 2 else running.update(*pair)
            if value is not None:
                torch.testing.assert_close(value, reduced(distances_of([pair]), reduction))
        expected = reduced(distances_of(pairs[-2:]), reduction)
        torch.testing.assert_close(running.compute(), expected)


def test_bootstrapped() -> None:
    """Resamples of the images, with their masks: of two kinds of pairs the mean is in between."""
    (pair,) = batches(6)
    mask = torch.zeros(6, 1, *pair[0].shape[2:])
    mask[:3, :, :20], mask[3:, :, -20:] = 1, 1
    each = masked_distances(pair, mask)
    torch.manual_seed(0)
    for options, expected in (({}, distances_of([pair])), ({"mask": mask}, each)):
        bootstrap = torchmetrics.wrappers.BootStrapper(
            metric_of(), num_bootstraps=8, sampling_strategy="multinomial", raw=True
        )
        bootstrap.update(*pair, **options)
        found = bootstrap.compute()
        assert expected.min() <= found["raw"].min() < found["raw"].max() <= expected.max()
        torch.testing.assert_close(found["mean"], found["raw"].mean())


def masked_distances(pair: tuple[Tensor, Tensor], mask: Tensor, **options: Any) -> Tensor:
    model = LPIPS(weights=trunk_weights("alex"), verbose=False)
    with torch.no_grad():
        return model(*pair, mask=mask, **options).flatten()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masks(reduction: Any) -> None:
    pairs = batches(2, 3)
    size = pairs[0][0].shape[2:]
    masks = [torch.rand(2, 1, *size) > 0.3, torch.rand(size)]
    for options in ({}, {"mask_mode": "fill", "fill_value": -0.5}):
        metric = metric_of(reduction=reduction, **options)
        metric.update(*pairs[0], masks[0])
        value = metric(*pairs[1], mask=masks[1])
        each = [masked_distances(p, m, **options) for p, m in zip(pairs, masks, strict=True)]
        torch.testing.assert_close(value, reduced(each[1], reduction))
        torch.testing.assert_close(metric.compute(), reduced(torch.cat(each), reduction))


def test_masks_that_are_refused() -> None:
    (pair,) = batches(1)
    with pytest.raises(ValueError, match="unknown mask_mode 'soft'"):
        metric_of(mask_mode="soft")
    metric = metric_of()
    with pytest.raises(ValueError, match="mask is empty"):
        metric.update(*pair, torch.zeros(pair[0].shape[2:]))


def test_masks_in_a_collection() -> None:
    """Others are not given what they do not take."""
    (pair,) = batches(2)
    mask = torch.rand(2, 1, *pair[0].shape[2:])
    collection = torchmetrics.MetricCollection(
        {"lpips": metric_of(), "mse": torchmetrics.MeanSquaredError()}
    )
    collection.update(preds=pair[0], target=pair[1], img1=pair[0], img2=pair[1], mask=mask)
    found = collection.compute()
    torch.testing.assert_close(found["lpips"], masked_distances(pair, mask).mean())
    torch.testing.assert_close(found["mse"], (pair[0] - pair[1]).square().mean())


def test_merged_state() -> None:
    pairs = batches(2, 3)
    one, other = metric_of(), metric_of()
    one.update(*pairs[0])
    other.update(*pairs[1])
    one.merge_state(other)
    torch.testing.assert_close(one.compute(), distances_of(pairs).mean())


# ----------------------------------------------------------------------------------- processes


def work(rank: int, store: str, pairs: list[list[tuple[Tensor, Tensor]]], out: str) -> None:
    """One of two processes: its own batches, and the value of all."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    results = {}
    for reduction in REDUCTIONS:
        metric = metric_of(reduction=reduction)
        for pair in pairs[rank]:
            metric.update(*pair)
        synced = metric.compute()
        metric.update(*pairs[rank][0])  # after compute, the state is this process's own again
        results[reduction] = (synced, metric.compute())
    torch.save(results, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built")
def test_two_processes(tmp_path: Path) -> None:
    """Batches of different sizes and numbers: the mean is that of images, not of processes."""
    pairs = [batches(1, 2), batches(4)]
    torch.multiprocessing.spawn(
        work, (str(tmp_path / "store"), pairs, str(tmp_path / "out")), nprocs=2
    )
    once = distances_of([*pairs[0], *pairs[1]])
    again = distances_of([*pairs[0], pairs[0][0], *pairs[1], pairs[1][0]])
    for rank in range(2):
        results = torch.load(tmp_path / f"out.{rank}")
        for reduction in REDUCTIONS:
            for value, expected in zip(results[reduction], (once, again)):
                torch.testing.assert_close(value, reduced(expected, reduction))


# ------------------------------------------------------------------------------------- the rest


def test_without_torchmetrics(run_python: Any) -> None:
    out = run_python(
        """
        import sys
        sys.modules["torchmetrics"] = None
        import lpips_fast
        try:
            import lpips_fast.metrics
        except ImportError as error:
            print(error)
        """
    )
    assert 'pip install "lpips-fast[metrics]"' in out


def test_plot() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    import matplotlib

    matplotlib.use("Agg")
    metric, (pair,) = metric_of(), batches(2)
    metric.update(*pair)
    figure, _ = metric.plot()
    assert figure is not None
