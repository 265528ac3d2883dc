"""The operators called by hand: whatever they are given, they refuse it or compute it.

Each example is a call that is right, and then damaged: another dtype, order, size, rank or device,
memory that was freed, numbers at the ends of what an integer holds. It either raises, or returns
what the formula in plain torch gives in float64. Outputs are poisoned, so that memory nobody wrote
to shows; and the process may take little memory, so that no size is too large to be tried.

``LPIPS_FAST_FUZZ=10000`` in the environment tries as many examples an operator, fresh ones.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lpips_fast import composed

OPS = torch.ops.lpips_fast
REFUSALS = (RuntimeError, ValueError, NotImplementedError, TypeError)
EXAMPLES = int(os.environ.get("LPIPS_FAST_FUZZ", "0"))
FUZZ = settings(
    max_examples=EXAMPLES or 80,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ORDERS = [torch.channels_last, torch.contiguous_format]
EXTREMES = [-(2**63), -(2**32), -1, 0, 1, 2, 3, 5, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1]

# A call: its arguments, and what they should give, by name of the part in question.
Call = tuple[list[Any], Callable[..., Any]]


@pytest.fixture(autouse=True, scope="module")
def little_memory() -> Iterator[None]:
    """At most 3 GiB more than now: an absurd size is refused by the allocator, not swapped."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if "libasan" in os.environ.get("LD_PRELOAD", ""):  # it maps terabytes of its own
        yield
        return
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 3 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Draw:
    """Draws sizes, tensors and damages of one example."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.generator = torch.Generator().manual_seed(self.integer(0, 2**31))

    def integer(self, least: int, most: int) -> int:
        return self.data.draw(st.integers(least, most))

    def one_of(self, choices: Any) -> Any:
        return self.data.draw(st.sampled_from(list(choices)))

    def images(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random images in any order: dense, a crop, some of the channels, every second row."""
        n, c, h, w = shape
        x = torch.randn(n, c + 2, 2 * h, w + 3, generator=self.generator).to(dtype)
        x = x.contiguous(memory_format=self.one_of(ORDERS))
        part = x[:, 1 : c + 1, ::2, 2 : w + 2]
        return part if self.integer(0, 1) else part.contiguous(memory_format=self.one_of(ORDERS))

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------------------------- damages


