"""How an operator's other parts are registered: a fake kernel, no derivative, a number of FLOPs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import register_flop_formula

from . import libraries  # noqa: F401  (its import registers the schemas)

_LIBRARY = torch.library.Library("lpips_fast", "FRAGMENT")


def fake_kernel(name: str) -> Callable[[Callable], Callable]:
    """Registers a fake kernel: the results' shapes and strides, for compiling and exporting.

    Torch also runs it where a meta tensor is among others, whose results would be memory that
    nobody wrote to: refused, as by the kernels in ``csrc``.
    """

    def register(kernel: Callable) -> Callable:
        @functools.wraps(kernel)
        def on_one_device(*args: Any, **kwargs: Any) -> Any:
            leaves = pytree.arg_tree_leaves(*args, **kwargs)
            devices = {t.device.type for t in leaves if isinstance(t, Tensor)}
            if len(devices) > 1:
                raise RuntimeError(
                    f"{name}: all tensors must be on one device, got {', '.join(sorted(devices))}; "
                    "move them there with .to()"
                )
            return kernel(*args, **kwargs)

        torch.library.register_fake(f"lpips_fast::{name}", on_one_device)
        return kernel

    return register


def without_derivative(*names: str) -> None:
    """Says that operators have no derivative: torch alone would take it for zero.

    Who calls one in a graph has the gradient from another operator of this package. A result of
    arguments that require a gradient raises when the gradient comes back to it.
    """

    def register(name: str) -> None:
        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(
                f"lpips_fast::{name} has no derivative; call lpips_fast.LPIPS or "
                "lpips_fast.functional, which have, or this operator under torch.no_grad()"
            )

        torch.library.register_autograd(f"lpips_fast::{name}", backward)

    for name in names:
        register(name)


def refuse_in_graph(name: str) -> None:
    """The same for an operator that writes in place, which raises where it is called in a graph."""
    operator = getattr(torch.ops.lpips_fast, name).default

    def call(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise NotImplementedError(
                f"lpips_fast::{name} writes in place and has no derivative; call it under "
                "torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _LIBRARY.impl(name, call, "Autograd", with_keyset=True)


def flops(*names: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Registers a number of floating-point operations for ``torch.utils.flop_counter``.

    It is that of the formula, however it is computed: Winograd's algorithm counts as the sum that
    it replaces. A multiplication and an addition are two. The function takes the operator's
    arguments, shapes in place of tensors.
    """

    def register(count: Callable[..., int]) -> Callable[..., int]:
        def of_call(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
            return count(*args, **kwargs)

        register_flop_formula([getattr(torch.ops.lpips_fast, name) for name in names])(of_call)
        return count

    return register
