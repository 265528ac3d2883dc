"""The helper functions and classes that ``import lpips`` 0.1.4 gives beside the metric.

Same names, same signatures, same results, so that ``import lpips_fast as lpips`` runs a script
that leans on them. New code has better choices: :mod:`lpips_fast.images` to read files,
``skimage.metrics`` and ``skimage.color`` for the rest.

Scripts rely on the original's quirks, so they are kept and each is named where it stands. What
crashed or acted behind the caller's back is mended instead:

- :func:`dssim` and :class:`DSSIM` run again (``skimage.measure.compare_ssim`` is long gone).
- :class:`L2` and :class:`DSSIM` take batches, and run on a machine without a GPU.
- :func:`load_image` says what is wrong with a file, and reads more formats than the original.
- :func:`tensorlab2tensor` no longer silences every warning of the process.

The Lab colour space and SSIM come from scikit-image (``pip install "lpips-fast[compat]"``).
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "DSSIM",
    "L2",
    "BCERankingLoss",
    "Dist2LogitLayer",
    "FakeNet",
    "dssim",
    "im2tensor",
    "l2",
    "load_image",
    "np2tensor",
    "print_network",
    "psnr",
    "rgb2lab",
    "tensor2im",
    "tensor2np",
    "tensor2tensorlab",
    "tensor2vec",
    "tensorlab2tensor",
    "voc_ap",
]

# ------------------------------------------------------------------ distances between two arrays


def l2(p0: Any, p1: Any, range: float = 255.0) -> Any:
    """Half the mean squared difference of two arrays, after division by `range`.

    Quirks kept: the factor one half, and no conversion of the arrays: two uint8 arrays are divided
    first and so do not wrap around.

    Example:
        >>> float(l2(np.array([0.0, 255.0]), np.array([0.0, 0.0])))
        0.25
    """
    return 0.5 * np.mean((p0 / range - p1 / range) ** 2)


def psnr(p0: Any, p1: Any, peak: float = 255.0) -> Any:
    """Peak signal-to-noise ratio of two arrays in decibel.

    Quirk kept: equal arrays divide by zero, which NumPy answers with a warning and infinity.

    Example:
        >>> float(psnr(np.array([0, 255]), np.array([255, 0])))
        0.0
    """
    return 10 * np.log10(peak**2 / np.mean((1.0 * p0 - 1.0 * p1) ** 2))


def dssim(p0: Any, p1: Any, range: float = 255.0) -> Any:
    """Structural dissimilarity ``(1 - SSIM) / 2`` of two (H, W, C) arrays, from 0 to 1.

    SSIM is ``skimage.metrics.structural_similarity`` with its defaults: a uniform 7x7 window, the
    mean over the channels in the last dimension. The original calls ``compare_ssim``, its earlier
    name, which scikit-image removed in 0.18.

    Raises:
        ImportError: scikit-image is not installed.
        ValueError: the arrays differ in shape or are smaller than 7x7 (from scikit-image).
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise _scikit_image_is_missing() from error
    return (1 - structural_similarity(p0, p1, data_range=range, channel_axis=-1)) / 2.0


# --------------------------------------------------------------- images, arrays and tensors


def tensor2np(tensor_obj: Tensor) -> np.ndarray:
    """Turn (N, C, H, W) into a float32 (H, W, C) array on the CPU.

    Quirks kept: only the first image of the batch is taken, and a float32 CPU tensor shares its
    memory with the array.
    """
    return tensor_obj[0].cpu().float().numpy().transpose((1, 2, 0))


def np2tensor(np_obj: Any) -> Tensor:
    """Turn an (H, W, C) array into a float32 (1, C, H, W) tensor, its values unchanged."""
    return torch.Tensor(np_obj[:, :, :, np.newaxis].transpose((3, 2, 0, 1)))


