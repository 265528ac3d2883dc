"""When the fast path may run: where it provably computes what calling the modules would.

People hook, wrap, replace, re-pad, prune and parametrise the layers of a loss. So at every call the
modules are compared with what the trunk's table makes: class, order, configuration, attributes,
hooks, weights. Whatever differs is called as a module, slice by slice: a hook on one slice costs no
other. Identity does not matter: copies, pickles and moved models are as fast.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .. import kernels
from .cuda_convolution import DTYPES as CUDA_DTYPES
from .fire import FireModule
from .layers import make_layer
from .packing import is_packable
from .table import IMAGE_CHANNELS, trunk_spec

# What nn.Module keeps for itself and what the comparison treats by itself or not at all.
_UNCOMPARED = frozenset(
    {
        "training",
        "_parameters",
        "_buffers",
        "_modules",
        "_is_full_backward_hook",  # the kind of the last one, kept when it is gone
        "_non_persistent_buffers_set",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    }
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


@dataclass(frozen=True)
class FastSlice:
    """A slice that may run by hand: which, and its weights and biases as they are now."""

    net: str
    number: int  # from 1
    parameters: tuple[Tensor, ...]


class Template:
    """What a module is, as built: its class, its attributes and the shapes of its parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.kind = type(module)
        attributes = module.__dict__
        self.keys = frozenset(attributes)
        self.configuration = tuple(
            (key, value)
            for key, value in attributes.items()
            if key not in _UNCOMPARED and key not in _HOOKS
        )
        self.shapes = tuple(
            (k, None if p is None else p.shape) for k, p in module._parameters.items()
        )
        self.buffers = tuple(
            (k, None if b is None else b.shape) for k, b in module._buffers.items()
        )
        self.children = tuple((k, Template(m)) for k, m in module._modules.items() if m is not None)
        self.child_names = tuple(k for k, _ in self.children)


