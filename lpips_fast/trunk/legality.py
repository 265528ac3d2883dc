"""When the fast path may run: where it provably computes what calling the modules would.

People hook, wrap, replace, re-pad, prune and parametrise the layers of a loss. So at every call the
modules are compared with what the trunk's table makes: class, order, configuration, attributes,
hooks, weights. Whatever differs is called as a module, slice by slice: a hook on one slice costs no
other. Identity does not matter: copies, pickles and moved models are as fast.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .. import kernels
from .cuda_convolution import DTYPES as CUDA_DTYPES
from .fire import FireModule
from .layers import make_layer
from .max_pool import CeilMaxPool2d
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
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
GLOBAL_HOOKS = (
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
    flagged: bool = False  # images that hold NaN are known, and need not show in the tap

    @property
    def keep_nan(self) -> bool:
        """Whether NaN comes through on CUDA: by the first slice one in an image reaches the tap."""
        return self.number == 1 and not self.flagged


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
        self.buffers = tuple(module._buffers)
        self.children = tuple((k, Template(m)) for k, m in module._modules.items() if m is not None)
        self.child_names = tuple(k for k, _ in self.children)
        self.check: kernels.ModuleCheck = kernels.ModuleCheck(
            self.kind,
            tuple(attributes),
            self.configuration,
            _HOOKS,
            self.shapes,
            self.buffers,
            [(k, child.check) for k, child in self.children],
            (nn.Parameter, Tensor),
        )


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
        found: receives the parameters, in order.
    """
    if template.check.matches(module, found):
        return None
    found.clear()
    return _fault_in_words(module, template, found)


def _fault_in_words(module: nn.Module, template: Template, found: list[Tensor]) -> Fault | None:
    fault = own_fault(module, template.kind, template.keys)
    if fault is not None:
        return fault
    attributes = module.__dict__
    for key, value in template.configuration:
        now = attributes[key]
        if now is not value and (type(now) is not type(value) or now != value):
            return Fault("", f"has {key} {now!r}, not {value!r} as built")
    parameters = attributes["_parameters"]
    if len(parameters) != len(template.shapes) or tuple(attributes["_buffers"]) != template.buffers:
        return Fault("", "holds other parameters or buffers than as built")
    for key, shape in template.shapes:
        parameter = parameters.get(key)
        if parameter is None and shape is None:
            continue
        if type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
            return Fault("", f"has a {key} that is a {type(parameter).__name__}, no plain tensor")
        if parameter.shape != shape:  # type: ignore[union-attr]
            return Fault("", f"has a {key} of another shape than as built")
        found.append(parameter)  # type: ignore[arg-type]
    children = attributes["_modules"]
    if tuple(children) != template.child_names:
        return Fault("", "holds other layers, or in another order, than as built")
    for key, child in template.children:
        fault = _fault_in_words(children[key], child, found)
        if fault is not None:
            return fault.within(key)
    return None


def own_fault(module: nn.Module, kind: type, keys: frozenset[str]) -> Fault | None:
    """The first thing in which a module itself differs: its class, attributes or hooks."""
    if type(module) is not kind:
        return Fault("", f"is a {type(module).__name__}, not a {kind.__name__} as built")
    attributes = module.__dict__
    if attributes.keys() != keys:
        odd = sorted(k for k in attributes.keys() ^ keys if k in keys or _is_read(module, kind, k))
        if odd:
            return Fault("", f"has other attributes than as built: {', '.join(odd)}")
    for key in _HOOKS:
        if attributes[key]:
            return Fault("", f"has a hook ({key.strip('_').replace('_', ' ')[:-1]})")
    return None


def _is_read(module: nn.Module, kind: type, key: str) -> bool:
    """Whether a further attribute stands before one that the class's own code reads.

    Others mean nothing to it: frameworks mark the modules that they hold, as FSDP does.
    """
    attributes = module.__dict__
    held = ("_parameters", "_buffers", "_modules")
    return hasattr(kind, key) or any(key in attributes[group] for group in held)