def tensor2im(
    image_tensor: Tensor, imtype: Any = np.uint8, cent: float = 1.0, factor: float = 255.0 / 2.0
) -> np.ndarray:
    """Turn (N, 3, H, W) in [-1, 1] into an 8-bit (H, W, 3) array: ``(value + cent) * factor``.

    Quirks kept: only the first image is taken; values are cut off, not rounded, and not clipped, so
    that what lies outside [-1, 1] wraps around.
    """
    array = image_tensor[0].cpu().float().numpy()
    return ((np.transpose(array, (1, 2, 0)) + cent) * factor).astype(imtype)


def im2tensor(
    image: Any, imtype: Any = np.uint8, cent: float = 1.0, factor: float = 255.0 / 2.0
) -> Tensor:
    """Turn an (H, W, 3) array in [0, 255] into float32 (1, 3, H, W) in [-1, 1].

    The value is ``image / factor - cent``. Quirk kept: `imtype` is not used.

    Example:
        >>> im2tensor(np.zeros((1, 1, 3), np.uint8)).flatten()
        tensor([-1., -1., -1.])
    """
    return torch.Tensor((image / factor - cent)[:, :, :, np.newaxis].transpose((3, 2, 0, 1)))


def tensor2vec(vector_tensor: Tensor) -> np.ndarray:
    """Turn (N, C, 1, 1) into an (N, C) array on the CPU."""
    return vector_tensor.data.cpu().numpy()[:, :, 0, 0]


