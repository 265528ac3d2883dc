"""The original's helpers: the same results as lpips 0.1.4, and right where it no longer runs."""

from __future__ import annotations

import inspect
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lpips_fast import compat
from lpips_fast.images.reading import ImageError


@pytest.fixture
def skimage() -> Any:
    return pytest.importorskip("skimage", reason="Lab and SSIM need scikit-image")


def random_images(generator: torch.Generator, n: int = 1, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=generator) * 2 - 1


def random_array(generator: torch.Generator, *shape: int) -> np.ndarray:
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8).numpy()


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    else:
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype
        np.testing.assert_array_equal(ours, theirs)


# ------------------------------------------------------------------- against the original


def test_every_signature_is_the_originals(reference: Any) -> None:
    for name in compat.__all__:
        ours = inspect.signature(getattr(compat, name)).parameters.values()
        theirs = inspect.signature(getattr(reference, name)).parameters.values()
        assert [(p.name, p.default, p.kind) for p in ours] == [
            (p.name, p.default, p.kind) for p in theirs
        ], name


def test_nothing_of_the_originals_is_missing(reference: Any) -> None:
    elsewhere = {
        "LPIPS",
        "ScalingLayer",
        "NetLinLayer",
        "normalize_tensor",
        "spatial_average",
        "upsample",
        "Trainer",
        "score_2afc_dataset",
        "score_jnd_dataset",
    }
    theirs = {
        name
        for name, value in vars(reference).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__.startswith("lpips")
    }
    assert theirs - elsewhere == set(compat.__all__)


@pytest.mark.parametrize("name", ["l2", "psnr"])
def test_array_distances(reference: Any, generator: torch.Generator, name: str) -> None:
    p0, p1 = random_array(generator, 9, 8, 3), random_array(generator, 9, 8, 3)
    ours, theirs = getattr(compat, name), getattr(reference, name)
    assert_same(ours(p0, p1), theirs(p0, p1))
    assert_same(ours(p0 / 255, p1 / 255, 1.0), theirs(p0 / 255, p1 / 255, 1.0))
    single = p0.astype(np.float32), p1.astype(np.float32)
    assert_same(ours(*single), theirs(*single))


@pytest.mark.parametrize("name", ["tensor2np", "tensor2im"])
def test_tensor_to_array(reference: Any, generator: torch.Generator, name: str) -> None:
    images = random_images(generator, n=2)
    for batch in (images, images.half(), images.double()):
        assert_same(getattr(compat, name)(batch), getattr(reference, name)(batch))


def test_tensor2im_with_its_options(reference: Any, generator: torch.Generator) -> None:
    image = torch.rand(1, 3, 5, 6, generator=generator)
    options: dict[str, Any] = {"imtype": np.float64, "cent": 0.0, "factor": 255.0}
    assert_same(compat.tensor2im(image, **options), reference.tensor2im(image, **options))


@pytest.mark.parametrize("name", ["np2tensor", "im2tensor"])
def test_array_to_tensor(reference: Any, generator: torch.Generator, name: str) -> None:
    image = random_array(generator, 7, 6, 3)
    for array in (image, image / 255.0, image.astype(np.float32)):
        assert_same(getattr(compat, name)(array), getattr(reference, name)(array))


def test_tensor2vec(reference: Any, generator: torch.Generator) -> None:
    vector = torch.rand(3, 4, 1, 1, generator=generator, requires_grad=True)
    assert_same(compat.tensor2vec(vector), reference.tensor2vec(vector))


def test_rgb2lab(reference: Any, skimage: Any, generator: torch.Generator) -> None:
    image = random_array(generator, 7, 6, 3)
    assert_same(compat.rgb2lab(image), reference.rgb2lab(image))
    with pytest.raises(TypeError):  # the second definition, without `mean_cent`, is the one kept
        compat.rgb2lab(image, mean_cent=True)  # type: ignore[call-arg]


@pytest.mark.parametrize("to_norm", [True, False])
@pytest.mark.parametrize("mc_only", [True, False])
def test_tensor2tensorlab(
    reference: Any, skimage: Any, generator: torch.Generator, to_norm: bool, mc_only: bool
) -> None:
    image = random_images(generator)
    assert_same(
        compat.tensor2tensorlab(image, to_norm, mc_only),
        reference.tensor2tensorlab(image, to_norm, mc_only),
    )


def test_tensorlab2tensor(reference: Any, skimage: Any, generator: torch.Generator) -> None:
    shown = compat.tensor2tensorlab(random_images(generator))
    beyond = torch.rand(1, 3, 8, 8, generator=generator) * 2 - 1
    for lab in (shown, beyond):
        with warnings.catch_warnings():  # the original changes the filters of the process
            expected, expected_mask = reference.tensorlab2tensor(lab, return_inbnd=True)
        image, mask = compat.tensorlab2tensor(lab, return_inbnd=True)
        assert_same(image, expected)
        assert_same(mask, expected_mask)
        assert_same(compat.tensorlab2tensor(lab), expected)
    assert 0 <= mask.min() < mask.max() <= 1


