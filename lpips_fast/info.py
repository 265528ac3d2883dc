"""What is installed, how it was built, and where weights are: ``python -m lpips_fast info``."""

from __future__ import annotations

import json
import platform

import torch

from .kernels import LOADED_LIBRARIES
from .trunk.table import TRUNKS
from .version import __version__
from .weights import locate_trunk_weights


def collect() -> dict[str, str]:
    """Every fact by its name, in the order in which :func:`report` prints them."""
    from .kernels import _C

    built = json.loads(_C.build_info())
    facts = {
        "lpips_fast": __version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "built against torch": f"{built['torch']} (stable ABI of 2.10: loads in 2.10 and later)",
        "compiler": built["compiler"],
        "CPU kernels": f"{LOADED_LIBRARIES[0]} loaded, of {built['cpu_capabilities']} built",
        "CPU threads": str(torch.get_num_threads()),
        "CUDA kernels": _cuda_kernels(built),
        "CUDA devices": ", ".join(
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        )
        or "none",
    }
    for net in TRUNKS:
        location = locate_trunk_weights(net)
        facts[f"weights of {net}"] = (
            f"{location.path} ({location.kind})"
            if location is not None
            else "not here; downloaded on first use"
        )
    return facts


def _cuda_kernels(built: dict[str, str]) -> str:
    if built["cuda_arch_list"] == "none":
        return f"not built: {built['cuda']}"
    state = "loaded" if "_cuda" in LOADED_LIBRARIES else "built, not loaded by a CPU torch"
    return f"{state}, for {built['cuda_arch_list']} ({built['cuda']})"


def report() -> str:
    """The facts as aligned lines of text.

    >>> print(report())  # doctest: +ELLIPSIS
    lpips_fast           ...
    """
    facts = collect()
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
