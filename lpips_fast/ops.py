"""The compiled operators: loading, and what torch needs to know of them beyond their kernels.

Schemas are in ``csrc/ops.cpp``, kernels in ``csrc/cpu`` and ``csrc/cuda``. Here are the fake
kernels (shapes and strides for ``torch.compile`` and ``torch.export``) and the derivatives, whose
backward kernels are operators too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from . import composed

_FOLDER = Path(__file__).parent


def _library(name: str) -> Path | None:
    candidates = (_FOLDER / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


def _load() -> list[str]:
    """Loads the schemas, the CPU kernels torch itself would choose here, and the CUDA kernels."""
    if _library("_C") is None:
        raise ImportError(
            f"lpips_fast is not built: {_FOLDER} holds no _C extension. "
            'Install it with "pip install --no-build-isolation ." from the source folder, and '
            "run Python from another folder than that."
        )
    from . import _C  # noqa: F401  (its import registers the schemas)

    capability = {"AVX512": "avx512", "AVX2": "avx2"}.get(
        torch.backends.cpu.get_cpu_capability(), "default"
    )
    # Torch may know an instruction set that the compiler of the extension did not.
    names = [f"_cpu_{capability}", "_cpu_default"]
    cpu = next(path for path in map(_library, names) if path is not None)
    loaded = [cpu]
    cuda = _library("_cuda")
    if cuda is not None and torch.version.cuda is not None:
        loaded.append(cuda)
    for library in loaded:
        torch.ops.load_library(str(library))
    return [library.name.split(".")[0] for library in loaded]


LOADED_LIBRARIES = _load()


def has_kernel(device: torch.device) -> bool:
    """Whether features on ``device`` are served by a kernel, rather than by ``composed``."""
    return device.type == "cpu" or (device.type == "cuda" and "_cuda" in LOADED_LIBRARIES)


_CUDA_TRUNK = os.environ.get("LPIPS_FAST_CUDA_TRUNK", "1") != "0"


def has_trunk_kernels(device: torch.device) -> bool:
    """Whether images on ``device`` are scaled and pooled by kernels of ours.

    ``LPIPS_FAST_CUDA_TRUNK=0`` in the environment leaves the trunk on CUDA to torch's own
    operators, to compare with them; the distance keeps its kernels.
    """
    return has_kernel(device) and (device.type == "cpu" or _CUDA_TRUNK)


def has_wide_vectors() -> bool:
    """Whether the CPU kernels were compiled for AVX2 or AVX512, not for any CPU."""
    return LOADED_LIBRARIES[0] != "_cpu_default"


def is_eager() -> bool:
    """Whether a call is just run, not compiled, exported, traced or transformed.

    Those want torch's own operators around the distance: they fuse them, translate them, or know
    how to transform them.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or has_tangents()
    )


def has_tangents() -> bool:
    """Whether derivatives are carried forward: our operators know backward alone."""
    return torch.autograd.forward_ad._current_level >= 0


# ------------------------------------------------------------------------------- fake kernels


def _empty_distance(feats: Sequence[Tensor]) -> Tensor:
    dtype = composed.accumulator_dtype(feats[0].dtype)
    return feats[0].new_empty((feats[0].shape[0], len(feats)), dtype=dtype)


def _empty_gradient(feat: Tensor, order_of: Tensor) -> Tensor:
    # The layout rule of csrc/lpips_distance.h: gradients lie in the order that the layer ran in.
    channels_last = order_of.stride(1) == 1
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(feat.shape, dtype=feat.dtype, device=feat.device, memory_format=layout)


@torch.library.register_fake("lpips_fast::distance")
def _(
    feats0: Sequence[Tensor], feats1: Sequence[Tensor], weights: Sequence[Tensor], eps: float
) -> Tensor:
    return _empty_distance(feats0)


@torch.library.register_fake("lpips_fast::distance_map")
def _(
    feats0: Sequence[Tensor], feats1: Sequence[Tensor], weights: Sequence[Tensor], eps: float
) -> list[Tensor]:
    dtype = composed.accumulator_dtype(feats0[0].dtype)
    return [f.new_empty((f.shape[0], 1, f.shape[2], f.shape[3]), dtype=dtype) for f in feats0]


def _fake_backward(
    grad: Tensor | Sequence[Tensor],
    feats0: Sequence[Tensor],
    feats1: Sequence[Tensor],
    weights: Sequence[Tensor],
    eps: float,
    need_feats0: bool,
    need_feats1: bool,
    need_weights: bool,
) -> list[Tensor]:
    grads0 = [_empty_gradient(f, f) for f in feats0] if need_feats0 else []
    grads1 = [_empty_gradient(f, o) for f, o in zip(feats1, feats0)] if need_feats1 else []
    return grads0 + grads1 + ([torch.empty_like(w) for w in weights] if need_weights else [])