def load_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image file as 8-bit RGB (H, W, 3), the alpha channel ignored.

    The original reads bmp, jpg, jpeg and png with OpenCV, and those arrays are the same here, read
    by :func:`lpips_fast.images.read_image_uint8`. Its path for every other suffix fails on a
    missing import; here they are read in the same way. Camera files (``.dng``) need ``rawpy``.

    Raises:
        ImageError: the file cannot be read; the original fails on a ``None`` instead.
        ImportError: Pillow is missing, or rawpy for a ``.dng`` file.
    """
    if os.fspath(path).endswith("dng"):
        try:
            import rawpy
        except ImportError as error:
            raise ImportError("reading a .dng file needs rawpy: pip install rawpy") from error
        with rawpy.imread(os.fspath(path)) as raw:
            return raw.postprocess()

    from .images.reading import read_image_uint8

    return read_image_uint8(path, alpha="drop")


# --------------------------------------------------------------------- the Lab colour space


def rgb2lab(input: Any) -> np.ndarray:
    """Turn RGB in [0, 255], (H, W, 3), into Lab.

    Quirk kept: the original defines this function twice, and the second definition wins. It
    divides by 255 whatever the type, and has no `mean_cent`.

    Raises:
        ImportError: scikit-image is not installed.
    """
    return _skimage_color().rgb2lab(input / 255.0)


def tensor2tensorlab(image_tensor: Tensor, to_norm: bool = True, mc_only: bool = False) -> Tensor:
    """Turn (N, 3, H, W) in [-1, 1] into a Lab tensor (1, 3, H, W) on the CPU.

    Args:
        image_tensor: RGB; passes through 8 bits on its way (:func:`tensor2im`).
        to_norm: centre L at zero and divide everything by 100, unless `mc_only`.
        mc_only: centre L at zero and nothing else.

    Quirk kept: only the first image of the batch is taken.

    Raises:
        ImportError: scikit-image is not installed.
    """
    lab = _skimage_color().rgb2lab(tensor2im(image_tensor))
    if mc_only or to_norm:
        lab[:, :, 0] = lab[:, :, 0] - 50
    if to_norm and not mc_only:
        lab = lab / 100.0
    return np2tensor(lab)


def tensorlab2tensor(lab_tensor: Tensor, return_inbnd: bool = False) -> Tensor | tuple[Tensor, Any]:
    """Turn what :func:`tensor2tensorlab` returned with ``to_norm=True`` back into RGB in [-1, 1].

    With `return_inbnd` also a mask (1, 1, H, W): 1 where the colour lies within what RGB can show,
    told by turning it back into Lab and comparing within 2 units.

    Quirk kept: only the first image of the batch is taken.

    Raises:
        ImportError: scikit-image is not installed.
    """
    color = _skimage_color()
    lab = tensor2np(lab_tensor) * 100.0
    lab[:, :, 0] = lab[:, :, 0] + 50
    with warnings.catch_warnings():
        # A colour that RGB cannot show is what `return_inbnd` is there to report. The original
        # switches off every warning of the process, for good.
        warnings.simplefilter("ignore", UserWarning)
        rgb = 255.0 * np.clip(color.lab2rgb(lab.astype("float")), 0, 1)
    if not return_inbnd:
        return im2tensor(rgb)
    lab_back = color.rgb2lab(rgb.astype("uint8"))
    within = np.isclose(lab_back, lab, atol=2.0).all(axis=2)
    return im2tensor(rgb), np2tensor(1.0 * within[:, :, np.newaxis])


def _skimage_color() -> Any:
    try:
        from skimage import color
    except ImportError as error:
        raise _scikit_image_is_missing() from error
    return color


def _scikit_image_is_missing() -> ImportError:
    return ImportError('Lab colours and SSIM need scikit-image: pip install "lpips-fast[compat]"')


# ------------------------------------------------------------------- scoring of rankings


def voc_ap(rec: Any, prec: Any, use_07_metric: bool = False) -> Any:
    """Average precision by the rules of PASCAL VOC, from recall and precision of equal length.

    Args:
        rec: recall, ascending.
        prec: precision at each recall.
        use_07_metric: the mean of the best precision at the eleven recalls 0, 0.1, … 1 (VOC 2007)
            instead of the area under the precision envelope.

    Quirk kept: the eleven recalls are those of ``numpy.arange``, so that the fourth is
    0.30000000000000004 and a recall of exactly 0.3 does not reach it.
    """
    if use_07_metric:
        average = 0.0
        for threshold in np.arange(0.0, 1.1, 0.1):
            reached = rec >= threshold
            average = average + (np.max(prec[reached]) if np.any(reached) else 0) / 11.0
        return average

    recall = np.concatenate(([0.0], rec, [1.0]))
    precision = np.concatenate(([0.0], prec, [0.0]))
    # The envelope: at each recall the best precision there or at any higher recall.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1])
    return np.sum((recall[steps + 1] - recall[steps]) * envelope[steps + 1])


# ----------------------------------------------------------- training on human judgements


class Dist2LogitLayer(nn.Module):
    """From two distances to the probability that people find the second one the closer.

    Three 1x1 convolutions on ``(d0, d1, d0 - d1, d0 / (d1 + eps), d1 / (d0 + eps))``. The keys of
    the state dict are those of the original: ``model.0``, ``model.2``, ``model.4``.

    Args:
        chn_mid: channels of the hidden layers.
        use_sigmoid: end in a sigmoid, in [0, 1]; otherwise return the logit.
    """

    def __init__(self, chn_mid: int = 32, use_sigmoid: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(5, chn_mid, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(chn_mid, chn_mid, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(chn_mid, 1, 1),
        ]
        if use_sigmoid:
            layers.append(nn.Sigmoid())
        self.model = nn.Sequential(*layers)

    def forward(self, d0: Tensor, d1: Tensor, eps: float = 0.1) -> Tensor:
        """Take distances (N, 1, H, W) each; return (N, 1, H, W)."""
        features = (d0, d1, d0 - d1, d0 / (d1 + eps), d1 / (d0 + eps))
        return self.model(torch.cat(features, dim=1))


class BCERankingLoss(nn.Module):
    """Binary cross entropy between :class:`Dist2LogitLayer` and what people chose.

    The keys of the state dict are those of the original: ``net.model.*``. Quirk kept: after each
    call the prediction is left in the attribute `logit`, though it is a probability.
    """

    logit: Tensor

    def __init__(self, chn_mid: int = 32) -> None:
        super().__init__()
        self.net = Dist2LogitLayer(chn_mid=chn_mid)
        self.loss = nn.BCELoss()

    def forward(self, d0: Tensor, d1: Tensor, judge: Tensor) -> Tensor:
        """Return the mean loss.

        Args:
            d0: distance of the first choice to the reference, (N, 1, H, W).
            d1: distance of the second choice, likewise.
            judge: what people chose, (N, 1, H, W), from -1 (all the first) to 1 (all the second).
        """
        preferred = (judge + 1.0) / 2.0
        self.logit = self.net(d0, d1)
        return self.loss(self.logit, preferred)


# ------------------------------------------------------- classical distances in LPIPS's place


class FakeNet(nn.Module):
    """A distance without weights that stands where an LPIPS model stands.

    Args:
        use_gpu: leave the result on the device of the inputs; ``False``: on the CPU. The original
            calls ``.cuda()`` instead, and so its default fails on a machine without a GPU.
        colorspace: ``"Lab"`` or ``"RGB"``.

    Raises:
        ValueError: any other colour space; the original returns ``None`` or fails later.
    """

    def __init__(self, use_gpu: bool = True, colorspace: str = "Lab") -> None:
        super().__init__()
        if colorspace not in ("Lab", "RGB"):
            raise ValueError(f"colorspace is {colorspace!r}, expected 'Lab' or 'RGB'")
        self.use_gpu = use_gpu
        self.colorspace = colorspace

    def _result(self, values: list[Any], like: Tensor) -> Tensor:
        return torch.tensor(
            [float(value) for value in values],
            dtype=torch.float32,
            device=like.device if self.use_gpu else "cpu",
        )


class L2(FakeNet):
    """Squared distance between images (N, 3, H, W) in [-1, 1]; one number per pair, shape (N,).

    The original takes one pair only; its result is the first of ours. Quirks kept: "RGB" is the
    mean squared difference of the tensors and differentiable, whatever `use_gpu`; "Lab" is
    :func:`l2` with a range of 100, which halves it, and has no gradient.
    """

    def forward(self, in0: Tensor, in1: Tensor, retPerLayer: Any = None) -> Tensor:
        """Compare the pairs; `retPerLayer` is taken and not used, as in the original."""
        _check_pairs(in0, in1)
        if self.colorspace == "RGB":
            # One dimension after the other: the order in which the original rounds.
            return ((in0 - in1) ** 2).mean(dim=1).mean(dim=1).mean(dim=1)
        return self._result([l2(*_lab(*pair), range=100.0) for pair in _pairs(in0, in1)], in0)


class DSSIM(FakeNet):
    """Structural dissimilarity of images (N, 3, H, W) in [-1, 1]; one number per pair, (N,).

    The original takes one pair only, and no longer runs on scikit-image 0.18 or later. Quirks kept:
    images pass through 8 bits; "Lab" uses a data range of 100 for all three channels; there is no
    gradient.
    """

    def forward(self, in0: Tensor, in1: Tensor, retPerLayer: Any = None) -> Tensor:
        """Compare the pairs; `retPerLayer` is taken and not used, as in the original."""
        _check_pairs(in0, in1)
        if self.colorspace == "RGB":
            values = [
                dssim(1.0 * tensor2im(one), 1.0 * tensor2im(other), range=255.0)
                for one, other in _pairs(in0, in1)
            ]
        else:
            values = [dssim(*_lab(*pair), range=100.0) for pair in _pairs(in0, in1)]
        return self._result(values, in0)


def _check_pairs(in0: Tensor, in1: Tensor) -> None:
    if in0.ndim != 4 or in0.shape != in1.shape:
        raise ValueError(
            f"expected two image batches of one shape (N, 3, H, W), "
            f"got {tuple(in0.shape)} and {tuple(in1.shape)}"
        )


def _pairs(in0: Tensor, in1: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(in0.detach().split(1), in1.detach().split(1), strict=True))


def _lab(one: Tensor, other: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return (
        tensor2np(tensor2tensorlab(one, to_norm=False)),
        tensor2np(tensor2tensorlab(other, to_norm=False)),
    )


def print_network(net: nn.Module) -> None:
    """Print a network and its number of parameters."""
    print("Network", net)
    print(f"Total number of parameters: {sum(p.numel() for p in net.parameters())}")