@dataclass(frozen=True)
class Fault:
    """The first thing in which a module differs from what was built: where, and in words."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where} {self.what}" if self.where else self.what

    def within(self, name: str) -> Fault:
        return Fault(f"{name}.{self.where}" if self.where else name, self.what)


#: Of modules that are as built and only learn: these may be given images in any memory order.
LEARNS = Fault("", "has weights that learn")


def module_fault(module: nn.Module, template: Template, found: list[Tensor]) -> Fault | None:
    """The first thing in which a module differs from its template, or None.

    Args:
        found: receives the parameters and buffers, in order.
    """
    fault = own_fault(module, template.kind, template.keys)
    if fault is not None:
        return fault
    attributes = module.__dict__
    for key, value in template.configuration:
        now = attributes[key]
        if now is not value and (type(now) is not type(value) or now != value):
            return Fault("", f"has {key} {now!r}, not {value!r} as built")
    for kind, shapes in (("_parameters", template.shapes), ("_buffers", template.buffers)):
        tensors = attributes[kind]
        if len(tensors) != len(shapes):
            return Fault("", "holds other parameters or buffers than as built")
        for key, shape in shapes:
            tensor = tensors.get(key)
            if tensor is None and shape is None:
                continue
            if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
                return Fault("", f"has a {key} that is a {type(tensor).__name__}, no plain tensor")
            if tensor.shape != shape:
                return Fault("", f"has a {key} of another shape than as built")
            found.append(tensor)
    children = attributes["_modules"]
    if tuple(children) != template.child_names:
        return Fault("", "holds other layers, or in another order, than as built")
    for key, child in template.children:
        fault = module_fault(children[key], child, found)
        if fault is not None:
            return fault.within(key)
    return None


def own_fault(module: nn.Module, kind: type, keys: frozenset[str]) -> Fault | None:
    """The first thing in which a module itself differs: its class, attributes or hooks."""
    if type(module) is not kind:
        return Fault("", f"is a {type(module).__name__}, not a {kind.__name__} as built")
    attributes = module.__dict__
    if attributes.keys() != keys:
        odd = sorted(attributes.keys() ^ keys)
        return Fault("", f"has other attributes than as built: {', '.join(odd)}")
    for key in _HOOKS:
        if attributes[key]:
            return Fault("", f"has a hook ({key.strip('_').replace('_', ' ')[:-1]})")
    return None


def weights_fault(
    parameters: list[Tensor], device: torch.device, dtype: torch.dtype
) -> Fault | None:
    """Why weights cannot be used as plain, dense and frozen ones, or None."""
    for parameter in parameters:
        if parameter.device != device:
            return Fault("", f"a weight is on {parameter.device} and the images are on {device}")
        if parameter.dtype != dtype:
            return Fault("", f"a weight is {parameter.dtype} and the images are {dtype}")
        if parameter.layout is not torch.strided or parameter.data_ptr() == 0:
            return Fault("", "a weight has no memory of its own")
        if not (is_packable(parameter) if parameter.dim() == 4 else parameter.is_contiguous()):
            return Fault("", "a weight does not lie dense in memory")
    return None


# ------------------------------------------------------------------------------------ the trunk


@functools.cache
def _slice_template(net: str, number: int) -> Template:
    """What the table makes of slice ``number`` (from 1), without memory for its weights."""
    spec = trunk_spec(net)
    ends = list(spec.taps.values())
    first = ends[number - 2] + 1 if number > 1 else 0
    channels = IMAGE_CHANNELS
    block = nn.Sequential()
    with torch.device("meta"):
        for index, layer in enumerate(spec.layers[: ends[number - 1] + 1]):
            module, channels = make_layer(layer, channels)
            if index >= first:
                block.add_module(str(index), module)
    return Template(block)


def fast_slice(
    block: nn.Module,
    net: str,
    number: int,
    device: torch.device,
    dtype: torch.dtype,
    frozen: bool,
) -> FastSlice | Fault:
    """The slice, ready to run by hand on images of a dtype; or the first clause that fails.

    Args:
        frozen: the weights are used without a gradient, whether they ask for one or not.
    """
    found: list[Tensor] = []
    fault = module_fault(block, _slice_template(net, number), found)
    if fault is not None:
        return fault
    if not frozen and torch.is_grad_enabled() and any(p.requires_grad for p in found):
        return LEARNS
    autocast = kernels.autocast_dtype(device) is not None
    fault = weights_fault(found, device, found[0].dtype if autocast else dtype)
    return FastSlice(net, number, tuple(found)) if fault is None else fault


# ------------------------------------------------------------------------------------ the call


def functions_of(kind: type) -> tuple[Any, ...]:
    """What a call of a module of some class runs, to compare with what it was at import."""
    return tuple(
        getattr(kind, name, None)
        for name in ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "_conv_forward")
    )


_CLASSES = (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Sequential, nn.Dropout, FireModule)
_AS_IMPORTED = {kind: functions_of(kind) for kind in _CLASSES}
_FUNCTIONS = ("conv2d", "relu", "max_pool2d")
_FUNCTIONS_AS_IMPORTED = {name: getattr(nn.functional, name) for name in _FUNCTIONS}


def call_fault(images: Iterable[Tensor], device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no call is served by hand just now, whatever the modules are; or None.

    Args:
        images: of the call.
        device, dtype: that the trunk runs in.
    """
    for x in images:
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            return f"the images are a {type(x).__name__}, not a plain tensor"
        if x.numel() == 0:
            return "the batch is empty"
    if not kernels.is_eager():
        return "torch is exporting, tracing or transforming the call"
    return calls_fault() or device_fault(device, dtype)


def calls_fault() -> str | None:
    """Why every module is called just now, whatever it is: somebody watches or changes all."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a TorchDispatchMode is active"
    if torch._C._len_torch_function_stack() > 0 and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    ):
        return "a TorchFunctionMode is active"
    if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return "hooks are registered for all modules"
    for kind, functions in _AS_IMPORTED.items():
        if functions_of(kind) != functions:
            return f"a method of {kind.__name__} was replaced"
        if getattr(nn, kind.__name__, kind) is not kind:
            return f"torch.nn.{kind.__name__} was replaced"
    for name, function in _FUNCTIONS_AS_IMPORTED.items():
        if getattr(nn.functional, name) is not function:
            return f"torch.nn.functional.{name} was replaced"
    return None


def device_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the device has no kernels for images of a dtype, or None."""
    kind = device.type
    dtype = kernels.autocast_dtype(device) or dtype
    if kind == "cuda" and kernels.has_trunk_kernels(device):
        return None if dtype in CUDA_DTYPES else f"there are no kernels for {dtype} on CUDA"
    if kind != "cpu":
        return f"there are no kernels for {kind}"
    return None if dtype in CPU_DTYPES else f"there are no kernels for {dtype} on this CPU"


def _cpu_dtypes() -> frozenset[torch.dtype]:
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    mkldnn = torch.ops.mkldnn
    served = {
        torch.float32: True,
        torch.bfloat16: mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, is_served in served.items() if is_served)


CPU_DTYPES = _cpu_dtypes()
