from __future__ import annotations

import parity
import pytest
import torch

import lpips_fast
from lpips_fast import export
from lpips_fast.export import exporters
from lpips_fast.export.exported import check_exported, load_exported
from lpips_fast.export.portable import PortableLPIPS


@pytest.fixture(scope="module")
def file(exportable, tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "m.pt2"
    export.export_torch(exportable, path, image_size=40, dynamic="none")
    return path


def test_returns_the_largest_error(exportable, file):
    error = check_exported(exportable, file)
    assert 0 <= error <= 1e-5
    assert check_exported(exportable, file, seed=1) == check_exported(exportable, file, seed=1)


def test_looks_at_other_sizes_where_they_may_change(tmp_path):
    weights = parity.trunk_weights("squeeze")
    model = lpips_fast.LPIPS(net="squeeze", weights=weights, layers=(0, 1), verbose=False)
    path = tmp_path / "m.ts"
    export.export_torchscript(model, path)

    # Right for the size that was traced, and for no other.
    class Wrong(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.portable = PortableLPIPS(model)

        def forward(self, in0, in1):
            return self.portable(in0, in1) * (in0.shape[2] / 64)

    image = torch.zeros(2, 3, 64, 64)
    record = load_exported(path).record
    assert check_exported(model, path) <= 1e-5
    torch.jit.save(
        torch.jit.trace(Wrong(), (image, image)),
        str(path),
        _extra_files={exporters.RECORD_KEY: record.to_json()},
    )
    with pytest.raises(export.ExportError, match="from the model"):
        check_exported(model, path)


def test_leaves_the_model_as_it_was(exportable, file):
    exportable.train()
    check_exported(exportable, file)
    assert exportable.training
    exportable.eval()


def test_raises_beyond_the_tolerance(exportable, file):
    weights = parity.trunk_weights("alex")
    weights["features.10.weight"] = 1.01 * weights["features.10.weight"].roll(1, dims=0)
    other = lpips_fast.LPIPS(net="alex", weights=weights, verbose=False)
    with pytest.raises(export.ExportError, match=r"from the model, expected at most 1e-05"):
        check_exported(other, file)
    assert check_exported(other, file, tolerance=1.0) > 1e-5


def test_raises_where_identical_images_differ(exportable, tmp_path):
    class Offset(torch.nn.Module):
        def forward(self, in0, in1):
            return (in0 - in1).mean((1, 2, 3)) + 1e-7

    record = export.export_torchscript(exportable, tmp_path / "m.ts")
    image = torch.zeros(2, 3, 64, 64)
    torch.jit.save(
        torch.jit.trace(Offset(), (image, image)),
        str(tmp_path / "m.ts"),
        _extra_files={exporters.RECORD_KEY: record.to_json()},
    )
    with pytest.raises(export.ExportError, match="1e-07 for identical images"):
        check_exported(exportable, tmp_path / "m.ts", tolerance=100)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"net": "squeeze"}, "net='alex', but this one has net='squeeze'"),
        ({"net": "alex", "version": "0.0"}, "version='0.1'"),
        ({"net": "alex", "layers": (0, 1)}, r"layers=\(0, 1, 2, 3, 4\)"),
    ],
)
def test_refuses_another_model(file, options, says):
    other = lpips_fast.LPIPS(pnet_rand=True, verbose=False, **options)
    with pytest.raises(export.ExportError, match=says):
        check_exported(other, file)


def test_refuses_what_it_cannot_run(tmp_path):
    with pytest.raises(export.ExportError, match="there is no file"):
        load_exported(tmp_path / "none.ts")
    with pytest.raises(export.ExportError, match="Apple devices alone"):
        load_exported(tmp_path / "m.mlpackage")
    with pytest.raises(ValueError, match="does not say its format"):
        load_exported(tmp_path / "m.h5")


@pytest.mark.parametrize(
    "suffix",
    [
        *(".pt2", ".ts"),
        pytest.param(".onnx", marks=pytest.mark.export_runtime("export")),
        pytest.param(".xml", marks=pytest.mark.export_runtime("openvino")),
    ],
)
def test_refuses_a_damaged_file(tmp_path, suffix):
    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"not a model")
    with pytest.raises(export.ExportError, match="cannot be read") as error:
        load_exported(path)
    assert "\n" not in str(error.value)


@pytest.mark.export_runtime("openvino")
def test_signals_arrive_after_a_network_went_on_another_thread(tmp_path, run_python):
    """As garbage collection has it: OpenVINO takes a signal stack with it, if it is let."""
    import openvino
    from openvino import opset13 as operators

    images = [operators.parameter([1, 3, 40, 40], name=name) for name in ("in0", "in1")]
    for image, name in zip(images, ("in0", "in1")):
        image.output(0).set_names({name})
    network = openvino.Model([operators.subtract(*images)], images, "difference")
    weights = parity.trunk_weights("alex")
    model = lpips_fast.LPIPS(net="alex", weights=weights, layers=(0,), verbose=False)
    record = export.export_torchscript(model, tmp_path / "m.ts")
    network.set_rt_info(record.to_json(), [exporters.RECORD_KEY])
    openvino.save_model(network, str(tmp_path / "m.xml"))
    text = run_python(
        f"""
        import faulthandler, signal, threading
        import torch
        from lpips_fast.export.exported import load_exported

        faulthandler.enable()  # handlers of Python run on a signal stack, if there is one
        signal.signal(signal.SIGUSR1, lambda *_: print("arrived"))
        held = [load_exported({str(tmp_path / "m.xml")!r})]
        held[0](torch.zeros(1, 3, 40, 40), torch.zeros(1, 3, 40, 40))
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        signal.raise_signal(signal.SIGUSR1)
        """
    )
    assert text == "arrived\n"


def test_refuses_a_file_of_others(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "m.ts"))
    with pytest.raises(export.ExportError, match="was not written by lpips_fast"):
        load_exported(tmp_path / "m.ts")
