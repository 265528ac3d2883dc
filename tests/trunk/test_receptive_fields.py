"""Positions that see the same picture, and the gradients of images that are full of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exact_ties import exact, flat_images, image_gradient
from parity import models, relative

import lpips_fast
from lpips_fast.kernels.receptive_fields import CONVOLUTION, FIRE, POOLING
from lpips_fast.trunk.receptive_fields import receptive_fields
from lpips_fast.trunk.slices import slice_layers

OPS = torch.ops.lpips_fast


def classes(labels: list) -> torch.Tensor:
    """Equal things get equal numbers."""
    numbers: dict = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels])


def seen(labels: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """What a convolution's positions see, as class numbers; -1 is outside."""
    padded = F.pad(labels, (padding,) * 4, value=-1)
    patches = padded.unfold(1, kernel, stride).unfold(2, kernel, stride)
    patches = patches.flatten(3)
    return classes([tuple(p.tolist()) for p in patches.reshape(-1, kernel**2)]).view(
        patches.shape[:3]
    )


def pooled(groups: list[torch.Tensor], kernel: int, stride: int, ceil_mode: bool) -> torch.Tensor:
    results = []
    for labels in groups:
        batch, height, width = labels.shape
        rows, columns = F.max_pool2d(
            labels[:, None].double(), kernel, stride, ceil_mode=ceil_mode
        ).shape[2:]
        sets = [
            frozenset(
                labels[n, r * stride : r * stride + kernel, c * stride : c * stride + kernel]
                .flatten()
                .tolist()
            )
            for n in range(batch)
            for r in range(rows)
            for c in range(columns)
        ]
        results.append(classes(sets).view(batch, rows, columns))
    return results[0] if len(results) == 1 else together(results)


def together(groups: list[torch.Tensor]) -> torch.Tensor:
    pairs = torch.stack(groups, -1)
    return classes([tuple(p.tolist()) for p in pairs.flatten(0, 2)]).view(groups[0].shape)


def assert_same_partition(keys: torch.Tensor, labels: torch.Tensor) -> None:
    """Equal keys where equal labels, and nowhere else."""
    pairs = set(zip(keys.flatten().tolist(), labels.flatten().tolist()))
    assert len(pairs) == keys.unique().numel() == labels.unique().numel()


def picture(*shape: int) -> torch.Tensor:
    """Of few colours, half of it flat, so that much is alike and much is not."""
    image = torch.randint(0, 2, shape).float()
    image[..., : shape[2] // 2, :] = image[..., :1, :1]
    return image.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("geometry", [(3, 1, 1), (5, 1, 2), (11, 4, 2), (3, 2, 0), (1, 1, 0)])
def test_keys_are_equal_where_pictures_are(geometry, dtype):
    x = picture(2, 3, 19, 17).to(dtype)
    keys = OPS.receptive_fields(x, [CONVOLUTION, *geometry, POOLING, 3, 2, 0])[0]
    pixels = x.permute(0, 2, 3, 1).double()
    colours = classes([tuple(p.tolist()) for p in pixels.flatten(0, 2)]).view(2, 19, 17)
    zero = colours[(pixels == 0).all(-1)]  # the border is of zeros, and so may pixels be
    outside = int(zero[0]) if zero.numel() else -1
    kernel, stride, padding = geometry
    padded = F.pad(colours, (padding,) * 4, value=outside)
    assert keys.shape[1] == 1
    assert_same_partition(keys[:, 0], seen(padded, kernel, stride, 0))


def test_poolings_and_fire_modules():
    x = picture(1, 3, 33, 29)
    geometry = [CONVOLUTION, 3, 2, 0, POOLING, 3, 2, 1, FIRE, 3, 1, 1, FIRE, 3, 1, 1]
    first, second, third = OPS.receptive_fields(
        x, [*geometry, POOLING, 3, 2, 1, CONVOLUTION, 3, 1, 1, POOLING, 2, 2, 0]
    )
    pixels = classes([tuple(p.tolist()) for p in x[0].permute(1, 2, 0).flatten(0, 1)])
    labels = seen(pixels.view(1, 33, 29), 3, 2, 0)
    assert_same_partition(first[:, 0], labels)
    labels = pooled([labels], 3, 2, True)
    labels = together([labels, seen(labels, 3, 1, 1)])
    groups = [labels, seen(labels, 3, 1, 1)]
    assert second.shape[1] == 2
    for k in range(2):
        assert_same_partition(second[:, k], groups[k])
    labels = seen(pooled(groups, 3, 2, True), 3, 1, 1)
    assert_same_partition(third[:, 0], labels)


def test_minus_zero_is_zero():
    x = torch.zeros(1, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    x[..., ::2] = -0.0
    (keys,) = OPS.receptive_fields(x, [POOLING, 2, 2, 0])
    assert keys.unique().numel() == 1


def test_threads_batches_and_memory_orders_give_the_same_keys():
    x = picture(3, 3, 40, 31)
    geometry = [CONVOLUTION, 5, 1, 2, POOLING, 2, 2, 0, CONVOLUTION, 3, 1, 1, POOLING, 2, 2, 0]
    expected = OPS.receptive_fields(x, geometry)
    assert all(map(torch.equal, OPS.receptive_fields(x.contiguous(), geometry), expected))
    for k in range(3):
        alone = OPS.receptive_fields(x[k : k + 1], geometry)
        assert all(torch.equal(a, e[k : k + 1]) for a, e in zip(alone, expected))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, OPS.receptive_fields(x, geometry), expected))
    finally:
        torch.set_num_threads(threads)