def weights_fault(
    parameters: list[Tensor], device: torch.device, dtype: torch.dtype
) -> Fault | None:
    """Why weights cannot be used as plain, dense and frozen ones, or None."""
    if kernels.lie_plainly(parameters, device, dtype, torch.strided, False):
        return None
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


def takes(fast: FastSlice, x: Tensor) -> bool:
    """Whether ``x`` is what a slice as built hands on, and not what a changed one made."""
    if not kernels.is_eager():
        return True
    weight = next(p for p in fast.parameters if p.dim() == 4)
    autocast = kernels.autocast_dtype(weight.device) is not None
    return (
        (type(x) is Tensor or type(x) is nn.Parameter)
        and x.dim() == 4
        and x.device == weight.device
        and (x.dtype == weight.dtype or (autocast and x.dtype in CPU_DTYPES | set(CUDA_DTYPES)))
        and x.shape[1] == weight.shape[1]
        and x.numel() > 0
    )


@functools.cache
def _slices_template(net: str) -> tuple[tuple[Template, ...], tuple[int, ...]]:
    """Of every slice its template, and how many parameters it has."""
    templates = tuple(_slice_template(net, k + 1) for k in range(len(trunk_spec(net).taps)))
    return templates, tuple(_parameters_of(template) for template in templates)


def _parameters_of(template: Template) -> int:
    own = sum(shape is not None for _, shape in template.shapes)
    return own + sum(_parameters_of(child) for _, child in template.children)


def fast_slices(
    blocks: Sequence[nn.Module], net: str, device: torch.device, dtype: torch.dtype, frozen: bool
) -> list[FastSlice | Fault]:
    """:func:`fast_slice` of all slices: in few calls where all are as built, the usual case."""
    templates, counts = _slices_template(net)
    found: list[Tensor] = []
    if all(template.check.matches(block, found) for template, block in zip(templates, blocks)):
        if kernels.autocast_dtype(device) is not None:
            dtype = found[0].dtype
        learns_not = not frozen and torch.is_grad_enabled()
        if kernels.lie_plainly(found, device, dtype, torch.strided, learns_not):
            result: list[FastSlice | Fault] = []
            first = 0
            for k, count in enumerate(counts, start=1):
                result.append(FastSlice(net, k, tuple(found[first : first + count])))
                first += count
            return result
    return [
        fast_slice(block, net, number, device, dtype, frozen)
        for number, block in enumerate(blocks, start=1)
    ]


# ------------------------------------------------------------------------------------ the call


# What a call of a module runs.
METHODS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "_conv_forward")
_CLASSES = (
    nn.Conv2d,
    nn.ReLU,
    nn.MaxPool2d,
    nn.Sequential,
    nn.Dropout,
    FireModule,
    CeilMaxPool2d,
)
_FUNCTIONS = [
    *((kind, name) for kind in _CLASSES for name in METHODS if hasattr(kind, name)),
    *((nn.functional, name) for name in ("conv2d", "relu", "max_pool2d")),
    *((nn, name) for name in ("Conv2d", "ReLU", "MaxPool2d", "Sequential", "Dropout")),
]
_AS_IMPORTED = [getattr(owner, name) for owner, name in _FUNCTIONS]
_FUNCTION_CHECK = kernels.AttributeCheck(_FUNCTIONS)


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
    if any(getattr(torch_module, name) for name in GLOBAL_HOOKS):
        return "hooks are registered for all modules"
    if not _FUNCTION_CHECK.unchanged():
        for (owner, name), function in zip(_FUNCTIONS, _AS_IMPORTED):
            if getattr(owner, name) is not function:
                return f"{owner.__name__}.{name} was replaced"
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


#: float64 is left to torch, and so is everything where torch has no oneDNN.
CPU_DTYPES = (
    {torch.float32, torch.bfloat16, torch.float16}
    if torch.backends.mkldnn.is_available()
    else set[torch.dtype]()
)