torch.library.register_fake("lpips_fast::distance_backward", _fake_backward)
torch.library.register_fake("lpips_fast::distance_map_backward", _fake_backward)


@torch.library.register_fake("lpips_fast::tap_backward")
def _(
    grad: Tensor,
    deeper: Tensor | None,
    feat0: Tensor,
    feat1: Tensor,
    weight: Tensor,
    eps: float,
    need_weight: bool,
) -> list[Tensor]:
    return _fake_backward(grad, [feat0], [feat1], [weight], eps, True, False, need_weight)


# ---------------------------------------------------------------------------------- autograd


def _save_inputs(ctx, inputs, output) -> None:
    feats0, feats1, weights, ctx.eps = inputs
    ctx.layers = len(feats0)
    ctx.save_for_backward(*feats0, *feats1, *weights)


def _split(tensors: Sequence[Tensor], layers: int) -> tuple[list[Tensor], ...]:
    return tuple(list(tensors[k * layers : (k + 1) * layers]) for k in range(3))


def _layerwise_backward(operator: Callable) -> Callable:
    """The backward of a forward operator, by the backward operator of the same formula."""

    def backward(ctx, grad):
        feats0, feats1, weights = _split(ctx.saved_tensors, ctx.layers)
        needs = [any(needed) for needed in ctx.needs_input_grad[:3]]
        if isinstance(grad, list):  # a map that took no part in the loss has no gradient
            grad = [
                g if g is not None else torch.zeros_like(f[:, :1], dtype=weights[0].dtype)
                for g, f in zip(grad, feats0)
            ]
        grads = iter(operator(grad, feats0, feats1, weights, ctx.eps, *needs))
        results = []
        for asked, needed in zip(ctx.needs_input_grad[:3], needs):
            computed = [next(grads) for _ in asked] if needed else [None] * ctx.layers
            results.append([g if a else None for g, a in zip(computed, asked)])
        return (*results, None)

    return backward


def _save_backward_inputs(ctx, inputs, output) -> None:
    grad, feats0, feats1, weights, ctx.eps, *ctx.needs = inputs
    ctx.layers = len(feats0)
    ctx.grad_is_list = isinstance(grad, list)
    ctx.save_for_backward(*feats0, *feats1, *weights, *(grad if ctx.grad_is_list else (grad,)))


def _double_backward(formula: Callable) -> Callable:
    """The derivative of a backward operator, by differentiating the composed formula twice."""

    def backward(ctx, grad_grads):
        saved = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        inputs, grad = saved[: 3 * ctx.layers], saved[3 * ctx.layers :]
        with torch.enable_grad():
            outputs = formula(*_split(inputs, ctx.layers), ctx.eps)
            first = torch.autograd.grad(
                outputs, inputs, grad if ctx.grad_is_list else grad[0], create_graph=True
            )
            groups = _split(first, ctx.layers)
            asked = [g for group, need in zip(groups, ctx.needs) if need for g in group]
            pairs = [(g, gg) for g, gg in zip(asked, grad_grads) if gg is not None]
            second = torch.autograd.grad(
                [g for g, _ in pairs], saved, [gg for _, gg in pairs], allow_unused=True
            )
        feats0, feats1, weights = _split(second[: 3 * ctx.layers], ctx.layers)
        grad_of_grad = list(second[3 * ctx.layers :])
        return (
            grad_of_grad if ctx.grad_is_list else grad_of_grad[0],
            feats0,
            feats1,
            weights,
            *[None] * 4,
        )

    return backward


def _composed_maps(feats0, feats1, weights, eps) -> list[Tensor]:
    return [composed.distance_map(a, b, w, eps) for a, b, w in zip(feats0, feats1, weights)]


for _name, _formula in (("distance", composed.distance), ("distance_map", _composed_maps)):
    torch.library.register_autograd(
        f"lpips_fast::{_name}",
        _layerwise_backward(getattr(torch.ops.lpips_fast, f"{_name}_backward")),
        setup_context=_save_inputs,
    )
    torch.library.register_autograd(
        f"lpips_fast::{_name}_backward",
        _double_backward(_formula),
        setup_context=_save_backward_inputs,
    )


# ------------------------------------------------------------------------------- max-pooling


@torch.library.register_fake("lpips_fast::max_pool2d")
def _(x: Tensor, kernel: int, stride: int, ceil_mode: bool) -> Tensor:
    y = torch.nn.functional.max_pool2d(x, kernel, stride, ceil_mode=ceil_mode)
    return torch.empty_like(y, memory_format=torch.channels_last)