@pytest.mark.parametrize("use_07_metric", [True, False])
@pytest.mark.parametrize("n", [0, 1, 2, 37])
def test_voc_ap(reference: Any, generator: torch.Generator, use_07_metric: bool, n: int) -> None:
    recall = np.sort(torch.rand(n, generator=generator, dtype=torch.float64).numpy().round(1))
    precision = torch.rand(n, generator=generator, dtype=torch.float64).numpy()
    ours = compat.voc_ap(recall, precision, use_07_metric)
    assert ours == pytest.approx(reference.voc_ap(recall, precision, use_07_metric), abs=1e-15)


def test_ranking_loss_loads_the_originals_weights(
    reference: Any, generator: torch.Generator
) -> None:
    theirs, ours = reference.BCERankingLoss(chn_mid=8), compat.BCERankingLoss(chn_mid=8)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    d0, d1 = (torch.rand(4, 1, 1, 1, generator=generator) for _ in range(2))
    judge = torch.rand(4, 1, 1, 1, generator=generator) * 2 - 1
    assert_same(ours(d0, d1, judge), theirs(d0, d1, judge))
    assert_same(ours.logit, theirs.logit)


@pytest.mark.parametrize("use_sigmoid", [True, False])
def test_dist2logit_loads_the_originals_weights(
    reference: Any, generator: torch.Generator, use_sigmoid: bool
) -> None:
    theirs = reference.Dist2LogitLayer(use_sigmoid=use_sigmoid)
    ours = compat.Dist2LogitLayer(use_sigmoid=use_sigmoid)
    ours.load_state_dict(theirs.state_dict())
    d0, d1 = (torch.rand(3, 1, 2, 2, generator=generator) for _ in range(2))
    assert_same(ours(d0, d1), theirs(d0, d1))
    assert_same(ours(d0, d1, eps=0.5), theirs(d0, d1, eps=0.5))


@pytest.mark.parametrize("colorspace", ["RGB", "Lab"])
def test_l2_is_the_originals(
    reference: Any, skimage: Any, generator: torch.Generator, colorspace: str
) -> None:
    in0, in1 = random_images(generator, size=12), random_images(generator, size=12)
    ours = compat.L2(use_gpu=False, colorspace=colorspace)
    theirs = reference.L2(use_gpu=False, colorspace=colorspace)
    assert_same(ours(in0, in1, retPerLayer=True), theirs(in0, in1, retPerLayer=True))


