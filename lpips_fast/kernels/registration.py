"""How an operator's other parts are registered: its fake kernel, that it has no derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import libraries  # noqa: F401  (its import registers the schemas)


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
