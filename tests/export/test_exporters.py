from __future__ import annotations

import sys
from pathlib import Path

import parity
import pytest
import torch

import lpips_fast
from lpips_fast import export
from lpips_fast.export import exporters
from lpips_fast.export.exported import check_exported, load_exported

TOLERANCE = 1e-5


def fresh_pair(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    seed = torch.seed()
    print(f"seed {seed}")
    return parity.image_pair(shape[0], shape[1], shape[2], torch.float32, seed)


def squeeze(**options) -> lpips_fast.LPIPS:
    weights = parity.trunk_weights("squeeze")
    return lpips_fast.LPIPS(net="squeeze", weights=weights, verbose=False, **options)


@pytest.fixture(scope="module")
def shallow() -> lpips_fast.LPIPS:
    """Two of AlexNet's layers: quick to export."""
    weights = parity.trunk_weights("alex")
    return lpips_fast.LPIPS(net="alex", weights=weights, layers=(0, 1), verbose=False)


def assert_same(exported, model, pair, normalize: bool = False) -> None:
    expected = model(*pair, normalize=normalize).detach()
    found = exported(*pair)
    torch.testing.assert_close(found, expected.view_as(found), rtol=TOLERANCE, atol=TOLERANCE)


# ------------------------------------------------------------------------------------------- ONNX


@pytest.mark.export_runtime("export")
def test_onnx_takes_any_batch_height_and_width(exportable, onnx_file):
    exported = load_exported(onnx_file)
    for shape in ((1, 31, 31), (1, 64, 64), (3, 67, 83), (2, 100, 33)):
        assert_same(exported, exportable, fresh_pair(shape))


@pytest.mark.export_runtime("export")
def test_onnx_gives_exactly_zero_for_identical_images(onnx_file):
    exported = load_exported(onnx_file)
    for shape in ((1, 31, 31), (3, 67, 83), (4, 64, 64)):
        image, _ = fresh_pair(shape)
        assert torch.equal(exported(image, image), torch.zeros(shape[0]))
        zeros = torch.zeros_like(image)
        assert torch.equal(exported(zeros, zeros), torch.zeros(shape[0]))


@pytest.mark.export_runtime("export")
def test_onnx_is_finite_on_zero_images_and_symmetric(exportable, onnx_file):
    exported = load_exported(onnx_file)
    image, _ = fresh_pair((2, 48, 48))
    pair = torch.zeros_like(image), image
    assert_same(exported, exportable, pair)
    assert torch.equal(exported(*pair), exported(*reversed(pair)))


@pytest.mark.export_runtime("export")
def test_onnx_holds_standard_operators_and_nothing_of_this_machine(onnx_file):
    import onnx

    graph = onnx.load(onnx_file)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    assert not graph.functions
    assert [opset.domain for opset in graph.opset_import] == [""]
    assert not any(i.external_data for i in graph.graph.initializer)
    assert [i.name for i in graph.graph.input] == ["in0", "in1"]
    assert [o.name for o in graph.graph.output] == ["distance"]
    written = onnx_file.read_bytes()
    for trace in (b"site-packages", b".py", str(Path(lpips_fast.__file__).parent).encode()):
        assert trace not in written


@pytest.mark.export_runtime("export")
def test_onnx_of_one_size_of_maps_in_the_unit_range(tmp_path):
    model = squeeze(spatial=True)
    record = export.export_onnx(
        model, tmp_path / "m.onnx", image_size=(40, 51), batch=2, dynamic="none", normalize=True
    )
    assert (record.image_size, record.batch, record.output) == ((40, 51), 2, "distance_map")
    exported = load_exported(tmp_path / "m.onnx")
    in0, in1 = (x / 2 + 0.5 for x in fresh_pair((2, 40, 51)))
    assert exported(in0, in1).shape == (2, 1, 40, 51)
    assert_same(exported, model, (in0, in1), normalize=True)
    assert exported.record == record


@pytest.mark.export_runtime("export")
def test_onnx_with_the_real_weights_gives_the_published_numbers(
    real_weights, example_images, tmp_path
):
    from lpips_fast.images.reading import read_image

    model = lpips_fast.LPIPS(net="alex", weights=real_weights, verbose=False)
    export.export_onnx(model, tmp_path / "m.onnx", dynamic="batch")
    images = {name: read_image(path) for name, path in example_images.items()}
    ref = images["ref"].repeat(3, 1, 1, 1)
    found = load_exported(tmp_path / "m.onnx")(
        ref, torch.cat([images["p0"], images["p1"], images["ref"]])
    )
    assert [round(x, 3) for x in found.tolist()] == [0.722, 0.138, 0.0]


# ------------------------------------------------------------------------------- torch's own files


@pytest.mark.parametrize(
    "options", [{"spatial": True}, {"lpips": False, "layers": (0, 2)}], ids=str
)
def test_program_is_dynamic_and_has_torch_operators_alone(options):
    model = squeeze(**options)
    program = export.export_program(model)
    namespaces = {node.target.namespace for node in program.graph.nodes if _is_operator(node)}
    assert namespaces == {"aten"}
    for shape in ((1, 33, 33), (3, 50, 67)):
        assert_same(program.module(), model, fresh_pair(shape))


def _is_operator(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def test_fused_program_keeps_the_kernel(exportable):
    program = export.export_program(exportable, fused=True)
    targets = [str(node.target) for node in program.graph.nodes if _is_operator(node)]
    assert targets.count("lpips_fast.distance.default") == 5
    assert_same(program.module(), exportable, fresh_pair((2, 47, 60)))


def test_program_of_one_size_takes_the_smallest_images(exportable):
    program = export.export_program(exportable, image_size=31, dynamic="none")
    assert_same(program.module(), exportable, fresh_pair((1, 31, 31)))


@pytest.mark.parametrize("name", ["torch-export", "torchscript"])
def test_file_runs_without_this_package(shallow, tmp_path, run_python, name):
    path = tmp_path / f"m{export.FORMATS[name].suffix}"
    record = export.export_model(shallow, path, name)
    assert load_exported(path).record == record
    in0, in1 = fresh_pair((2, 50, 61))
    torch.save((in0, in1), tmp_path / "images.pt")
    text = run_python(
        f"""
        import sys
        sys.modules["lpips_fast"] = None
        import torch
        in0, in1 = torch.load({str(tmp_path / "images.pt")!r})
        path = {str(path)!r}
        run = torch.export.load(path).module() if path.endswith("pt2") else torch.jit.load(path)
        print(*run(in0, in1).tolist())
        """
    )
    found = torch.tensor([float(x) for x in text.split()])
    expected = shallow(in0, in1).flatten().detach()
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


# ---------------------------------------------------------------------------------- other runtimes


@pytest.mark.export_runtime("openvino")
def test_openvino(shallow, tmp_path):
    export.export_openvino(shallow, tmp_path / "m.xml")
    exported = load_exported(tmp_path / "m.xml")
    for shape in ((1, 31, 31), (3, 45, 67)):
        assert_same(exported, shallow, fresh_pair(shape))
    image, _ = fresh_pair((3, 45, 67))
    assert torch.equal(exported(image, image), torch.zeros(3))


@pytest.mark.export_runtime("coreml")
def test_coreml_is_written_in_float32(exportable, tmp_path):
    import coremltools

    record = export.export_coreml(exportable, tmp_path / "m.mlpackage", image_size=(40, 48))
    spec = coremltools.utils.load_spec(str(tmp_path / "m.mlpackage"))
    assert [i.name for i in spec.description.input] == ["in0", "in1"]
    assert [o.name for o in spec.description.output] == ["distance"]
    made = spec.description.metadata.userDefined[exporters.RECORD_KEY]
    assert export.Record.from_json(made) == record
    block = next(iter(spec.mlProgram.functions["main"].block_specializations.values()))
    types = {output.type.tensorType.dataType for op in block.operations for output in op.outputs}
    assert coremltools.proto.MIL_pb2.DataType.FLOAT32 in types
    assert coremltools.proto.MIL_pb2.DataType.FLOAT16 not in types


@pytest.mark.export_runtime("coreml")
def test_coreml_refuses_maps_of_a_dynamic_size(tmp_path):
    with pytest.raises(export.ExportError, match="dynamic='batch' or 'none'"):
        export.export_coreml(squeeze(spatial=True), tmp_path / "m.mlpackage")


# ------------------------------------------------------------------------------------- bad input


def test_unknown_formats(exportable, tmp_path):
    with pytest.raises(ValueError, match=r"unknown format 'tflite'; expected one of onnx, "):
        export.export_model(exportable, tmp_path / "m.onnx", "tflite")
    with pytest.raises(ValueError, match=r"does not say its format by its suffix"):
        export.export_model(exportable, tmp_path / "m.bin")
    with pytest.raises(ValueError, match=r"name must end in \.pt2"):
        export.export_model(exportable, tmp_path / "m.onnx", "torch-export")


def test_missing_folder(exportable, tmp_path):
    for name, kind in export.FORMATS.items():
        with pytest.raises(export.ExportError, match="its folder does not exist"):
            export.export_model(exportable, tmp_path / "none" / f"m{kind.suffix}", name)


@pytest.mark.parametrize(
    ("package", "suffix", "extra"),
    [
        ("onnx", ".onnx", "export"),
        pytest.param(
            *("onnxscript", ".onnx", "export"), marks=pytest.mark.export_runtime("export")
        ),
        ("openvino", ".xml", "openvino"),
        ("coremltools", ".mlpackage", "coreml"),
    ],
)
def test_missing_package(exportable, tmp_path, monkeypatch, package, suffix, extra):
    monkeypatch.setitem(sys.modules, package, None)
    says = rf"needs {package}: pip install \"lpips-fast\[{extra}\]\""
    with pytest.raises(ImportError, match=says):
        export.export_model(exportable, tmp_path / f"m{suffix}")


def test_wrong_arguments(exportable):
    with pytest.raises(ValueError, match=r"30x64 pixels are too small .* at least 31x31"):
        export.export_program(exportable, image_size=(30, 64))
    with pytest.raises(ValueError, match=r"image_size is 'large', expected pixels"):
        export.export_program(exportable, image_size="large")
    with pytest.raises(ValueError, match=r"dynamic is 'width', expected one of 'none'"):
        export.export_program(exportable, dynamic="width")
    with pytest.raises(ValueError, match="batch is 0"):
        export.export_program(exportable, batch=0)
    with pytest.raises(ValueError, match="opset is 11, expected 18 or later"):
        export.export_onnx(exportable, "m.onnx", opset=11)
    with pytest.raises(TypeError, match=r"expected a lpips_fast\.LPIPS to export, got Linear"):
        export.export_program(torch.nn.Linear(2, 2))


@pytest.mark.export_runtime("export")
def test_a_record_survives_its_text(exportable, onnx_file):
    record = load_exported(onnx_file).record
    assert export.Record.from_json(record.to_json()) == record
    assert str(record) == (
        "in0, in1: float32 (batch, 3, height, width) in [-1, 1], from 31 pixels a side -> "
        "distance: float32 (batch,)"
    )
    for text in ("", "[]", "{}", "3"):
        with pytest.raises(ValueError, match="no record"):
            export.Record.from_json(text)
    assert check_exported(exportable, onnx_file) <= TOLERANCE