def damaged_tensor(draw: Draw, t: Tensor) -> Any:
    def resized() -> Tensor:
        hollow = t.clone()
        hollow.untyped_storage().resize_(draw.one_of([0, hollow.untyped_storage().nbytes() // 2]))
        return hollow

    dim = draw.integer(0, max(t.dim() - 1, 0))
    damages: list[Callable[[], Any]] = [
        lambda: t.to(draw.one_of([*FLOATS, torch.int64, torch.uint8, torch.bool, torch.complex64])),
        lambda: t.to("meta"),
        lambda: t.to_sparse(),
        lambda: t.unsqueeze(dim),
        lambda: t.transpose(0, dim),
        lambda: t.flatten(),
        lambda: torch._neg_view(t),
        lambda: t.narrow(dim, 0, t.shape[dim] - 1),
        lambda: t.narrow(dim, 0, 0),
        lambda: torch.cat([t, t], dim),
        lambda: t.repeat_interleave(2, dim).movedim(dim, 0)[::2].movedim(0, dim),
        lambda: t.select(dim, 0).unsqueeze(dim).expand(t.shape),
        lambda: t.new_empty([2**20 if d != dim else 0 for d in range(t.dim())]),
        lambda: t.new_empty([2**40 if d != dim else 0 for d in range(t.dim())]),
        lambda: t.clone().requires_grad_(t.is_floating_point()),
        resized,
        lambda: None,
        lambda: 3,
    ]
    try:
        return draw.one_of(damages)()
    except (RuntimeError, IndexError):  # torch has no such view of it
        return t


def damaged(draw: Draw, argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return damaged_tensor(draw, argument)
    if isinstance(argument, list) and argument:
        k = draw.integer(0, len(argument) - 1)
        whole = draw.one_of(["one", "without", "none", "twice"])
        if whole == "one":
            return [damaged(draw, t) if i == k else t for i, t in enumerate(argument)]
        return {"without": argument[:k], "none": [], "twice": argument + argument[:1]}[whole]
    if isinstance(argument, bool):
        return not argument
    if isinstance(argument, int):
        return draw.one_of(EXTREMES)
    if isinstance(argument, torch.dtype):
        return draw.one_of([torch.int32, torch.complex64, torch.float64])
    return draw.one_of([None, torch.ones(1, 1, 1, 1), 0.5]) if argument is None else argument


def check(name: str, call: Callable[[Draw], Call], data: st.DataObject) -> None:
    draw = Draw(data)
    arguments, formula = call(draw)
    damages = draw.integer(0, 2)
    for _ in range(damages):
        k = draw.integer(0, len(arguments) - 1)
        arguments[k] = damaged(draw, arguments[k])
    try:
        result = getattr(OPS, name)(*arguments)
    except REFUSALS as refusal:
        assert damages, refusal  # what is right is computed
        if type(refusal) is RuntimeError:  # of ours; a NotImplementedError is torch's long list
            assert "csrc/" not in str(refusal) and "/include/" not in str(refusal), refusal
        return
    if any(t.device.type == "meta" for t in flat(arguments)):
        assert all(t.device.type == "meta" for t in flat([*arguments, result]))
        return
    expected = formula(*arguments)
    for got, right in zip(flat([result]), flat([expected]), strict=True):
        assert got.shape == right.shape, (got.shape, right.shape)
        is_exact = all(t.dtype == torch.float64 for t in flat([*arguments, got]))
        assert_close(got, right, 1e-12 if is_exact else 2e-5)


def flat(values: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(values)
    return [t for t in leaves if isinstance(t, Tensor)]


def assert_close(got: Tensor, right: Tensor, epsilon: float) -> None:
    """To rounding, normwise: a small result beside large ones has the rounding of these."""
    if got.dtype in (torch.float16, torch.bfloat16):
        epsilon = 2e-2
    got, right = got.detach().double(), right.detach().double()
    assert torch.equal(got.isnan(), right.isnan())
    error, size = (got - right).nan_to_num().norm(), right.nan_to_num().norm()
    assert error <= epsilon * (size + right.numel() ** 0.5), (error, size)


# ----------------------------------------------------------------------------------- distances


def layers(draw: Draw, most: int = 3) -> list[list[Tensor]]:
    dtype, n = draw.one_of(FLOATS), draw.integer(0, 3)
    weight_dtype = composed.accumulator_dtype(dtype)
    groups: list[list[Tensor]] = [[], [], []]
    for _ in range(draw.integer(1, most)):
        shape = (n, draw.integer(2, 40), draw.integer(1, 6), draw.integer(1, 6))
        groups[0].append(draw.images(*shape, dtype=dtype))
        groups[1].append(draw.images(*shape, dtype=dtype))
        groups[2].append(draw.numbers(shape[1], dtype=weight_dtype))
    return groups


def in_float64(groups: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[t.detach().double() for t in group] for group in groups]


def distances(a: list, b: list, w: list, eps: float) -> Tensor:
    return composed.distance(*in_float64([a, b, w]), eps)


def maps(a: list, b: list, w: list, eps: float) -> list[Tensor]:
    return [composed.distance_map(*ts, eps) for ts in zip(*in_float64([a, b, w]))]


def gradients(grad: Any, a: list, b: list, w: list, eps: float, *needs: bool) -> list[Tensor]:
    inputs = in_float64([a, b, w])
    asked = [t.requires_grad_() for group, need in zip(inputs, needs) for t in group if need]
    if not asked:
        return []
    if isinstance(grad, Tensor):
        outputs, grads = [composed.distance(*inputs, eps)], [grad.double()]
    else:
        outputs = [composed.distance_map(*ts, eps) for ts in zip(*inputs)]
        grads = [g.double() for g in grad]
    return list(torch.autograd.grad(outputs, asked, grads))


def of_distance(draw: Draw) -> Call:
    return [*layers(draw), 1e-10], distances


def of_distance_map(draw: Draw) -> Call:
    return [*layers(draw), 1e-10], maps


def of_distance_backward(draw: Draw) -> Call:
    a, b, w = layers(draw)
    grad = draw.numbers(len(a[0]), len(a), dtype=w[0].dtype)
    needs = [draw.one_of([False, True]) for _ in range(3)]
    return [grad, a, b, w, 1e-10, *needs], gradients


def of_distance_map_backward(draw: Draw) -> Call:
    a, b, w = layers(draw)
    grads = [draw.numbers(len(f), 1, *f.shape[2:], dtype=w[0].dtype) for f in a]
    needs = [draw.one_of([False, True]) for _ in range(3)]
    return [grads, a, b, w, 1e-10, *needs], gradients


def of_tap_backward(draw: Draw) -> Call:
    [a], [b], [w] = layers(draw, most=1)
    a = a.contiguous(memory_format=torch.channels_last)
    grad = draw.numbers(*draw.one_of([(len(a), 1), (len(a), 1, *a.shape[2:])]), dtype=w.dtype)
    deeper = draw.images(*a.shape, dtype=a.dtype) if draw.integer(0, 1) else None

    def formula(grad, deeper, a, b, w, eps, need_weight):
        grad = grad if grad.dim() == 2 else [grad]
        first, *rest = gradients(grad, [a], [b], [w], eps, True, False, need_weight)
        return [(first + (0 if deeper is None else deeper.double())) * (a > 0), *rest]

    return [grad, deeper, a, b, w, 1e-10, draw.one_of([False, True])], formula


# ------------------------------------------------------------------------- images and pooling


def of_scale_images(draw: Draw) -> Call:
    size = (draw.integer(1, 9), draw.integer(1, 300))
    images = [
        draw.images(draw.integer(0, 2), 3, *size, dtype=draw.one_of(FLOATS))
        for _ in range(draw.integer(1, 3))
    ]
    shift, scale = draw.numbers(1, 3, 1, 1), draw.numbers(1, 3, 1, 1) + 0.5

    def formula(images, shift, scale, unit_range, dtype):
        shift, scale = (t.double().reshape(1, 3, 1, 1) for t in (shift, scale))
        all_images = torch.cat([x.double() for x in images])
        return ((2 * all_images - 1 if unit_range else all_images) - shift) / scale

    return [images, shift, scale, draw.one_of([False, True]), draw.one_of(FLOATS)], formula


def window(draw: Draw) -> tuple[int, int]:
    return draw.integer(1, 4), draw.integer(1, 4)


def pooled_images(draw: Draw, kernel: int) -> Tensor:
    size = (draw.integer(kernel, 9), draw.integer(kernel, 9))
    return draw.images(draw.integer(0, 2), draw.integer(1, 20), *size, dtype=draw.one_of(FLOATS))


def of_max_pool2d(draw: Draw) -> Call:
    kernel, stride = window(draw)

    def formula(x, kernel, stride, ceil_mode):
        return F.max_pool2d(x.double(), kernel, stride, ceil_mode=bool(ceil_mode))

    return [pooled_images(draw, kernel), kernel, stride, draw.one_of([False, True])], formula


def of_max_pool2d_backward(draw: Draw) -> Call:
    kernel, stride = window(draw)
    x = pooled_images(draw, kernel)
    y = F.max_pool2d(x, kernel, stride, ceil_mode=draw.one_of([False, True]))

    def formula(grad, x, y, kernel, stride):
        # The first of the window that has the pooled value, whatever that is, takes the gradient.
        result = torch.zeros(x.shape, dtype=torch.float64)
        for row in range(y.shape[2]):
            for column in range(y.shape[3]):
                left = grad[:, :, row, column].double()
                for h in range(row * stride, min(row * stride + kernel, x.shape[2])):
                    for w in range(column * stride, min(column * stride + kernel, x.shape[3])):
                        mask = (x[:, :, h, w] == y[:, :, row, column]) | x[:, :, h, w].isnan()
                        result[:, :, h, w] += torch.where(mask, left, 0)
                        left = torch.where(mask, 0, left)
        return result

    return [draw.images(*y.shape, dtype=y.dtype), x, y, kernel, stride], formula


def of_depth_to_space(draw: Draw) -> Call:
    stride = draw.integer(1, 4)
    channels, size = draw.integer(1, 5), (draw.integer(1, 5), draw.integer(1, 5))
    blocks = draw.images(2, stride**2 * channels, *size, dtype=draw.one_of(FLOATS))

    def formula(blocks, stride, padding, height, width):
        n, c, rows, columns = blocks.shape
        result = torch.zeros(n, c // stride**2, height, width, dtype=torch.float64)
        depth = blocks.double().reshape(n, stride, stride, -1, rows, columns)
        for y in range(min(height, rows * stride - padding)):
            for x in range(min(width, columns * stride - padding)):
                (row, h), (column, w) = divmod(y + padding, stride), divmod(x + padding, stride)
                result[:, :, y, x] = depth[:, h, w, :, row, column]
        return result

    return [blocks, stride, draw.integer(0, 5), draw.integer(0, 22), draw.integer(0, 22)], formula


# -------------------------------------------------------------------------------- convolutions


def with_channels(weight: Tensor, count: int) -> Tensor:
    """A packed weight's last vector has channels of zeros."""
    return F.pad(weight.double(), (0, 0) * 3 + (0, max(count - len(weight), 0)))[:count]


def of_direct_pack(draw: Draw) -> Call:
    kernel = draw.integer(1, 4)
    shape = (draw.integer(0, 40), draw.integer(0, 9), kernel, kernel)

    def formula(weight):
        packed = OPS.direct_pack(weight.detach().clone())
        # All the numbers, and zeros.
        expected = torch.cat([weight.flatten(), torch.zeros(packed.numel() - weight.numel())])
        torch.testing.assert_close(packed.flatten().sort().values, expected.sort().values)
        return packed

    return [draw.numbers(*shape)], formula


def of_winograd_pack(draw: Draw) -> Call:
    kernel = draw.one_of([3, 5])
    shape = (draw.integer(0, 40), draw.integer(0, 9), kernel, kernel)
    # What it packs shows in a convolution, below; here, that it reads any order alike.
    return [draw.numbers(*shape)], lambda weight: OPS.winograd_pack(weight.detach().clone())


def of_direct_conv2d(draw: Draw) -> Call:
    kernel, stride, padding = draw.integer(1, 4), draw.integer(1, 3), draw.integer(0, 2)
    channels, out_channels = draw.integer(1, 9), draw.integer(1, 40)
    size = (draw.integer(kernel, 9), draw.integer(kernel, 9))
    x = draw.images(draw.integer(0, 2), channels, *size)
    weight = draw.numbers(out_channels, channels, kernel, kernel) - 0.5
    bias = draw.numbers(out_channels) if draw.integer(0, 1) else None

    def formula(x, packed, bias, relu, out_channels, kernel, stride, padding):
        bias = None if bias is None else bias.double()
        y = F.conv2d(x.double(), with_channels(weight, out_channels), bias, stride, padding)
        return y.relu() if relu else y

    flags = [draw.one_of([False, True]), out_channels, kernel, stride, padding]
    return [x, OPS.direct_pack(weight), bias, *flags], formula


def in_blocks(weight: Tensor, stride: int) -> Tensor:
    """(O, s * s * I, t, t): of the convolution of stride 1 over blocks of s * s positions."""
    kernel = weight.shape[-1]
    taps = -(-kernel // stride)
    weight = F.pad(weight, (0, taps * stride - kernel) * 2)
    weight = weight.unflatten(3, (taps, stride)).unflatten(2, (taps, stride))
    return weight.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


def of_winograd_conv2d(draw: Draw) -> Call:
    kernel, stride = draw.one_of([(3, 1), (5, 1), (6, 2), (5, 2), (11, 4), (9, 2)])
    padding, channels, out_channels = draw.integer(0, 2), draw.integer(1, 6), draw.integer(1, 40)
    dtype = draw.one_of([torch.float32, torch.float16, torch.bfloat16])
    size = (draw.integer(kernel, kernel + 9), draw.integer(kernel, kernel + 9))
    x = draw.images(draw.integer(0, 2), channels, *size, dtype=dtype)
    weight = draw.numbers(out_channels, channels, kernel, kernel) - 0.5
    shape = F.conv2d(x.double(), weight.double(), None, stride, padding).shape
    bias = draw.numbers(out_channels) if draw.integer(0, 1) else None
    mask, add = (draw.images(*shape, dtype=dtype) if draw.integer(0, 1) else None for _ in range(2))

    def formula(x, packed, bias, relu, mask, out_channels, kernel, stride, padding, add):
        bias = None if bias is None else bias.double()
        y = F.conv2d(x.double(), with_channels(weight, out_channels), bias, stride, padding)
        y = y if add is None else y + add
        y = y.relu() if relu else y
        return y if mask is None else y * (mask > 0)

    packed = OPS.winograd_pack(in_blocks(weight, stride))
    relu = draw.one_of([False, True])
    return [x, packed, bias, relu, mask, out_channels, kernel, stride, padding, add], formula


def of_fire(draw: Draw) -> Call:
    channels, narrow, wide = draw.integer(1, 9), draw.integer(1, 20), draw.integer(1, 40)
    x = draw.images(draw.integer(0, 2), channels, draw.integer(1, 9), draw.integer(1, 9))
    winograd = draw.one_of([False, True])
    weights = [
        draw.numbers(out, inner, k, k) - 0.5
        for out, inner, k in ((narrow, channels, 1), (wide, narrow, 1), (wide, narrow, 3))
    ]
    biases = [draw.numbers(len(weight)) for weight in weights]

    def formula(x, squeeze, bias0, expand1x1, bias1, expand3x3, bias2, winograd):
        squeezed, first, second = (w.double() for w in weights)
        narrow = F.conv2d(x.double(), squeezed, bias0.double()).relu()
        both = [
            F.conv2d(narrow, first, bias1.double()),
            F.conv2d(narrow, second, bias2.double(), padding=1),
        ]
        return F.pad(narrow, (1, 1, 1, 1)), torch.cat(both, dim=1).relu()

    pack3x3 = OPS.winograd_pack if winograd else OPS.direct_pack
    packed = [OPS.direct_pack(weights[0]), OPS.direct_pack(weights[1]), pack3x3(weights[2])]
    pairs = [t for pair in zip(packed, biases) for t in pair]
    return [x, *pairs, winograd], formula


def of_fire_backward(draw: Draw) -> Call:
    channels, narrow, wide = draw.integer(1, 9), draw.integer(1, 20), draw.integer(1, 40)
    n, height, width = draw.integer(0, 2), draw.integer(1, 9), draw.integer(1, 9)
    winograd = draw.one_of([False, True])
    x = draw.images(n, channels, height, width)
    grad = draw.images(n, 2 * wide, height, width)
    squeezed = draw.images(n, narrow, height + 2, width + 2)
    # Of the convolutions that are the gradients: squeeze's, and of both that expand.
    squeeze = draw.numbers(channels, narrow, 1, 1) - 0.5
    first, second = (draw.numbers(narrow, wide, k, k) - 0.5 for k in (1, 3))

    def formula(grad, x, squeezed, _squeeze, _expand1x1, _expand3x3, through_relu, winograd):
        wide = first.shape[1]
        both = F.conv2d(grad[:, :wide].double(), first.double())
        both = both + F.conv2d(grad[:, wide:].double(), second.double(), padding=1)
        result = F.conv2d(both * (squeezed[:, :, 1:-1, 1:-1] > 0), squeeze.double())
        return result * (x > 0) if through_relu else result

    pack3x3 = OPS.winograd_pack if winograd else OPS.direct_pack
    packed = [OPS.direct_pack(squeeze), OPS.direct_pack(first), pack3x3(second)]
    return [grad, x, squeezed, *packed, draw.one_of([False, True]), winograd], formula


CALLS = {
    name.removeprefix("of_"): call
    for name, call in list(globals().items())
    if name.startswith("of_")
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", CALLS)
def test_refused_or_computed(name):
    @FUZZ
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(name, CALLS[name], data)

    run()


def test_every_operator_of_the_cpu_is_tried():
    """All that the CPU has: of the CUDA ones, ``bias_relu_`` has no kernel here."""
    schemas = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("lpips_fast::")}
    on_cpu = {n for n in schemas if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CPU")}
    assert {name.removeprefix("lpips_fast::") for name in on_cpu} == set(CALLS)
    with pytest.raises(NotImplementedError):
        OPS.bias_relu_(torch.ones(1, 1, 1, 1), torch.ones(1))


# ----------------------------------------------------- what once crashed, or read foreign memory


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def of_stride(stride: int) -> Callable[[], Any]:
    return lambda: OPS.winograd_conv2d(
        ones(1, 3, 9, 9), torch.empty(0), None, False, None, 4, 3, stride, 0
    )


def freed() -> Tensor:
    t = ones(1, 2, 3, 3)
    t.untyped_storage().resize_(0)
    return t


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: OPS.depth_to_space(ones(1, 1, 1, 1), 2**63 - 1, 0, 1, 2000), "takes blocks"),
        (lambda: OPS.depth_to_space(ones(1, 1, 1, 1), 2**32, 0, 1, 2000), "takes blocks"),
        (of_stride(2**32), "stride must be at least 1 and at most"),
        (of_stride(2**31 - 1), "3 or 5 times the stride"),
        (
            lambda: OPS.distance(
                [ones(1, 2, 3, 3)], [ones(1, 2, 3, 3)], [ones(2).to("meta")], 1e-10
            ),
            "must be on one device",
        ),
        (
            lambda: OPS.distance([freed()], [ones(1, 2, 3, 3)], [ones(2)], 1e-10),
            "freed or resized",
        ),
        (
            lambda: OPS.max_pool2d_backward(
                ones(1, 1, 9, 9), ones(1, 1, 4, 4), ones(1, 1, 9, 9), 2, 2
            ),
            "do not belong together",
        ),
        (
            lambda: OPS.distance(
                [torch.empty(2**40, 0, 2**20, 2**20)],
                [torch.empty(2**40, 0, 2**20, 2**20)],
                [ones(0)],
                1e-10,
            ),
            "too large",
        ),
    ],
)
def test_refused_in_a_sentence(call, message):
    with pytest.raises(RuntimeError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value) and ".h:" not in str(refusal.value)
