"""What all tests share: where weights and images are, the reference package, poisoned memory."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import parity
import pytest
import torch

import lpips_fast
import lpips_fast.export
from lpips_fast.trunk import TRUNKS, slices

REPOSITORY = Path(__file__).resolve().parents[1]

pytest_plugins = ["weight_files"]

#: What the extras for exported files install, as the marker ``export_runtime`` names them.
EXPORT_RUNTIMES = {
    "export": {"onnx", "onnxscript", "onnxruntime"},
    "openvino": {"onnx", "onnxscript", "onnxruntime", "openvino"},
    "coreml": {"coremltools"},
}


def shared_folder(name: str) -> Path | None:
    """A folder of real weights or images beside the repository; a user's clone has none."""
    folder = REPOSITORY.parent / "shared" / name
    return folder if folder.is_dir() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        for extra in export_extras(item):
            # Looked for, not imported: see the marker in pyproject.toml.
            absent = {p for p in EXPORT_RUNTIMES[extra] if importlib.util.find_spec(p) is None}
            if absent:
                reason = f"{', '.join(sorted(absent))} not installed: extra {extra}"
                item.add_marker(pytest.mark.skip(reason=reason))


def export_extras(item: pytest.Item) -> set[str]:
    """The extras whose packages a test imports, as its markers say."""
    return {mark.args[0] for mark in item.iter_markers("export_runtime")}


@pytest.fixture(scope="session")
def has_address_sanitizer() -> bool:
    """Whether the tests run under AddressSanitizer, as ``scripts/sanitize.py`` has it."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


@pytest.fixture
def usual_allocator(has_address_sanitizer: bool) -> None:
    """Skips under AddressSanitizer, which surrounds what it gives and keeps what is freed."""
    if has_address_sanitizer:
        pytest.skip("of what memory a process takes, and AddressSanitizer takes its own")


@pytest.fixture(autouse=True)
def export_runtimes_are_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Holds the marker to what it says: no other test imports such a runtime."""
    runtimes = set().union(*EXPORT_RUNTIMES.values())
    before = runtimes & sys.modules.keys()
    yield
    found = (runtimes & sys.modules.keys()) - before
    marked = set().union(*(EXPORT_RUNTIMES[extra] for extra in export_extras(request.node)))
    assert found <= marked, f"imports {sorted(found - marked)}: mark it export_runtime"


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """A folder that holds ImageNet weights of the trunks."""
    named = os.environ.get("LPIPS_FAST_WEIGHTS")
    folder = Path(named) if named else shared_folder("weights")
    if folder is None or not folder.is_dir():
        pytest.skip("no ImageNet trunk weights: LPIPS_FAST_WEIGHTS is not set")
    return folder


@pytest.fixture(scope="session")
def example_images() -> dict[str, Path]:
    """The original repository's example images: ref, p0, p1."""
    folder = REPOSITORY / "examples" / "images"
    return {name: folder / f"ex_{name}.png" for name in ("ref", "p0", "p1")}


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The unmodified ``lpips`` 0.1.4."""
    declare_torchvision_operators()
    return pytest.importorskip("lpips", reason="the reference package lpips is not installed")


def declare_torchvision_operators() -> None:
    """Lets a CUDA build of torchvision be imported beside a CPU torch, which misses two schemas.

    Nothing of it but network definitions is used.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        global _torchvision_schemas
        _torchvision_schemas = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _torchvision_schemas.define(
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    except ImportError:
        pass


@pytest.fixture(scope="session")
def exportable() -> lpips_fast.LPIPS:
    """AlexNet with a random trunk, as the export tests write it to files."""
    return lpips_fast.LPIPS(net="alex", weights=parity.trunk_weights("alex"), verbose=False)


@pytest.fixture(scope="session")
def onnx_file(exportable: lpips_fast.LPIPS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """:func:`exportable` as an ONNX file of any batch, height and width.

    For tests that are marked ``export_runtime("export")``.
    """
    path = tmp_path_factory.mktemp("onnx") / "alex.onnx"
    lpips_fast.export.export_onnx(exportable, path)
    return path


@pytest.fixture
def run_by_hand(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The slices of a trunk that run by hand from here on, ``slice1`` …, one entry a forward."""
    names = {
        id(slices.slice_layers(net, number)): f"slice{number}"
        for net, spec in TRUNKS.items()
        for number in range(1, len(spec.taps) + 1)
    }
    found: list[str] = []

    def spy(function: Callable[..., Any]) -> Callable[..., Any]:
        def noting(first: Any, *arguments: Any) -> Any:
            of_slices = (
                [of_slice[0] for of_slice in first] if function is originals["run"] else [first]
            )
            found.extend(names[id(layers)] for layers in of_slices)
            return function(first, *arguments)

        return noting

    # Wherever they were imported to.
    modules = [m for name, m in sys.modules.items() if name.startswith("lpips_fast.")]
    originals = {name: getattr(slices, name) for name in ("run", "record")}
    for name, original in originals.items():
        for module in modules:
            if getattr(module, name, None) is original:
                monkeypatch.setattr(module, name, spy(original))
    return found


@pytest.fixture
def generator() -> torch.Generator:
    """Of fresh random numbers; the seed is printed, for a test that fails."""
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    return generator


@pytest.fixture
def poisoned():
    """Fills every new uninitialised tensor with NaN, so that an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def run_python():
    """Runs code in a fresh interpreter, with further environment variables; returns its output."""

    def run(code: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
