"""8-bit integers in the trunk, for the CPU: smaller files, faster convolutions, and what it costs.

The trunk's convolutions, ReLUs and poolings are quantised after training: weights by output
channel, activations by tensor (Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference", CVPR 2018). Scaling, the normalisation and everything
behind it stay float32: 1e-10 is added to norms, and a difference of near features is small beside
them. Identical images become identical integers, and their distance is exactly 0.

Two methods, both ONNX Runtime's:

- ``"static"``: the ranges of activations are fixed, from calibration images. It is the fast one.
- ``"dynamic"``: ranges are measured at every call, without calibration. That pays for large matrix
  products; for convolutions it costs more than it saves, and the file is slower than in float32. It
  is here to be compared. Torch's own dynamic quantisation does not apply at all: it knows linear
  and recurrent layers, and a trunk has neither.

An 8-bit distance is an approximation of LPIPS. How near it is depends on trunk and images, so that
:func:`quantize` measures it, and warns where it is not near.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..analysis.parts import rank_correlation
from ..lpips import LPIPS
from .exported import Exported, load_exported
from .exporters import (
    RECORD_KEY,
    Dynamic,
    Record,
    export_onnx,
    format_of,
    onnx_to_openvino,
    require,
)
from .files import ExportError, check_target, copy_whole

__all__ = ["Method", "QuantizationReport", "QuantizationWarning", "graded_distortions", "quantize"]

Method = Literal["static", "dynamic"]

#: Errors up to here are small: most pairs keep their order, and the second digit.
SMALLEST_RANK_CORRELATION = 0.99
LARGEST_ERROR = 0.02

# Every so many images one is kept from calibration, to measure on.
_HELD_OUT_EVERY = 4
_TIMINGS = 7


class QuantizationWarning(UserWarning):
    """The distances of a quantised file are not near those of float32."""


@dataclass(frozen=True)
class QuantizationReport:
    """What quantisation saved and what it cost, measured.

    Attributes:
        path: of the quantised file.
        record: how it was made.
        method: ``"static"`` or ``"dynamic"``.
        calibrated_on: number of images that set the ranges, 0 for ``"dynamic"``.
        held_out: whether the errors are of other images than those.
        pairs: number of pairs that the errors are of, each an image and a graded distortion of it.
        bytes_float32, bytes_int8: sizes of the files (of OpenVINO's, both together).
        ms_float32, ms_int8: time of one pair of the calibration images' size, medians, in the
            same runtime.
        rank_correlation: Spearman's, of the pairs' distances in float32 and in 8 bits.
        largest_error, mean_error: absolute, of the distance.
        mean_distance: of the pairs, in float32.
    """

    path: Path
    record: Record
    method: Method
    calibrated_on: int
    held_out: bool
    pairs: int
    bytes_float32: int
    bytes_int8: int
    ms_float32: float
    ms_int8: float
    rank_correlation: float
    largest_error: float
    mean_error: float
    mean_distance: float

    @property
    def is_near(self) -> bool:
        """Whether the errors are small enough to go without a warning."""
        return (
            self.rank_correlation >= SMALLEST_RANK_CORRELATION
            and self.largest_error <= LARGEST_ERROR
        )

    def __str__(self) -> str:
        unseen = "images not calibrated on" if self.held_out else "the calibration images"
        return (
            f"int8 ({self.method}): {self.bytes_int8 / 1e6:.2f} MB, float32 "
            f"{self.bytes_float32 / 1e6:.2f} MB; {self.ms_int8:.2f} ms a pair, float32 "
            f"{self.ms_float32:.2f} ms\n"
            f"{self.pairs} pairs of {unseen}, mean distance {self.mean_distance:.3g}: rank "
            f"correlation {self.rank_correlation:.4f}, error {self.mean_error:.2g} on average, "
            f"{self.largest_error:.2g} at most"
        )


def graded_distortions(image: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """An image distorted in four ways, each by several strengths: realistic pairs with it.

    Args:
        image: (1, 3, H, W) in [-1, 1].
        generator: of the noise.

    Returns:
        (14, 3, H, W): noise of deviation 0.02 to 0.4, box blur of 3, 5 and 9 pixels, shifts of 1, 2
        and 4 pixels, and contrast of 0.9, 0.7 and 0.4.

    >>> graded_distortions(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([14, 3, 32, 32])
    """

    def blurred(radius: int) -> Tensor:
        padded = F.pad(image, (radius,) * 4, mode="replicate")
        return F.avg_pool2d(padded, 2 * radius + 1, stride=1)

    noise = torch.randn(image.shape, generator=generator)
    return torch.cat(
        [
            *((image + s * noise).clamp(-1, 1) for s in (0.02, 0.05, 0.1, 0.2, 0.4)),
            *(blurred(radius) for radius in (1, 2, 4)),
            *(image.roll(pixels, dims=3) for pixels in (1, 2, 4)),
            *(image * contrast for contrast in (0.9, 0.7, 0.4)),
        ]
    )


def quantize(
    model: LPIPS,
    path: str | os.PathLike[str],
    images: Tensor,
    *,
    method: Method = "static",
    dynamic: Dynamic = "all",
    normalize: bool = False,
) -> QuantizationReport:
    """Writes a model with its trunk in 8-bit integers, and measures it against float32.

    Args:
        model: a float32 model. It is left as it is.
        path: of the file: ``.onnx``, or for a static one ``.xml`` of OpenVINO; its folder exists.
        images: (N, 3, H, W) in [-1, 1] whatever ``normalize`` says, of one size: like those that
            will be compared. Of four or more every fourth is held out, to measure on.
        method: see the top of this module.
        dynamic: which axes may change, as in :func:`lpips_fast.export.export_onnx`; with
            ``"none"`` the file takes one pair of the images' size.
        normalize: the file's images are in [0, 1].

    Returns:
        Sizes, times and errors, measured.

    Warns:
        QuantizationWarning: the distances are not near those of float32.

    Raises:
        ValueError: images of another shape, too few or too small, an unknown method, or a suffix of
            a format without 8-bit integers.
        ImportError: a package is not installed.
        ExportError: the folder does not exist, or identical images do not give exactly 0.

    Example:
        >>> report = quantize(model, "lpips_int8.onnx", photos)      # doctest: +SKIP
        >>> report.bytes_int8 < report.bytes_float32 / 3             # doctest: +SKIP
        True
    """
    target, name = Path(path), format_of(path)
    if method not in get_args(Method):
        raise ValueError(
            f"unknown method {method!r}; expected one of {', '.join(get_args(Method))}"
        )
    if name not in ("onnx", "openvino") or (name == "openvino" and method == "dynamic"):
        raise ValueError(
            f"cannot write {target} in 8-bit integers: write .onnx"
            + (", or .xml with the static method" if name != "openvino" else " with this method")
        )
    _check_images(images)
    check_target(target, target.suffix.lower())
    require("onnxruntime", "export", "quantisation")
    if name == "openvino":
        require("openvino", "openvino", "writing OpenVINO's files")
    held_out = len(images) >= _HELD_OUT_EVERY
    measured_on = images[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY] if held_out else images
    seen = torch.ones(len(images), dtype=torch.bool)
    if held_out:
        seen[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY] = False

    def as_the_file_takes(image: Tensor) -> Tensor:
        return (image + 1) / 2 if normalize else image

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "float32.onnx"
        size = (images.shape[2], images.shape[3])
        record = export_onnx(model, source, image_size=size, dynamic=dynamic, normalize=normalize)
        made = Path(folder) / "int8.onnx"
        _write(source, made, as_the_file_takes(images[seen]), method)
        record = replace(record, quantized=True)
        _sign(made, record)
        if name == "openvino":
            onnx_to_openvino(made, target, record)
            onnx_to_openvino(source, source.with_suffix(".xml"), replace(record, quantized=False))
            source = source.with_suffix(".xml")
        else:
            copy_whole(made, target)
        full, small = load_exported(source), load_exported(target)
        found, expected = _distances(full, small, measured_on, as_the_file_takes)
        times = _times(full, small, as_the_file_takes(images[:1]))
        report = QuantizationReport(
            path=target,
            record=record,
            method=method,
            calibrated_on=int(seen.sum()) if method == "static" else 0,
            held_out=held_out or method == "dynamic",
            pairs=len(expected),
            bytes_float32=_bytes(source),
            bytes_int8=_bytes(target),
            ms_float32=times[0],
            ms_int8=times[1],
            rank_correlation=rank_correlation(expected.tolist(), found.tolist()),
            largest_error=(found - expected).abs().max().item(),
            mean_error=(found - expected).abs().mean().item(),
            mean_distance=expected.mean().item(),
        )
    if not report.is_near:
        warnings.warn(_what_is_wrong(report), QuantizationWarning, stacklevel=2)
    return report


def _check_images(images: Any) -> None:
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != 3:
        what = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images is {what}, expected a tensor (N, 3, H, W) in [-1, 1]")
    if len(images) == 0:
        raise ValueError("images holds no images, expected at least one to calibrate on")
    if images.dtype != torch.float32:
        raise ValueError(f"images is {images.dtype}, expected float32 in [-1, 1]")
    if not bool(torch.isfinite(images).all()) or images.abs().max() > 1.01:
        raise ValueError(
            f"images has values from {images.min().item():.4g} to {images.max().item():.4g}, "
            "expected [-1, 1]"
        )


def _what_is_wrong(report: QuantizationReport) -> str:
    wrong = []
    if not report.rank_correlation >= SMALLEST_RANK_CORRELATION:
        told = "none" if math.isnan(report.rank_correlation) else f"{report.rank_correlation:.3f}"
        wrong.append(f"the rank correlation is {told}, below {SMALLEST_RANK_CORRELATION}")
    if not report.largest_error <= LARGEST_ERROR:
        wrong.append(f"the largest error is {report.largest_error:.3g}, above {LARGEST_ERROR}")
    return (
        f"the 8-bit distances of {report.path} are not near those of float32: "
        f"{' and '.join(wrong)}, over {report.pairs} pairs; calibrate on more images that are like "
        "yours, or stay with float32"
    )


# ------------------------------------------------------------------------------------ the writing


def _write(source: Path, target: Path, images: Tensor, method: Method) -> None:
    """The quantised graph, of standard operators."""
    onnx = require("onnx", "export", "quantisation")
    require("onnxruntime", "export", "quantisation")
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Pairs(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            others = images.roll(-1, dims=0)  # both images of a pair go through the same trunk
            self.pairs = iter(zip(images[::2].split(1), others[::2].split(1)))

        def get_next(self) -> dict[str, Any] | None:
            pair = next(self.pairs, None)
            return None if pair is None else dict(zip(("in0", "in1"), (x.numpy() for x in pair)))

    prepared = source.with_name("prepared.onnx")
    with _quietly():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        if method == "dynamic":
            quantization.quantize_dynamic(
                str(prepared),
                str(target),
                op_types_to_quantize=["Conv"],
                weight_type=quantization.QuantType.QUInt8,
            )
            return
        # All of the trunk, so that integers flow from convolution to convolution; the images
        # themselves are joined in float32, since their scale is not yet that of the trunk.
        graph = onnx.load(str(prepared)).graph
        images_joined = [n.name for n in graph.node if n.op_type == "Concat" and "in0" in n.input]
        quantization.quantize_static(
            str(prepared),
            str(target),
            Pairs(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Relu", "MaxPool", "Concat", "Pad"],
            nodes_to_exclude=images_joined,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
        )


def _sign(path: Path, record: Record) -> None:
    onnx = require("onnx", "export", "quantisation")
    graph = onnx.load(str(path))
    graph.producer_name = "lpips_fast"
    del graph.metadata_props[:]
    onnx.helper.set_model_props(graph, {RECORD_KEY: record.to_json()})
    used = {node.domain for node in graph.graph.node}
    assert used <= {"", "ai.onnx"}, used
    # The quantiser names ONNX Runtime's own domain, of which nothing is left.
    kept = [entry for entry in graph.opset_import if entry.domain in ("", "ai.onnx")]
    del graph.opset_import[:]
    graph.opset_import.extend(kept)
    onnx.checker.check_model(graph)
    onnx.save_model(graph, str(path))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The quantiser writes advice to the root logger, and progress to the terminal."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ---------------------------------------------------------------------------------- the measuring


def _distances(
    full: Exported, small: Exported, images: Tensor, as_the_file_takes: Any
) -> tuple[Tensor, Tensor]:
    """Distances of graded pairs, in 8 bits and in float32; of maps, their means."""
    found, expected = [], []
    generator = torch.Generator().manual_seed(0)  # the same pairs for every model and method
    for image in images.split(1):
        reference = as_the_file_takes(image)
        for distorted in graded_distortions(image, generator).split(1):
            pair = (reference, as_the_file_takes(distorted))
            found.append(small(*pair).mean())
            expected.append(full(*pair).mean())
        zero = small(reference, reference)
        if bool((zero != 0).any()):
            raise ExportError(f"{small.path} gives {zero.abs().max():.3g} for identical images")
    return torch.stack(found), torch.stack(expected)


def _times(full: Exported, small: Exported, image: Tensor) -> tuple[float, float]:
    """Milliseconds of a pair, in turn, so that other work on the machine slows both."""
    turns: list[tuple[float, float]] = []
    for _ in range(_TIMINGS + 1):
        took = []
        for file in (full, small):
            start = time.perf_counter()
            file(image, image)
            took.append(1e3 * (time.perf_counter() - start))
        turns.append((took[0], took[1]))
    return median(t[0] for t in turns[1:]), median(t[1] for t in turns[1:])


def _bytes(path: Path) -> int:
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    return sum(file.stat().st_size for file in files)
