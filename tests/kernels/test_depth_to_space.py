"""Blocks back in their places, against torch's pixel shuffle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

DEPTH_TO_SPACE = torch.ops.lpips_fast.depth_to_space
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def reference(blocks: Tensor, stride: int, padding: int, height: int, width: int) -> Tensor:
    # Torch's order of channels is C, row of the block, column.
    channels = blocks.shape[1] // stride**2
    ordered = blocks.unflatten(1, (stride, stride, channels)).permute(0, 3, 1, 2, 4, 5)
    image = F.pixel_shuffle(ordered.flatten(1, 3), stride)
    image = F.pad(image, (0, width + padding, 0, height + padding))
    return image[:, :, padding : padding + height, padding : padding + width]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride, channels", [(4, 3), (2, 3), (3, 1), (1, 5)])
@pytest.mark.parametrize("padding", [0, 2, 5])
@pytest.mark.parametrize("size", [(7, 9), (20, 17), (1, 40)], ids=str)
def test_against_pixel_shuffle(dtype, stride, channels, padding, size):
    blocks = torch.randn(2, stride**2 * channels, 6, 5).to(dtype)
    for order in (torch.channels_last, torch.contiguous_format):
        image = DEPTH_TO_SPACE(blocks.contiguous(memory_format=order), stride, padding, *size)
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(image, reference(blocks, stride, padding, *size))


@pytest.mark.parametrize("shape", [(0, 12, 4, 4), (2, 12, 0, 4)], ids=str)
def test_no_blocks(shape):
    image = DEPTH_TO_SPACE(torch.empty(shape), 2, 1, 5, 6)
    assert torch.equal(image, torch.zeros(shape[0], 3, 5, 6))


@pytest.mark.parametrize("arguments", [(3, 0, 5, 5), (0, 0, 5, 5), (2, -1, 5, 5), (2, 0, -5, 5)])
def test_what_does_not_fit_is_refused(arguments):
    with pytest.raises(RuntimeError, match="takes blocks"):
        DEPTH_TO_SPACE(torch.randn(1, 8, 4, 4), *arguments)


def test_fake_kernel():
    torch.library.opcheck(
        DEPTH_TO_SPACE.default,
        (torch.randn(2, 12, 4, 5), 2, 1, 6, 7),
        test_utils=("test_schema", "test_faketensor"),
    )
