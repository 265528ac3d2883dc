"""Which dtypes a slice can run in on this machine's CPU, for tests that need one."""

from __future__ import annotations

import pytest
import torch

from lpips_fast.trunk.legality import CPU_DTYPES


def needs(dtype: torch.dtype) -> pytest.MarkDecorator:
    """Skips a test where oneDNN cannot convolve in ``dtype``."""
    reason = f"oneDNN convolves no {str(dtype).removeprefix('torch.')} on this CPU"
    return pytest.mark.skipif(dtype not in CPU_DTYPES, reason=reason)


#: To parametrise with: each is skipped where it is not served.
HALF_DTYPES = [
    pytest.param(dtype, marks=needs(dtype), id=str(dtype))
    for dtype in (torch.bfloat16, torch.float16)
]
