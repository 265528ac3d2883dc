"""The floor: a trunk's convolutions alone, each by the fastest way found on this machine.

No call of LPIPS can be faster than its convolutions, unless it computes something else. So every
convolution of a trunk is run on the images' own activations, with its bias and without ReLU,
pooling or distance, and for a training step its input gradient too. For each one all the ways
below are tried first, and the fastest is kept; each is checked against the others.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timing import seconds_of
from torch import Tensor, nn

from lpips_fast.lpips import ScalingLayer
from lpips_fast.trunk import Trunk
from lpips_fast.trunk.fire import FireModule

# A convolution that takes longer than this is bound by arithmetic in every layout; no other way of
# running it is tried, since each try would take as long.
LONG = 0.3

Call = Callable[[], Tensor]


@dataclass
class Job:
    """One convolution: what goes in, and what comes back in a training step."""

    conv: nn.Conv2d
    input: Tensor
    output_gradient: Tensor | None

    @property
    def padding(self) -> int:
        return self.conv.padding[0]  # type: ignore[return-value]

    @property
    def flops(self) -> int:
        """Of the forward direction."""
        conv = self.conv
        return 2 * len(self.input) * self._positions() * conv.weight.numel()

    @property
    def gradient_flops(self) -> int:
        if self.output_gradient is None:
            return 0
        return self.flops * len(self.output_gradient) // len(self.input)

    def _positions(self) -> int:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        rows, columns = (
            (size + 2 * self.padding - kernel) // stride + 1 for size in self.input.shape[2:]
        )
        return rows * columns


class ConvolutionFloor:
    """Calling it runs every convolution once, and lets every result go.

    Args:
        net: trunk.
        weights: with torchvision's names.
        images: (N, 3, H, W) in [-1, 1]: both images of every pair, or what else is encoded.
        gradients: for how many images the input gradients are computed as well; 0 for none.
        dtype: of weights and activations.

    Attributes:
        flops: floating point operations of one call, counted as a direct convolution does them.
        ways: how many convolutions run by which way.
    """

    def __init__(
        self,
        net: str,
        weights: dict[str, Tensor],
        images: Tensor,
        gradients: int,
        dtype: torch.dtype,
    ) -> None:
        self.device = images.device
        self.ways: Counter[str] = Counter()
        self.flops = 0
        self._calls: list[Call] = []
        trunk = Trunk(net, weights).to(images.device, dtype)
        with torch.no_grad(), self._settings():
            scaled = ScalingLayer().to(images.device)(images).to(dtype)
            for job in _jobs(trunk, scaled, gradients):
                self.flops += job.flops + job.gradient_flops
                self._calls.append(self._fastest(FORWARD_WAYS, job))
                if job.output_gradient is not None:
                    self._calls.append(self._fastest(GRADIENT_WAYS, job))

    def __call__(self) -> None:
        with torch.no_grad(), self._settings():
            for call in self._calls:
                call()

    def _settings(self) -> contextlib.AbstractContextManager[object]:
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        # cuDNN tries its own algorithms too; TF32 stays as it is for everyone.
        return torch.backends.cudnn.flags(
            benchmark=True, allow_tf32=torch.backends.cudnn.allow_tf32
        )

    def _fastest(self, ways: dict[str, Callable[[Job], Call | None]], job: Job) -> Call:
        best: tuple[float, str, Call] | None = None
        expected = None
        for name, prepare in ways.items():
            call = prepare(job)
            if call is None:
                continue
            results: list[Tensor] = []
            seconds = seconds_of(lambda: results.append(call()), self.device)  # noqa: B023
            if expected is None:
                expected = results[0]
            elif not _agree(results[0], expected):
                raise AssertionError(f"{name} computes something else for {job.conv}")
            if self.device.type == "cuda":  # where the first call is cuDNN's search
                seconds = min(seconds_of(call, self.device) for _ in range(5))
            else:
                repeats = 3 if seconds < 0.01 else 1 if seconds < 0.1 else 0
                seconds = min([seconds, *(seconds_of(call, self.device) for _ in range(repeats))])
            if best is None or seconds < best[0]:
                best = (seconds, name, call)
            if seconds > LONG:
                break
        assert best is not None
        self.ways[best[1]] += 1
        return best[2]


def _jobs(trunk: Trunk, scaled: Tensor, gradients: int) -> Iterator[Job]:
    """The convolutions of a trunk with their inputs, in order, as the images reach them."""
    x = scaled.contiguous(memory_format=torch.channels_last)

    def job(conv: nn.Conv2d, x: Tensor) -> tuple[Job, Tensor]:
        y = conv(x)
        gradient = None
        if gradients:
            gradient = torch.randn_like(y[:gradients]).contiguous(memory_format=torch.channels_last)
        return Job(conv, x, gradient), F.relu(y)

    for block in trunk.slices():
        for layer in block:  # type: ignore[attr-defined]
            if isinstance(layer, nn.Conv2d):
                this, x = job(layer, x)
                yield this
            elif isinstance(layer, FireModule):
                this, x = job(layer.squeeze, x)
                yield this
                this, x1 = job(layer.expand1x1, x)
                yield this
                this, x3 = job(layer.expand3x3, x)
                yield this
                x = torch.cat((x1, x3), dim=1)
            elif isinstance(layer, nn.MaxPool2d):
                x = F.max_pool2d(x, layer.kernel_size, layer.stride, ceil_mode=layer.ceil_mode)


def _agree(result: Tensor, expected: Tensor) -> bool:
    # Wide: half precision, TF32 and Winograd round differently, another formula errs by far more.
    error = (result.float() - expected.float()).norm() / expected.float().norm()
    return error.item() < 0.02


# ------------------------------------------------------------------------------- ways, forward


def _onednn_takes(x: Tensor) -> bool:
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return x.dtype == torch.float32 or (
        x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _onednn_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, stride: int
) -> Call:
    geometry = [padding, padding], [stride, stride], [1, 1], 1
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape))
    operator = torch.ops.mkldnn._convolution_pointwise
    return lambda: operator(x, packed, bias, *geometry, "none", [], "")


def _prepacked(job: Job) -> Call | None:
    if not _onednn_takes(job.input):
        return None
    conv = job.conv
    return _onednn_convolution(job.input, conv.weight, conv.bias, job.padding, conv.stride[0])


def _torch_forward(layout: torch.memory_format) -> Callable[[Job], Call]:
    def prepare(job: Job) -> Call:
        conv = job.conv
        x = job.input.contiguous(memory_format=layout)
        weight = conv.weight.contiguous(memory_format=layout)
        return lambda: F.conv2d(x, weight, conv.bias, conv.stride, conv.padding)

    return prepare


FORWARD_WAYS: dict[str, Callable[[Job], Call | None]] = {
    "oneDNN with prepacked weights, channels-last": _prepacked,
    "torch, channels-last": _torch_forward(torch.channels_last),
    "torch, contiguous": _torch_forward(torch.contiguous_format),
}


# ----------------------------------------------------------------------------- ways, gradients


def _torch_gradient(layout: torch.memory_format) -> Callable[[Job], Call]:
    def prepare(job: Job) -> Call:
        conv, gradient = job.conv, job.output_gradient
        assert gradient is not None
        x = job.input[: len(gradient)].contiguous(memory_format=layout)
        weight = conv.weight.contiguous(memory_format=layout)
        gradient = gradient.contiguous(memory_format=layout)
        geometry = conv.stride, conv.padding, conv.dilation, False, [0, 0], 1
        wanted = [True, False, False]
        operator = torch.ops.aten.convolution_backward
        return lambda: operator(gradient, x, weight, [conv.out_channels], *geometry, wanted)[0]

    return prepare


def _transposed(job: Job) -> Call | None:
    gradient = job.output_gradient
    assert gradient is not None
    if not _onednn_takes(gradient):
        return None
    conv, padding, stride = job.conv, job.padding, job.conv.stride[0]
    remainder = [
        size - ((out - 1) * stride - 2 * padding + conv.kernel_size[0])
        for size, out in zip(job.input.shape[2:], gradient.shape[2:])
    ]
    geometry = [padding, padding], remainder, [stride, stride], [1, 1], 1
    packed = torch.ops.mkldnn._reorder_convolution_transpose_weight(
        conv.weight, *geometry, list(gradient.shape)
    )
    operator = torch.ops.mkldnn._convolution_transpose_pointwise
    return lambda: operator(gradient, packed, None, *geometry, "none", [], "")


def _sub_pixel(job: Job) -> Call | None:
    """The input gradient as a forward convolution of stride 1.

    Input position q * s + r is touched by every s-th weight only, those of phase r. So the phases
    are s * s convolutions of ceil(k / s) weights, which run as one with s * s times the channels;
    rearranging channels as positions (Shi et al. 2016) gives the gradient. With stride 1 this is
    the flipped convolution of the textbooks.
    """
    gradient = job.output_gradient
    assert gradient is not None
    if not (_onednn_takes(gradient) or gradient.device.type == "cuda"):
        return None
    conv, stride, padding = job.conv, job.conv.stride[0], job.padding
    out_channels, in_channels, kernel, _ = conv.weight.shape
    taps = -(-kernel // stride)
    missing = taps * stride - kernel
    weight = F.pad(conv.weight, (0, missing, 0, missing))
    weight = weight.view(out_channels, in_channels, taps, stride, taps, stride).flip(2, 4)
    weight = weight.permute(1, 3, 5, 0, 2, 4)
    weight = weight.reshape(in_channels * stride**2, out_channels, taps, taps)
    weight = weight.contiguous(memory_format=torch.channels_last)
    if stride == 1:
        border = taps - 1 - padding
        if border < 0:
            return None
    else:
        border = taps - 1
    if gradient.device.type == "cuda":
        convolution: Call = lambda: F.conv2d(gradient, weight, padding=border)  # noqa: E731
    else:
        convolution = _onednn_convolution(gradient, weight, None, border, 1)
    if stride == 1:
        return convolution
    height, width = job.input.shape[2:]

    def call() -> Tensor:
        x = F.pixel_shuffle(convolution(), stride)
        # Rows that no window reaches have no gradient.
        beyond = [
            max(0, padding + size - have) for size, have in zip((width, height), x.shape[:1:-1])
        ]
        if any(beyond):
            x = F.pad(x, (0, beyond[0], 0, beyond[1]))
        return x[:, :, padding : padding + height, padding : padding + width]

    return call


GRADIENT_WAYS: dict[str, Callable[[Job], Call | None]] = {
    "torch, channels-last": _torch_gradient(torch.channels_last),
    "torch, contiguous": _torch_gradient(torch.contiguous_format),
    "oneDNN transposed with prepacked weights, channels-last": _transposed,
    "sub-pixel convolution, channels-last": _sub_pixel,
}
