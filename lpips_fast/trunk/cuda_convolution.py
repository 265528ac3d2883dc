"""Convolution, bias and ReLU on CUDA without extra passes over memory, for frozen weights.

torch's convolution adds the bias in a pass of its own, and the ReLU is one more. Here it is one of

- cuDNN's fused call, which adds the bias and clips while a result is in registers;
- the convolution alone, then ``bias_relu_``, our own kernel: one pass over the result.

Which of them is tried once for every layer and shape, on noise (:func:`_try_both`), and then kept:
the fused call where cuDNN has an engine for it, its result is that of the two passes, and it is not
slower. torch hands cuDNN the result's own, unwritten memory as a third operand, times 0; an engine
that reads it makes NaN of what may lie there, and a ReLU makes 0 of NaN. So the memory is filled
with NaN before the trial, and the results are compared.

The two passes alone where only deterministic algorithms are wanted (the fused call has no such
choice), where NaN must come through (cuDNN's ReLU promises nothing of it), while a CUDA graph is
captured that comes before any trial, and for the shapes of a layer beyond the first
:data:`MOST_SHAPES`.

TF32, benchmarking and autocast are as for torch's own convolution. ``LPIPS_FAST_CUDA_TRUNK=0`` in
the environment leaves all of it to torch.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .convolution import Convolution

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_SHAPES = 32  # of a layer, that are tried: images of ever other sizes cost no more trials
_CUDNN_ELEMENTS = 2**31  # beyond, whether cuDNN can count so far is torch's to judge
_ROUNDS = 5  # of timing
_MOST_ERRORS = 3  # an error that comes so often does not pass
# Of the largest element. Two ways of adding up differ by far less, unwritten memory by far more.
_AGREEMENT = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.1}


class Layer(NamedTuple):
    """What decides, beside the images' shape, how cuDNN convolves."""

    device: torch.device
    dtype: torch.dtype
    weight: torch.Size
    stride: int
    padding: int
    precision: str  # TF32 or not
    benchmark: bool


class Choice(NamedTuple):
    """Whether the fused call is taken for a layer and a shape, and why."""

    fused: bool
    reason: str


#: By layer and shape of the images, for as long as the process lives.
CHOICES: dict[tuple[Layer, torch.Size], Choice] = {}
_SHAPES: Counter[Layer] = Counter()
_ERRORS: Counter[tuple[Layer, torch.Size]] = Counter()


def describe_choices() -> list[str]:
    """A line for every layer and shape that was tried."""
    return [
        f"{'×'.join(map(str, layer.weight))}, stride {layer.stride}, of "
        f"{'×'.join(map(str, shape))} {str(layer.dtype).removeprefix('torch.')}: "
        f"{'fused' if choice.fused else 'two passes'} ({choice.reason})"
        for (layer, shape), choice in CHOICES.items()
    ]


def forget_choices() -> None:
    """Has the next call of every layer try again."""
    CHOICES.clear()
    _SHAPES.clear()
    _ERRORS.clear()


