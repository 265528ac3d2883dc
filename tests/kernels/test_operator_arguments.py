"""The operators called by hand: whatever they are given, they refuse it or compute it.

Each example is a call that is right, and then damaged: another dtype, order, size, rank or device,
memory that was freed, numbers at the ends of what an integer holds. It either raises, or returns
what the formula in plain torch gives in float64. Outputs are poisoned, so that memory nobody wrote
to shows; and the process may take little memory, so that no size is too large to be tried.

``LPIPS_FAST_FUZZ=10000`` in the environment tries as many examples an operator, fresh ones.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_calls import CALLS, FLOATS, Draw, Source
from torch import Tensor

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
EXTREMES = [-(2**63), -(2**32), -1, 0, 1, 2, 3, 5, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1]


@pytest.fixture(autouse=True, scope="module")
def little_memory(has_address_sanitizer: bool) -> Iterator[None]:
    """At most 3 GiB more than now: an absurd size is refused by the allocator, not swapped."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if has_address_sanitizer:  # it maps terabytes of its own
        yield
        return
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 3 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Hypothesis:
    """Choices that hypothesis makes."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data

    def integer(self, least: int, most: int) -> int:
        return self.data.draw(st.integers(least, most))

    def one_of(self, choices: Any) -> Any:
        return self.data.draw(st.sampled_from(list(choices)))


# ------------------------------------------------------------------------------------- damages


def damaged_tensor(draw: Draw, t: Tensor) -> Any:
    def resized() -> Tensor:
        hollow = t.clone()
        hollow.untyped_storage().resize_(draw.one_of([0, hollow.untyped_storage().nbytes() // 2]))
        return hollow

    if t.layout == torch.strided and t.untyped_storage().nbytes() < t.numel() * t.element_size():
        return t  # hollow already: torch's own operators would crash
    dim = draw.integer(0, max(t.dim() - 1, 0))
    damages: list[Callable[[], Any]] = [
        lambda: t.to(draw.one_of([*FLOATS, torch.int64, torch.uint8, torch.bool, torch.complex64])),
        lambda: t.to("meta"),
        lambda: t.to_sparse(),
        lambda: t.unsqueeze(dim),
        lambda: t.transpose(0, dim),
        lambda: t.flatten(),
        lambda: torch._neg_view(-t),
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


def check(name: str, source: Source) -> None:
    draw = Draw(source)
    arguments, formula = CALLS[name](draw)
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
    if expected is None:
        return
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


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", CALLS)
def test_refused_or_computed(name):
    @FUZZ
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(name, Hypothesis(data))

    run()


def test_every_operator_of_the_cpu_is_tried():
    """Of ``csrc/ops.cpp``: two have no kernel on the CPU."""
    schemas = (Path(__file__).parents[2] / "csrc" / "ops.cpp").read_text()
    names = set(re.findall(r'"(\w+)\(', schemas))
    assert names == set(CALLS) | {"bias_relu_", "scale_images_flagged"}
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
