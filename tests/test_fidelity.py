"""PSNR and SSIM against scikit-image, torchmetrics and the definition, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import declare_torchvision_operators

from lpips_fast.fidelity import SSIM_WINDOW, psnr, ssim

SHAPES = [(1, 3, 11, 11), (2, 3, 40, 33), (3, 1, 12, 64), (1, 3, 300, 260)]
KINDS = ["noise", "near", "flat", "dark", "white", "opposite", "edge", "identical"]


def pair_of(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> list[torch.Tensor]:
    """8-bit values as float64."""

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).double()

    first = draw(0, 255)
    if kind == "near":
        return [first, (first + draw(-1, 1)).clamp(0, 255)]
    if kind == "flat":
        return [torch.full(shape, 200.0).double(), torch.full(shape, 190.0).double()]
    if kind == "dark":
        return [draw(0, 2), draw(0, 2)]
    if kind == "white":
        return [draw(253, 255), draw(253, 255)]
    if kind == "opposite":
        return [torch.zeros(shape).double(), torch.full(shape, 255.0).double()]
    if kind == "edge":
        first[..., : shape[-1] // 2] = 0
        return [first, draw(250, 255)]
    return [first, first.clone() if kind == "identical" else draw(0, 255)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_are_scikit_images(
    kind: str, shape: tuple[int, ...], generator: torch.Generator
) -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    in0, in1 = pair_of(kind, shape, generator)
    for scale in (255.0, 1.0):
        x, y = in0 * scale / 255, in1 * scale / 255
        expected = [
            metrics.structural_similarity(
                a.numpy(),
                b.numpy(),
                channel_axis=0,
                data_range=scale,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
            for a, b in zip(x, y, strict=True)
        ]
        reference = torch.tensor(expected, dtype=torch.float64)
        assert (ssim(x, y, data_range=scale) - reference).abs().max() < 1e-9
        single = ssim(x.float(), y.float(), data_range=scale)
        assert single.dtype == torch.float32 and (single - reference).abs().max() < 1e-6
        if kind != "identical":
            ratio = [
                metrics.peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=scale)
                for a, b in zip(x, y, strict=True)
            ]
            assert psnr(x, y, data_range=scale).tolist() == pytest.approx(ratio, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_both_are_torchmetrics(kind: str, generator: torch.Generator) -> None:
    declare_torchvision_operators()
    image = pytest.importorskip(
        "torchmetrics.functional.image", reason="torchmetrics is not installed"
    )
    in0, in1 = pair_of(kind, (2, 3, 40, 33), generator)
    expected = image.structural_similarity_index_measure(
        in0, in1, data_range=255.0, reduction="none"
    )
    ours = ssim(in0, in1, data_range=255, border="reflect")
    assert (ours - expected).abs().max() < 1e-6
    _, full = image.structural_similarity_index_measure(
        in0, in1, data_range=255.0, reduction="none", return_full_image=True
    )
    within = full[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
    assert (ssim(in0, in1, data_range=255) - within).abs().max() < 1e-6
    expected = image.peak_signal_noise_ratio(
        in0, in1, data_range=255.0, reduction="none", dim=(1, 2, 3)
    )
    # torchmetrics divides by a logarithm that it rounds to float32.
    torch.testing.assert_close(psnr(in0, in1, data_range=255), expected, rtol=1e-6, atol=1e-6)


def test_ssim_is_the_papers_formula_at_one_position(generator: torch.Generator) -> None:
    x, y = pair_of("noise", (1, 1, 11, 11), generator)
    axis = torch.arange(11, dtype=torch.float64) - 5
    weights = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
    variance_x = (weights * (x - mean_x) ** 2).sum()
    variance_y = (weights * (y - mean_y) ** 2).sum()
    covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    assert ssim(x, y, data_range=255).item() == pytest.approx(expected.item(), abs=1e-12)


def test_identical_images(generator: torch.Generator) -> None:
    image = torch.rand(2, 3, 20, 20, generator=generator)
    assert ssim(image, image, data_range=1).tolist() == [1.0, 1.0]
    assert psnr(image, image, data_range=1).tolist() == [math.inf, math.inf]


def test_gradients(generator: torch.Generator) -> None:
    in0, in1 = (
        torch.rand(2, 2, 12, 13, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    for metric in (ssim, psnr):
        assert torch.autograd.gradcheck(lambda a, b, f=metric: f(a, b, data_range=1.0), (in0, in1))


def test_the_parts_that_are_filtered_at_a_time_do_not_matter(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    in0, in1 = pair_of("noise", (3, 3, 40, 33), generator)
    whole = ssim(in0, in1, data_range=255)
    monkeypatch.setattr("lpips_fast.fidelity._PIXELS_AT_A_TIME", 1)
    assert torch.equal(ssim(in0, in1, data_range=255), whole)


def test_half_precision_is_computed_in_float32(generator: torch.Generator) -> None:
    image = torch.rand(1, 3, 16, 16, generator=generator).half()
    assert ssim(image, image.flip(-1), data_range=1).dtype == torch.float32
    assert psnr(image, image.flip(-1), data_range=1).dtype == torch.float32


def test_bad_input() -> None:
    image = torch.rand(1, 3, SSIM_WINDOW, SSIM_WINDOW)
    for metric in (ssim, psnr):
        with pytest.raises(ValueError, match="expected one shape"):
            metric(image, image[:, :1], data_range=1)
        with pytest.raises(ValueError, match="expected one shape"):
            metric(image[0], image[0], data_range=1)
        with pytest.raises(TypeError, match="expected floating point"):
            metric(image.byte(), image.byte(), data_range=1)
    with pytest.raises(ValueError, match="border is 'zero', expected 'valid' or 'reflect'"):
        ssim(image, image, data_range=1, border="zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="smaller than SSIM's window, 11x11"):
        ssim(image[..., 1:], image[..., 1:], data_range=1)