@torch.library.register_fake("lpips_fast::max_pool2d_backward")
def _(grad: Tensor, x: Tensor, y: Tensor, kernel: int, stride: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _save_pool(ctx, inputs, output) -> None:
    x, ctx.kernel, ctx.stride, _ = inputs
    ctx.save_for_backward(x, output)


def _pool_backward(ctx, grad):
    x, y = ctx.saved_tensors
    operator = torch.ops.lpips_fast.max_pool2d_backward
    return operator(grad, x, y, ctx.kernel, ctx.stride), None, None, None


def _save_pool_backward(ctx, inputs, output) -> None:
    _, x, y, ctx.kernel, ctx.stride = inputs
    ctx.save_for_backward(x, y)


def _pool_double_backward(ctx, grad_grad):
    # Linear in grad: the values of grad_grad at the maxima, one for each window.
    x, y = ctx.saved_tensors
    rows, columns = ((size - ctx.kernel) // ctx.stride + 1 for size in x.shape[2:])
    ceil_mode = bool(rows != y.shape[2] or columns != y.shape[3])
    _, index = torch.nn.functional.max_pool2d(
        x, ctx.kernel, ctx.stride, ceil_mode=ceil_mode, return_indices=True
    )
    picked = grad_grad.flatten(2).gather(2, index.flatten(2)).view_as(index)
    return picked, None, None, None, None


torch.library.register_autograd("lpips_fast::max_pool2d", _pool_backward, setup_context=_save_pool)
torch.library.register_autograd(
    "lpips_fast::max_pool2d_backward", _pool_double_backward, setup_context=_save_pool_backward
)


# ------------------------------------------------------------------------------ convolution


def _empty_channels_last(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _convolved(x: Tensor, kernel: int, stride: int, padding: int) -> list[int]:
    return [(size + 2 * padding - kernel) // stride + 1 for size in x.shape[2:]]


@torch.library.register_fake("lpips_fast::depth_to_space")
def _(blocks: Tensor, stride: int, padding: int, height: int, width: int) -> Tensor:
    channels = blocks.shape[1] // stride**2
    return _empty_channels_last(blocks, blocks.shape[0], channels, height, width)


@torch.library.register_fake("lpips_fast::direct_conv2d")
def _(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    relu: bool,
    out_channels: int,
    kernel: int,
    stride: int,
    padding: int,
) -> Tensor:
    return _empty_channels_last(
        x, x.shape[0], out_channels, *_convolved(x, kernel, stride, padding)
    )


@torch.library.register_fake("lpips_fast::fire")
def _(
    x: Tensor,
    squeeze: Tensor,
    squeeze_bias: Tensor,
    expand1x1: Tensor,
    expand1x1_bias: Tensor,
    expand3x3: Tensor,
    expand3x3_bias: Tensor,
    winograd: bool,
) -> tuple[Tensor, Tensor]:
    batch, _, height, width = x.shape
    squeezed = _empty_channels_last(x, batch, len(squeeze_bias), height + 2, width + 2)
    return squeezed, _empty_channels_last(x, batch, 2 * len(expand1x1_bias), height, width)


@torch.library.register_fake("lpips_fast::fire_backward")
def _(
    grad: Tensor,
    x: Tensor,
    squeezed: Tensor,
    squeeze: Tensor,
    expand1x1: Tensor,
    expand3x3: Tensor,
    through_relu: bool,
    winograd: bool,
) -> Tensor:
    return _empty_channels_last(x, *x.shape)


@torch.library.register_fake("lpips_fast::bias_relu_")
def _(y: Tensor, bias: Tensor) -> None:
    pass


@torch.library.register_fake("lpips_fast::winograd_conv2d")
def _(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    relu: bool,
    mask: Tensor | None,
    out_channels: int,
    kernel: int,
    stride: int,
    padding: int,
    add: Tensor | None = None,
) -> Tensor:
    return _empty_channels_last(
        x, x.shape[0], out_channels, *_convolved(x, kernel, stride, padding)
    )


# ---------------------------------------------------------------------------- image scaling


@torch.library.register_fake("lpips_fast::scale_images")
def _(
    images: Sequence[Tensor], shift: Tensor, scale: Tensor, unit_range: bool, dtype: torch.dtype
) -> Tensor:
    shape = (sum(len(image) for image in images), *images[0].shape[1:])
    return torch.empty(
        shape, dtype=dtype, device=images[0].device, memory_format=torch.channels_last
    )


def _save_scaling(ctx, inputs, output) -> None:
    images, _, scale, ctx.unit_range, _ = inputs
    ctx.batches = [(len(image), image.dtype) for image in images]
    ctx.save_for_backward(scale)


def _scaling_backward(ctx, grad):
    (scale,) = ctx.saved_tensors
    if ctx.unit_range:
        scale = scale / 2
    grads, first = [], 0
    for (batch, dtype), needed in zip(ctx.batches, ctx.needs_input_grad[0]):
        part = grad[first : first + batch]
        grads.append(part.to(dtype) / scale.to(dtype).view(1, -1, 1, 1) if needed else None)
        first += batch
    return grads, None, None, None, None


torch.library.register_autograd(
    "lpips_fast::scale_images", _scaling_backward, setup_context=_save_scaling
)