def test_operator():
    x = picture(2, 3, 21, 23)
    geometry = [CONVOLUTION, 3, 2, 0, POOLING, 3, 2, 1, FIRE, 3, 1, 1, POOLING, 3, 2, 1]
    torch.library.opcheck(
        OPS.receptive_fields.default, (x, geometry), test_utils=("test_schema", "test_faketensor")
    )
    assert OPS.receptive_fields(x, []) == []
    assert OPS.receptive_fields(x[:0], geometry)[1].shape == (0, 2, 5, 5)
    for wrong, message in (
        ([0, 3, 1], "four numbers a layer"),
        ([3, 3, 1, 0], "kinds of layers 0, 1 and 2, got 3"),
        ([0, 30, 1, 0], "21x23 are smaller than a layer's kernel of 30x30"),
        ([0, 0, 1, 0], "kernel must be at least 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.receptive_fields(x, wrong)


# --------------------------------------------------------------------------------- gradients

NAMES = {
    "alex": list(flat_images()),
    "squeeze": ["black", "framed, 5 pixels", "object on a colour", "squares of 8", "ramp down"],
    "vgg": ["one colour", "padded below and right", "tiles of 4x4"],
}


@pytest.mark.parametrize("net", NAMES)
def test_gradients_of_flat_images_are_those_of_exact_arithmetic(reference, net):
    model, original = models(reference, net, "0.1", torch.float32)
    model.requires_grad_(False), original.requires_grad_(False)
    truth_of = exact(original)
    images = flat_images(64 if net == "alex" else 48)
    target = torch.rand_like(images["black"]) * 2 - 1
    for name in NAMES[net]:
        truth = image_gradient(truth_of, images[name].double(), target.double())
        usual = relative(image_gradient(original, images[name], target).double(), truth)
        error = relative(image_gradient(model, images[name], target).double(), truth)
        assert error <= max(3 * usual, 1e-4), (name, error, usual)


WAYS = ["both images", "features", "checkpoint", "compiled"]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_gradient(exportable, monkeypatch, way):
    image = flat_images()["letterboxed"].repeat(2, 1, 1, 1)
    target = torch.rand_like(image) * 2 - 1
    expected = image_gradient(exportable, image, target)
    leaf, called = image.clone().requires_grad_(), exportable
    if way == "checkpoint":
        monkeypatch.setattr(exportable, "checkpoint", True)
    if way == "compiled":
        called = torch.compile(exportable, backend="aot_eager", fullgraph=True)
    if way == "both images":
        target.requires_grad_()
    if way == "features":
        called(exportable.encode(leaf), exportable.encode(target)).sum().backward()
    else:
        called(leaf, target).sum().backward()
    assert relative(leaf.grad, expected) < 2e-6


def test_a_flat_image_is_at_distance_zero_from_itself_with_a_graph(exportable):
    image = flat_images()["squares of 8"]
    value = exportable(image.clone().requires_grad_(), image)
    assert value.item() == 0


def test_nothing_is_known_behind_a_slice_that_is_called_as_a_module(exportable):
    x = torch.zeros(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    slices = exportable.net.fast_slices(x.device, x.dtype)
    if not isinstance(slices[0], lpips_fast.trunk.legality.FastSlice):
        pytest.skip("nothing runs by hand here")
    counts = [len(keys) for keys in receptive_fields(slices, x)]
    poolings = [
        sum(isinstance(layer, lpips_fast.trunk.table.MaxPool) for layer in slice_layers("alex", k))
        for k in range(1, 6)
    ]
    assert counts == poolings == [0, 1, 1, 0, 0]
    hooked = [slices[0], lpips_fast.trunk.legality.Fault("", "is hooked"), *slices[2:]]
    assert [len(keys) for keys in receptive_fields(hooked, x)] == [0] * 5
