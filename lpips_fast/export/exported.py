"""Running an exported file in its own runtime, and holding it against the model it came from."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..lpips import LPIPS
from .exporters import RECORD_KEY, Record, format_of, require
from .files import ExportError

__all__ = ["Exported", "check_exported", "load_exported"]


class Exported:
    """A file of :mod:`lpips_fast.export`, loaded into its runtime on the CPU.

    Attributes:
        path: of the file.
        record: how it was made, as it says itself.

    Calling it takes and returns tensors as the file does:

    >>> exported = load_exported("lpips.onnx")               # doctest: +SKIP
    >>> exported(image0, image1)                             # doctest: +SKIP
    tensor([0.7219])
    """

    def __init__(self, path: Path, record: Record, run: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.path, self.record, self._run = path, record, run

    def __call__(self, in0: Tensor, in1: Tensor) -> Tensor:
        """Distances (N,) or maps (N, 1, H, W) of images as :attr:`record` says."""
        with torch.no_grad():
            return self._run(in0.contiguous(), in1.contiguous())


def load_exported(path: str | os.PathLike[str], threads: int | None = None) -> Exported:
    """Loads a file that :mod:`lpips_fast.export` or :mod:`.quantization` wrote.

    Args:
        path: of the file; its suffix says the format.
        threads: of ONNX Runtime and OpenVINO; ``None``: torch's number, which torch's own formats
            always use.

    Raises:
        ExportError: no such file, not one of ours, or one that cannot run here (Core ML's).
        ValueError: a suffix of no format.
        ImportError: the runtime is not installed.
    """
    source = Path(path)
    name = format_of(source)
    if name == "coreml":
        raise ExportError(f"{source} cannot be run here: Core ML runs on Apple devices alone")
    if not source.exists():
        raise ExportError(f"there is no file {source}")
    if not source.is_file():  # a pipe would be waited for
        raise ExportError(f"{source} is not a regular file")
    loaders = {
        "onnx": _load_onnx,
        "torch-export": _load_program,
        "torchscript": _load_torchscript,
        "openvino": _load_openvino,
    }
    try:
        text, run = loaders[name](source, threads or torch.get_num_threads())
    except ImportError:
        raise
    except Exception as error:  # every runtime has its own
        raise ExportError(f"{source} cannot be read: {_first_line(error)}") from error
    try:
        return Exported(source, Record.from_json(text), run)
    except ValueError:
        raise ExportError(f"{source} was not written by lpips_fast: it has no record") from None


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


_Loaded = tuple[str, Callable[[Tensor, Tensor], Tensor]]


def _load_onnx(path: Path, threads: int) -> _Loaded:
    runtime = require("onnxruntime", "export", "running ONNX files")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # it warns of nodes that it will run itself
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(in0: Tensor, in1: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"in0": in0.numpy(), "in1": in1.numpy()})[0])

    return session.get_modelmeta().custom_metadata_map.get(RECORD_KEY, ""), run


def _load_program(path: Path, threads: int) -> _Loaded:
    extra = {RECORD_KEY: ""}
    module = torch.export.load(path, extra_files=extra).module()
    return extra[RECORD_KEY], module


def _load_torchscript(path: Path, threads: int) -> _Loaded:
    extra: dict[str, Any] = {RECORD_KEY: ""}
    module = torch.jit.load(str(path), _extra_files=extra)
    text = extra[RECORD_KEY]

    def run(in0: Tensor, in1: Tensor) -> Tensor:
        # The optimising executor compiles anew for every shape, and on CPUs runs slower after that.
        with torch.jit.optimized_execution(False):
            return module(in0, in1)

    return text.decode() if isinstance(text, bytes) else text, run


@functools.cache
def _openvino_core() -> Any:
    """OpenVINO's runtime: one for the process, and never released.

    Its CPU plugin gives the thread that loads it another signal stack, and when it goes unmaps that
    stack, but gives the old one back only to the thread that lets it go. Garbage collection may
    be another. Then the first thread's next signal kills the process (OpenVINO 2026.4).
    """
    return require("openvino", "openvino", "running OpenVINO's files").Core()


def _load_openvino(path: Path, threads: int) -> _Loaded:
    core = _openvino_core()
    network = core.read_model(str(path))
    text = network.get_rt_info([RECORD_KEY]).astype(str) if network.has_rt_info(RECORD_KEY) else ""
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(network, "CPU", options).create_infer_request()

    def run(in0: Tensor, in1: Tensor) -> Tensor:
        found = request.infer({"in0": in0.numpy(), "in1": in1.numpy()})
        return torch.from_numpy(next(iter(found.values())).copy())

    return text, run


# ------------------------------------------------------------------------------------- the check


def check_exported(
    model: LPIPS,
    path: str | os.PathLike[str],
    *,
    tolerance: float = 1e-5,
    seed: int | None = None,
) -> float:
    """Runs a file and the model it came from on the same fresh images.

    Pairs of noise, near pairs, black against white, black against noise, and identical images, in
    every size and batch that the file can take: its own, and where they are dynamic the smallest,
    an odd one, and one and three pairs.

    Args:
        model: the model that was exported, on any device.
        path: what it was exported to.
        tolerance: the largest error allowed, absolute, or relative to a distance above 1.
        seed: of the images; ``None``: another at every call.

    Returns:
        The largest error.

    Raises:
        ExportError: an error beyond the tolerance, identical images that do not give exactly 0, a
            file of another model, or one that cannot be run here.

    Example:
        >>> export_onnx(model, "lpips.onnx")                 # doctest: +SKIP
        >>> check_exported(model, "lpips.onnx") < 1e-5       # doctest: +SKIP
        True
    """
    exported = load_exported(path)
    _check_origin(model, exported)
    generator = torch.Generator()
    seed = generator.seed() if seed is None else generator.manual_seed(seed).initial_seed()
    largest = 0.0
    for shape in _shapes(exported.record):
        for name, in0, in1 in _pairs(shape, exported.record.normalize, generator):
            found = exported(in0, in1)
            where = f"{exported.path} ({name}, shape {tuple(shape)}, seed {seed})"
            if in0 is in1:
                if bool((found != 0).any()):
                    raise ExportError(
                        f"{where} gives {found.abs().max().item():.3g} for identical images"
                    )
                continue
            expected = _expected(model, in0, in1, exported.record.normalize)
            if found.shape != expected.shape:
                raise ExportError(
                    f"{where} gives shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
                )
            error = _error(found, expected)
            if not error <= tolerance:
                raise ExportError(
                    f"{where} is {error:.3g} from the model, expected at most {tolerance:.3g}"
                )
            largest = max(largest, error)
    return largest


def _check_origin(model: LPIPS, exported: Exported) -> None:
    record = exported.record
    theirs = (record.net, record.version, record.lpips, record.spatial, record.normalization)
    ours = (model.net_name, model.version, model.lpips, model.spatial, model.normalization)
    names = ("net", "version", "lpips", "spatial", "normalization", "layers")
    for name, a, b in zip(names, (*theirs, record.layers), (*ours, model.layers)):
        if a != b:
            raise ExportError(
                f"{exported.path} is of a model with {name}={a!r}, but this one has {name}={b!r}"
            )


def _shapes(record: Record) -> list[tuple[int, int, int, int]]:
    own, least = record.image_size, record.minimum_size
    if record.dynamic == "none":
        return [(record.batch, 3, *own)]
    if record.dynamic == "batch":
        return [(1, 3, *own), (3, 3, *own)]
    return [(2, 3, *own), (1, 3, least, least), (3, 3, least + 22, least + 37)]


def _pairs(
    shape: tuple[int, ...], normalize: bool, generator: torch.Generator
) -> Iterator[tuple[str, Tensor, Tensor]]:
    def image(values: Tensor) -> Tensor:
        return values if normalize else 2 * values - 1

    noise0, noise1 = (torch.rand(shape, generator=generator) for _ in range(2))
    near = (noise0 + 0.02 * torch.randn(shape, generator=generator)).clamp(0, 1)
    black, white = torch.zeros(shape), torch.ones(shape)
    grey = image(torch.full(shape, 0.5))
    yield "noise", image(noise0), image(noise1)
    yield "a near pair", image(noise0), image(near)
    yield "black and white", image(black), image(white)
    yield "grey and noise", grey, image(noise0)
    yield "identical noise", *(image(noise0),) * 2
    yield "identical grey", grey, grey


def _expected(model: LPIPS, in0: Tensor, in1: Tensor, normalize: bool) -> Tensor:
    device = model.scaling_layer.shift.device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            found = model(in0.to(device), in1.to(device), normalize=normalize).cpu()
    finally:
        model.train(was_training)
    return found if model.spatial else found.flatten()


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()
