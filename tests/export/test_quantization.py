from __future__ import annotations

import sys

import parity
import pytest
import torch

import lpips_fast
from lpips_fast.export.exported import load_exported
from lpips_fast.export.exporters import ExportError
from lpips_fast.export.quantization import (
    LARGEST_ERROR,
    SMALLEST_RANK_CORRELATION,
    QuantizationReport,
    QuantizationWarning,
    graded_distortions,
    quantize,
)

pytestmark = pytest.mark.export_runtime("export")


def some_images(count: int, size: int = 48) -> torch.Tensor:
    seed = torch.seed()
    print(f"seed {seed}")
    return parity.image_pair(count, size, size, torch.float32, seed)[0]


@pytest.fixture(scope="module")
def quantized(exportable, tmp_path_factory) -> QuantizationReport:
    path = tmp_path_factory.mktemp("int8") / "m.onnx"
    return quantize(exportable, path, some_images(9))


def test_is_smaller_and_near(quantized):
    # Noise through a random network: photographs have 0.998 and more.
    assert quantized.rank_correlation > 0.95
    assert quantized.largest_error < LARGEST_ERROR
    assert quantized.is_near == (quantized.rank_correlation >= SMALLEST_RANK_CORRELATION)
    assert quantized.bytes_int8 < quantized.bytes_float32 / 3
    assert quantized.path.stat().st_size == quantized.bytes_int8
    assert quantized.record.quantized
    assert (quantized.calibrated_on, quantized.held_out, quantized.pairs) == (7, True, 2 * 14)


def test_identical_images_give_exactly_zero(quantized):
    exported = load_exported(quantized.path)
    for size in (31, 48, 67):
        image = some_images(3, size)
        assert torch.equal(exported(image, image), torch.zeros(3))
        zeros = torch.zeros_like(image)
        assert torch.equal(exported(zeros, zeros), torch.zeros(3))


def test_is_near_the_model_on_fresh_pairs_of_other_sizes(exportable, quantized):
    exported = load_exported(quantized.path)
    assert exported.record.quantized
    for image in (some_images(1, 40), some_images(1, 63)):
        distorted = graded_distortions(image)
        reference = image.expand_as(distorted).contiguous()
        expected = exportable(reference, distorted).flatten()
        found = exported(reference, distorted)
        assert not torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.02)


def test_convolutions_are_integers_and_the_tail_is_not(quantized):
    import onnx

    graph = onnx.load(quantized.path).graph
    made_by = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Conv":
            sources = [made_by[name].op_type for name in node.input]
            assert sources == ["DequantizeLinear"] * 3
        if node.op_type in ("Sqrt", "Div", "Sub", "Pow", "ReduceSum", "ReduceMean"):
            made_here = [made_by[name].op_type for name in node.output]
            assert "QuantizeLinear" not in made_here
    joined = [n for n in graph.node if n.op_type == "Concat" and "in0" in n.input]
    assert [list(n.input) for n in joined] == [["in0", "in1"]]
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}


def test_dynamic_needs_no_calibration(tmp_path):
    weights = parity.trunk_weights("alex")
    model = lpips_fast.LPIPS(net="alex", weights=weights, layers=(0, 1), verbose=False)
    report = quantize(model, tmp_path / "m.onnx", some_images(1, 40), method="dynamic")
    assert report.calibrated_on == 0
    assert report.bytes_int8 < report.bytes_float32 / 3
    image = some_images(2, 40)
    assert torch.equal(load_exported(tmp_path / "m.onnx")(image, image), torch.zeros(2))


@pytest.mark.export_runtime("openvino")
def test_squeezenet_maps_in_openvino(tmp_path):
    weights = parity.trunk_weights("squeeze")
    model = lpips_fast.LPIPS(
        net="squeeze", weights=weights, spatial=True, layers=(0, 1, 2), verbose=False
    )
    images = some_images(3, 40)
    report = quantize(model, tmp_path / "m.xml", images, normalize=True, dynamic="batch")
    assert not report.held_out
    exported = load_exported(tmp_path / "m.xml")
    assert exported.record == report.record
    unit = images / 2 + 0.5
    assert torch.equal(exported(unit, unit), torch.zeros(3, 1, 40, 40))
    expected = model(images, images.roll(1, 0))
    assert (exported(unit, unit.roll(1, 0)) - expected).abs().mean() < 0.05 * expected.mean()


def test_warns_where_the_error_is_not_small(exportable, tmp_path):
    # Ranges of a grey image: everything brighter is clipped in every layer of any other. Measured
    # on the fourth image, which is held out.
    images = torch.zeros(4, 3, 48, 48)
    images[3] = some_images(1)[0]
    with pytest.warns(QuantizationWarning, match=r"not near those of float32: the rank|the larg"):
        report = quantize(exportable, tmp_path / "m.onnx", images, dynamic="none")
    assert not report.is_near


def test_distortions_are_graded():
    image = some_images(1)
    distorted = graded_distortions(image)
    assert distorted.shape == (14, 3, 48, 48)
    assert distorted.abs().max() <= 1
    away = (distorted - image).pow(2).mean((1, 2, 3))
    for first, last in ((0, 5), (5, 8), (8, 11), (11, 14)):
        kind = away[first:last]
        assert bool((kind.diff() > 0).all())


@pytest.mark.parametrize(
    ("name", "images", "options", "says"),
    [
        ("m.onnx", torch.zeros(3, 48, 48), {}, r"images is \(3, 48, 48\), expected a tensor"),
        ("m.onnx", [1, 2], {}, "images is list, expected a tensor"),
        ("m.onnx", torch.zeros(0, 3, 48, 48), {}, "holds no images"),
        ("m.onnx", torch.full((1, 3, 48, 48), 7.0), {}, r"from 7 to 7, expected \[-1, 1\]"),
        ("m.onnx", torch.zeros(1, 3, 48, 48).double(), {}, "torch.float64, expected float32"),
        ("m.onnx", torch.zeros(1, 3, 20, 20), {}, "too small for trunk 'alex'"),
        ("m.onnx", torch.zeros(1, 3, 48, 48), {"method": "qat"}, "unknown method 'qat'"),
        ("m.ts", torch.zeros(1, 3, 48, 48), {}, r"8-bit integers: write \.onnx"),
        ("m.xml", torch.zeros(1, 3, 48, 48), {"method": "dynamic"}, "write .onnx with this"),
    ],
)
def test_bad_input(exportable, tmp_path, name, images, options, says):
    with pytest.raises(ValueError, match=says):
        quantize(exportable, tmp_path / name, images, **options)


def test_missing_folder_and_package(exportable, tmp_path, monkeypatch):
    images = torch.zeros(1, 3, 48, 48)
    with pytest.raises(ExportError, match="its folder does not exist"):
        quantize(exportable, tmp_path / "none" / "m.onnx", images)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"quantisation needs onnxruntime: pip install"):
        quantize(exportable, tmp_path / "m.onnx", images)