def test_print_network(
    reference: Any, generator: torch.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    reference.print_network(network)
    expected = capsys.readouterr().out
    compat.print_network(network)
    assert capsys.readouterr().out == expected
    assert "Total number of parameters: 16" in expected


# -------------------------------------------------------------------- without the original


def test_l2_and_psnr_by_hand() -> None:
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert compat.l2(black, white) == 0.5
    assert compat.psnr(black, white) == 0
    assert compat.psnr(black, black + np.uint8(1)) == pytest.approx(20 * np.log10(255))


def test_voc_ap_by_hand() -> None:
    recall, precision = np.array([0.5, 1.0]), np.array([1.0, 0.5])
    assert compat.voc_ap(recall, precision) == pytest.approx(0.75)
    # Six recalls up to 0.5 reach precision 1, five reach 0.5.
    assert compat.voc_ap(recall, precision, True) == pytest.approx((6 + 5 * 0.5) / 11)


def test_state_dict_keys() -> None:
    layers = [f"model.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    assert list(compat.Dist2LogitLayer().state_dict()) == layers
    assert list(compat.BCERankingLoss().state_dict()) == [f"net.{key}" for key in layers]


def test_im2tensor_and_back(generator: torch.Generator) -> None:
    image = random_array(generator, 6, 5, 3)
    back = compat.tensor2im(compat.im2tensor(image))
    # Cut off, not rounded: a value may come back one lower.
    assert set(np.unique(image.astype(int) - back)) <= {0, 1}


def test_dssim_is_scikit_images(skimage: Any, generator: torch.Generator) -> None:
    from skimage.metrics import structural_similarity

    p0, p1 = random_array(generator, 16, 17, 3), random_array(generator, 16, 17, 3)
    per_channel = [
        structural_similarity(p0[..., c], p1[..., c], data_range=255.0) for c in range(3)
    ]
    assert compat.dssim(p0, p1) == pytest.approx((1 - np.mean(per_channel)) / 2, rel=1e-12)
    assert compat.dssim(p0, p0) == 0
    wide = compat.dssim(p0 / 255.0, p1 / 255.0, range=1.0)
    assert wide == pytest.approx(compat.dssim(p0, p1), rel=1e-9)


@pytest.mark.parametrize("colorspace", ["RGB", "Lab"])
@pytest.mark.parametrize("distance", [compat.L2, compat.DSSIM])
def test_a_batch_is_its_pairs(
    skimage: Any, generator: torch.Generator, distance: type[compat.FakeNet], colorspace: str
) -> None:
    in0, in1 = random_images(generator, n=3), random_images(generator, n=3)
    model = distance(colorspace=colorspace)
    together = model(in0, in1)
    assert together.shape == (3,)
    assert together.dtype == torch.float32
    assert together.device == in0.device
    alone = torch.cat([model(in0[n : n + 1], in1[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(together, alone)
    assert len(set(together.tolist())) == 3
    assert torch.equal(model(in0, in0), torch.zeros(3))


def test_dssim_module_is_the_function(skimage: Any, generator: torch.Generator) -> None:
    in0, in1 = random_images(generator), random_images(generator)
    eight0, eight1 = compat.tensor2im(in0), compat.tensor2im(in1)
    rgb = compat.DSSIM(colorspace="RGB")(in0, in1)
    assert rgb.item() == pytest.approx(compat.dssim(eight0, eight1), rel=1e-6)
    lab = compat.DSSIM(colorspace="Lab")(in0, in1)
    expected = compat.dssim(
        compat.rgb2lab(eight0).astype(np.float32),
        compat.rgb2lab(eight1).astype(np.float32),
        range=100.0,
    )
    assert lab.item() == pytest.approx(expected, rel=1e-5)


def test_l2_in_rgb_is_differentiable(generator: torch.Generator) -> None:
    in0, in1 = random_images(generator, n=2), random_images(generator, n=2)
    in0.requires_grad_()
    compat.L2(colorspace="RGB")(in0, in1).sum().backward()
    expected = 2 * (in0.detach() - in1) / in0[0].numel()
    torch.testing.assert_close(in0.grad, expected)


@pytest.mark.cuda
def test_the_result_follows_the_inputs(skimage: Any, generator: torch.Generator) -> None:
    in0, in1 = random_images(generator).cuda(), random_images(generator).cuda()
    assert compat.DSSIM()(in0, in1).device == in0.device
    assert compat.DSSIM(use_gpu=False)(in0, in1).device.type == "cpu"


def test_pairs_that_do_not_match_are_refused(generator: torch.Generator) -> None:
    in0, in1 = random_images(generator, n=2), random_images(generator, n=1)
    with pytest.raises(ValueError, match=r"got \(2, 3, 16, 16\) and \(1, 3, 16, 16\)"):
        compat.L2()(in0, in1)


def test_an_unknown_colour_space_is_refused() -> None:
    with pytest.raises(ValueError, match="colorspace is 'HSV', expected 'Lab' or 'RGB'"):
        compat.FakeNet(colorspace="HSV")


def test_tensorlab2tensor_leaves_the_warnings_alone(skimage: Any) -> None:
    filters = list(warnings.filters)
    compat.tensorlab2tensor(torch.full((1, 3, 4, 4), -0.5))
    assert list(warnings.filters) == filters


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_load_image(tmp_path: Path, generator: torch.Generator, suffix: str) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
    image = random_array(generator, 6, 5, 3)
    path = tmp_path / f"image.{suffix}"
    pillow.fromarray(image).save(path)
    for name in (path, str(path)):
        loaded = compat.load_image(name)
        assert loaded.dtype == np.uint8
        np.testing.assert_array_equal(loaded, image)


def test_load_image_ignores_alpha(tmp_path: Path, generator: torch.Generator) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
    image = random_array(generator, 6, 5, 4)
    pillow.fromarray(image).save(tmp_path / "image.png")
    loaded = compat.load_image(tmp_path / "image.png")
    np.testing.assert_array_equal(loaded, image[..., :3])


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_load_image_is_the_originals(
    reference: Any, tmp_path: Path, generator: torch.Generator, suffix: str
) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
    pytest.importorskip("cv2", reason="the original reads images with OpenCV")
    path = str(tmp_path / f"image.{suffix}")
    pillow.fromarray(random_array(generator, 24, 32, 3)).save(path)
    np.testing.assert_array_equal(compat.load_image(path), reference.load_image(path))


def test_load_image_says_what_is_wrong(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="reading images needs Pillow")
    with pytest.raises(ImageError, match="no such file"):
        compat.load_image(str(tmp_path / "gone.png"))


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("skimage", "skimage.metrics", "rawpy"):
        monkeypatch.setitem(sys.modules, name, None)
    image = np.zeros((8, 8, 3))
    with pytest.raises(ImportError, match=r'pip install "lpips-fast\[compat\]"'):
        compat.dssim(image, image)
    with pytest.raises(ImportError, match=r'pip install "lpips-fast\[compat\]"'):
        compat.rgb2lab(image)
    with pytest.raises(ImportError, match="pip install rawpy"):
        compat.load_image("photo.dng")