def convolve(conv: Convolution, x: Tensor, keep_nan: bool = False) -> Tensor:
    """``relu(conv(x))`` without a graph; images, weight and bias in one dtype of :data:`DTYPES`.

    Args:
        keep_nan: let NaN through, as torch's ReLU does.
    """
    if keep_nan or not _cudnn_may_fuse(conv, x):
        return _in_two_passes(conv, x)
    layer = _layer(conv, x)
    choice = CHOICES.get((layer, x.shape)) or _choose(conv, layer, x)
    if choice is None or not choice.fused:
        return _in_two_passes(conv, x)
    try:
        return _fused(conv, x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        y = _in_two_passes(conv, x)
    # It worked in the trial, so that the error may pass. Only now: one that stays has raised too.
    del CHOICES[layer, x.shape]
    _SHAPES[layer] -= 1
    return y


def input_gradient(
    conv: Convolution,
    grad: Tensor,
    x: Tensor,
    through_relu: bool = False,
    add: Tensor | None = None,
) -> Tensor:
    """As :func:`lpips_fast.trunk.convolution.input_gradient`, by torch's own operators."""
    stride, padding = [conv.stride] * 2, [conv.padding] * 2
    result, _, _ = torch.ops.aten.convolution_backward(
        grad, x, conv.weight, None, stride, padding, [1, 1], False, [0, 0], 1, [True, False, False]
    )
    if add is not None:
        result = result.add_(add)
    return torch.ops.aten.threshold_backward(result, x, 0) if through_relu else result


# ------------------------------------------------------------------------------ the two ways


def _fused(conv: Convolution, x: Tensor) -> Tensor:
    stride, padding = [conv.stride] * 2, [conv.padding] * 2
    return torch.ops.aten.cudnn_convolution_relu(
        x, conv.weight, conv.bias, stride, padding, [1, 1], 1
    )


def _in_two_passes(conv: Convolution, x: Tensor) -> Tensor:
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    if y.is_contiguous(memory_format=torch.channels_last):
        torch.ops.lpips_fast.bias_relu_(y, conv.bias)
        return y
    return y.add_(conv.bias.view(1, -1, 1, 1)).relu_()  # torch's own convolution, without cuDNN


def _cudnn_may_fuse(conv: Convolution, x: Tensor) -> bool:
    cudnn = torch.backends.cudnn
    if not cudnn.is_available() or not cudnn.enabled:
        return False
    if cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    # A result has no more positions than the image; padding adds a few.
    batch, channels, height, width = x.shape
    positions = batch * (height + 2 * conv.padding) * (width + 2 * conv.padding)
    return positions * max(channels, conv.out_channels) < _CUDNN_ELEMENTS


# ------------------------------------------------------------------------------- the trial


def _layer(conv: Convolution, x: Tensor) -> Layer:
    cudnn = torch.backends.cudnn
    precision = cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    shape = conv.weight.shape
    return Layer(
        x.device, x.dtype, shape, conv.stride, conv.padding, precision, bool(cudnn.benchmark)
    )


def _choose(conv: Convolution, layer: Layer, x: Tensor) -> Choice | None:
    """The choice for a layer and a shape, remembered; None where it cannot be made now."""
    if _is_capturing() or _SHAPES[layer] >= MOST_SHAPES:
        return None
    key = (layer, x.shape)
    try:
        choice = _try_both(conv, x)
    except torch.OutOfMemoryError:
        return None  # a trial takes twice the memory of a call
    except RuntimeError as error:
        # A lack of memory inside cuDNN, or a device that is busy, may pass.
        _ERRORS[key] += 1
        if _ERRORS[key] < _MOST_ERRORS:
            return None
        choice = Choice(False, f"failed {_MOST_ERRORS} times: {str(error).splitlines()[0]}")
    CHOICES[key] = choice
    _SHAPES[layer] += 1
    return choice


def _try_both(conv: Convolution, x: Tensor) -> Choice:
    """Compares and times the two ways on images of the same shape.

    On noise: the choice does not depend on what the first images hold.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    noise = torch.empty_like(x).normal_(generator=generator)
    expected = _in_two_passes(conv, noise)  # where the arguments are wrong, this says so
    _leave_nan_in_free_memory(expected)
    try:
        result = _fused(conv, noise)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if re.search("unable to find an engine|NOT_SUPPORTED", str(error)) is None:
            raise
        return Choice(False, "cuDNN has no engine")
    if not _agree(result, expected):
        return Choice(False, "cuDNN's result is wrong")
    del result, expected
    fused, two = _seconds_in_turn(
        [lambda: _fused(conv, noise), lambda: _in_two_passes(conv, noise)]
    )
    times = f"{fused * 1e6:.1f} µs, two passes {two * 1e6:.1f} µs"
    return Choice(fused <= two, f"fused {times}")


def _leave_nan_in_free_memory(like: Tensor) -> None:
    """In memory that the allocator hands out next for a tensor of the same size."""
    torch.empty_like(like).fill_(torch.nan)


def _agree(result: Tensor, expected: Tensor) -> bool:
    bound = _AGREEMENT[expected.dtype] * expected.abs().max().float()
    return bool((result.float() - expected.float()).abs().max() <= bound)  # false for NaN


def _seconds_in_turn(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
    """The median time of each call on the device, measured in turn."""
    spans: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
        for call, of_call in zip(calls, spans):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            of_call.append((start, end))
    torch.cuda.synchronize()
    return [
        statistics.median(start.elapsed_time(end) / 1e3 for start, end in of_call)
        for of_call in spans
    ]


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
