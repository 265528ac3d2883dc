"""Writing a model to a file that runs without this package: ONNX, torch.export and others.

=============  ============  =====================================  ==============================
format         suffix        runs in                                extra
=============  ============  =====================================  ==============================
onnx           .onnx         ONNX Runtime, TensorRT and others      ``lpips-fast[export]``
torch-export   .pt2          torch, and what compiles its programs  none
torchscript    .ts           torch and libtorch (C++)               none
openvino       .xml, .bin    OpenVINO                               ``lpips-fast[openvino]``
coreml         .mlpackage    Core ML on Apple devices               ``lpips-fast[coreml]``
=============  ============  =====================================  ==============================

What is written is :class:`.PortableLPIPS`: the formulas in standard operators,
in float32. The inputs are ``in0`` and ``in1``, (N, 3, H, W) float32 RGB in [-1, 1], or in [0, 1]
with ``normalize=True``; both have one size and no other number of channels. The output is
``distance``, (N,), or, for a model with ``spatial=True``, ``distance_map``, (N, 1, H, W). Identical
images give exactly 0. The file says how it was made (:class:`Record`), and
:func:`.check_exported` runs it beside the model.

TensorRT takes the ONNX file (a dynamic axis needs its range; not run by this project)::

    trtexec --onnx=lpips.onnx --saveEngine=lpips.engine \\
        --minShapes=in0:1x3x64x64,in1:1x3x64x64 \\
        --optShapes=in0:8x3x256x256,in1:8x3x256x256 \\
        --maxShapes=in0:32x3x512x512,in1:32x3x512x512

Leave out ``--fp16``: the 1e-10 that is added to every norm is 0 in half precision, and 0/0 is NaN.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from ..lpips import LPIPS
from ..version import __version__
from .files import ExportError, check_target, copy_whole, folder_in_its_place, write_whole
from .portable import PortableLPIPS, smallest_dynamic_size

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = [
    "FORMATS",
    "Dynamic",
    "ExportError",
    "Record",
    "export_coreml",
    "export_model",
    "export_onnx",
    "export_openvino",
    "export_program",
    "export_torch",
    "export_torchscript",
    "format_of",
]

#: Which axes may change from call to call: none, the batch, or the batch, height and width.
Dynamic = Literal["none", "batch", "all"]

#: Where a file says how it was made.
RECORD_KEY = "lpips_fast"

# torch.export wants an upper end of every range, and Core ML keeps to it.
_LARGEST_BATCH = 65536
_LARGEST_SIZE = 16384

# What most runtimes of today read; nothing in the graph needs a later one.
_OPSET = 18


@dataclass(frozen=True)
class Record:
    """How an exported file was made, as the file itself says.

    Attributes:
        net, version, lpips, spatial, normalization, layers: the model's.
        normalize: images are in [0, 1] instead of [-1, 1].
        image_size: height and width that it was made with; the only ones unless ``dynamic`` is
            ``"all"``.
        batch: number of pairs that it was made with; the only one if ``dynamic`` is ``"none"``.
        dynamic: which axes may change.
        minimum_size: the smallest height and width.
        quantized: whether the trunk's convolutions are of 8-bit integers.
        package_version, torch_version: what wrote it.
    """

    net: str
    version: str
    lpips: bool
    spatial: bool
    normalization: str
    layers: tuple[int, ...]
    normalize: bool
    image_size: tuple[int, int]
    batch: int
    dynamic: Dynamic
    minimum_size: int
    quantized: bool = False
    package_version: str = __version__
    torch_version: str = torch.__version__

    @property
    def output(self) -> str:
        """The name of the output."""
        return "distance_map" if self.spatial else "distance"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Raises ValueError for anything but the text of a record."""
        try:
            found = json.loads(text)
            known = {field.name: found[field.name] for field in fields(cls)}
            for name in ("layers", "image_size"):
                known[name] = tuple(int(number) for number in known[name])
            if known["dynamic"] not in get_args(Dynamic) or len(known["image_size"]) != 2:
                raise ValueError(f"dynamic is {known['dynamic']!r}")
            known["batch"], known["minimum_size"] = int(known["batch"]), int(known["minimum_size"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError("no record of lpips_fast") from error
        return cls(**known)

    def __str__(self) -> str:
        axes = [
            "batch" if self.dynamic != "none" else str(self.batch),
            "3",
            *(
                ("height", "width")
                if self.dynamic == "all"
                else (str(self.image_size[0]), str(self.image_size[1]))
            ),
        ]
        made = [axes[0], "1", *axes[2:]] if self.spatial else [axes[0] + ","]
        values = "[0, 1]" if self.normalize else "[-1, 1]"
        least = f", from {self.minimum_size} pixels a side" if self.dynamic == "all" else ""
        return (
            f"in0, in1: float32 ({', '.join(axes)}) in {values}{least} -> "
            f"{self.output}: float32 ({', '.join(made)})"
        )


# ----------------------------------------------------------------------------------- preparation


def check_size(model: LPIPS, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """The size as (height, width), or an error that says what is wrong with it."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in size):
        raise ValueError(f"image_size is {image_size!r}, expected pixels: 64, or (height, width)")
    if min(size) < model.minimum_size:
        raise ValueError(
            f"images of {size[0]}x{size[1]} pixels are too small for trunk {model.pnet_type!r}: it "
            f"needs at least {model.minimum_size}x{model.minimum_size}; export for a larger size"
        )
    return size[0], size[1]


def _record(
    model: LPIPS,
    image_size: int | tuple[int, int],
    batch: int,
    dynamic: Dynamic,
    normalize: bool,
    minimum_size: int | None = None,
) -> Record:
    if not isinstance(model, LPIPS):
        raise TypeError(f"expected a lpips_fast.LPIPS to export, got {type(model).__name__}")
    if dynamic not in get_args(Dynamic):
        raise ValueError(
            f"dynamic is {dynamic!r}, expected one of {', '.join(map(repr, get_args(Dynamic)))}"
        )
    if batch < 1:
        raise ValueError(f"batch is {batch}, expected at least 1")
    height, width = check_size(model, image_size)
    if dynamic == "all":
        # What is traced is an example; it must have no axis of length 1 that others have not.
        least = smallest_dynamic_size(model)
        height, width = max(height, least), max(width, least)
    if dynamic != "none":
        batch = max(batch, 2)
    return Record(
        net=model.net_name,
        version=model.version,
        lpips=model.lpips,
        spatial=model.spatial,
        normalization=model.normalization,
        layers=model.layers,
        normalize=normalize,
        image_size=(height, width),
        batch=batch,
        dynamic=dynamic,
        minimum_size=minimum_size or model.minimum_size,
    )


def _example(record: Record) -> tuple[Tensor, Tensor]:
    shape = (record.batch, 3, *record.image_size)
    return torch.zeros(shape), torch.zeros(shape)


def _portable(model: LPIPS, record: Record, fused: bool = False) -> PortableLPIPS:
    return PortableLPIPS(
        model,
        normalize=record.normalize,
        fused=fused,
        batch=record.batch if record.dynamic == "none" else None,
        image_size=None if record.dynamic == "all" else record.image_size,
    )


def require(package: str, extra: str, purpose: str) -> Any:
    """An optional package, or the ImportError that says which extra installs it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f'{purpose} needs {package}: pip install "lpips-fast[{extra}]"'
        ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Exporters tell how far they are, and warn of their own internals."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        levels = {}
        for name in ("torch.onnx", "onnxscript", "onnx_ir", "coremltools"):
            logger = logging.getLogger(name)
            levels[logger] = logger.level
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)


# -------------------------------------------------------------------------------- torch's formats


def _program(model: LPIPS, record: Record, fused: bool) -> ExportedProgram:
    portable = _portable(model, record, fused)
    axes: dict[int, Any] = {}
    if record.dynamic != "none":
        axes[0] = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    if record.dynamic == "all":
        least = smallest_dynamic_size(model)
        axes[2] = torch.export.Dim("height", min=least, max=_LARGEST_SIZE)
        axes[3] = torch.export.Dim("width", min=least, max=_LARGEST_SIZE)
    shapes = {"in0": axes, "in1": axes} if axes else None
    with _quietly(), torch.no_grad():
        return torch.export.export(portable, _example(record), dynamic_shapes=shapes, strict=False)


def export_program(
    model: LPIPS,
    *,
    image_size: int | tuple[int, int] = 64,
    batch: int = 1,
    dynamic: Dynamic = "all",
    normalize: bool = False,
    fused: bool = False,
) -> ExportedProgram:
    """A model as ``torch.export`` has it, to be compiled, transformed or saved.

    Args:
        model: a float32 model. It is left as it is.
        image_size: height and width, or one number for both; with ``dynamic="all"`` an example.
        batch: number of pairs, with ``dynamic="none"``.
        dynamic: which axes may change: ``"none"``, ``"batch"`` or ``"all"``, which is batch, height
            and width. Then height and width start at
            :func:`.smallest_dynamic_size`, a little above the model's smallest.
        normalize: images are in [0, 1].
        fused: keep this package's kernel for the distance. The program is smaller and faster, and
            runs where :mod:`lpips_fast` was imported.

    Returns:
        A program of ``in0``, ``in1`` (see the top of this module).

    Raises:
        ValueError: an unknown ``dynamic``, images too small for the trunk, or a ``reduction``.
        TypeError: a model that is not float32.

    >>> model = LPIPS(net="alex", pnet_rand=True, verbose=False)
    >>> program = export_program(model, dynamic="none")
    >>> program.module()(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))
    tensor([0.])
    """
    return _program(model, _record(model, image_size, batch, dynamic, normalize), fused)


def export_torch(
    model: LPIPS,
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] = 64,
    batch: int = 1,
    dynamic: Dynamic = "all",
    normalize: bool = False,
    fused: bool = False,
) -> Record:
    """Writes :func:`export_program` to a file that ``torch.export.load`` reads.

    Unless it is ``fused``, the file loads where this package is not installed.

    Args:
        path: of the file, ending in ``.pt2``; its folder exists.

    Raises:
        ExportError: it cannot be written there, what had the name before is left as it was.
    """
    target = check_target(path, ".pt2")
    least = smallest_dynamic_size(model) if dynamic == "all" else None
    record = _record(model, image_size, batch, dynamic, normalize, least)
    program = _program(model, record, fused)
    content = io.BytesIO()
    with _quietly():
        torch.export.save(program, content, extra_files={RECORD_KEY: record.to_json()})
    write_whole(target, content.getvalue())
    return record


def _traced(model: LPIPS, record: Record) -> torch.jit.ScriptModule:
    portable = _portable(model, record)
    with _quietly(), torch.no_grad():
        return torch.jit.trace(portable, _example(record), check_trace=False)  # type: ignore[return-value]


def export_torchscript(
    model: LPIPS,
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] = 64,
    normalize: bool = False,
) -> Record:
    """Writes a traced module that ``torch.jit.load`` reads, in Python and in C++.

    It takes any batch, height and width from the model's smallest; ``image_size`` is the example
    that is traced. It can be moved to another device. On the CPU, run it in Python within
    ``torch.jit.optimized_execution(False)``, in C++ after
    ``torch::jit::setGraphExecutorOptimize(false)``: the optimising executor compiles for every new
    shape, and what it makes is slower.

    Args:
        path: of the file, ending in ``.ts``; its folder exists.

    Raises:
        ExportError: it cannot be written there, what had the name before is left as it was.
        ValueError, TypeError: as :func:`export_program`.
    """
    target = check_target(path, ".ts")
    record = _record(model, image_size, 2, "all", normalize)
    content = io.BytesIO()
    with _quietly():
        torch.jit.save(_traced(model, record), content, _extra_files={RECORD_KEY: record.to_json()})
    write_whole(target, content.getvalue())
    return record


# -------------------------------------------------------------------------------- other runtimes


def export_onnx(
    model: LPIPS,
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] = 64,
    batch: int = 1,
    dynamic: Dynamic = "all",
    normalize: bool = False,
    opset: int = _OPSET,
) -> Record:
    """Writes an ONNX file of standard operators, weights included.

    Args:
        model: a float32 model. It is left as it is.
        path: of the file, ending in ``.onnx``; its folder exists.
        image_size: height and width, or one number for both; with ``dynamic="all"`` an example.
        batch: number of pairs, with ``dynamic="none"``.
        dynamic: which axes may change; with ``"all"`` images may be as small as the model takes.
        normalize: images are in [0, 1].
        opset: version of ONNX's operators, 18 or later.

    Returns:
        How the file was made; its ``str`` is its inputs and output.

    Raises:
        ImportError: ``onnx`` or ``onnxscript`` is not installed.
        ExportError: it cannot be written there, what had the name before is left as it was.
        ValueError, TypeError: as :func:`export_program`.

    Example:
        >>> model = LPIPS(net="alex")                        # doctest: +SKIP
        >>> print(export_onnx(model, "lpips.onnx"))          # doctest: +SKIP
        in0, in1: float32 (batch, 3, height, width) in [-1, 1], from 31 pixels a side -> …
    """
    target = check_target(path, ".onnx")
    if opset < _OPSET:
        raise ValueError(f"opset is {opset}, expected {_OPSET} or later")
    onnx = require("onnx", "export", "writing ONNX")
    require("onnxscript", "export", "writing ONNX")
    record = _record(model, image_size, batch, dynamic, normalize)
    program = _program(model, record, fused=False)
    with _quietly():
        written = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            external_data=False,
            output_names=[record.output],
            verbose=False,
        )
    assert written is not None
    graph = written.model_proto
    _strip(graph)
    onnx.helper.set_model_props(graph, {RECORD_KEY: record.to_json()})
    onnx.checker.check_model(graph)
    write_whole(target, graph.SerializeToString())
    return record


def _strip(graph: Any) -> None:
    """Takes out what the exporter notes of where it ran: source lines and paths of this machine."""
    graph.producer_name, graph.producer_version = "lpips_fast", __version__
    del graph.metadata_props[:]
    for holder in (
        graph.graph,
        *graph.graph.node,
        *graph.graph.value_info,
        *graph.graph.initializer,
        *graph.graph.input,
        *graph.graph.output,
    ):
        del holder.metadata_props[:]
        holder.doc_string = ""


def export_openvino(
    model: LPIPS,
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] = 64,
    batch: int = 1,
    dynamic: Dynamic = "all",
    normalize: bool = False,
) -> Record:
    """Writes OpenVINO's two files, ``.xml`` and, beside it, ``.bin``; weights stay float32.

    Compile it with ``{"INFERENCE_PRECISION_HINT": "f32"}``: on processors that multiply bfloat16
    OpenVINO does so otherwise, and distances change in the third digit.

    Args:
        path: of the first file, ending in ``.xml``; its folder exists.
        image_size, batch, dynamic, normalize: as :func:`export_onnx`.

    Raises:
        ImportError: ``openvino``, ``onnx`` or ``onnxscript`` is not installed.
        ExportError: it cannot be written there, what had the name before is left as it was.
        ValueError, TypeError: as :func:`export_program`.
    """
    target = check_target(path, ".xml")
    require("openvino", "openvino", "writing OpenVINO's files")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "lpips.onnx"
        record = export_onnx(
            model, source, image_size=image_size, batch=batch, dynamic=dynamic, normalize=normalize
        )
        onnx_to_openvino(source, target, record)
    return record


def onnx_to_openvino(source: Path, target: Path, record: Record) -> None:
    """Rewrites an ONNX file of ours, of 8-bit integers too."""
    openvino = require("openvino", "openvino", "writing OpenVINO's files")
    with _quietly():
        converted = openvino.convert_model(str(source))
        converted.set_rt_info(record.to_json(), [RECORD_KEY])
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / target.name
            openvino.save_model(converted, str(made), compress_to_fp16=False)
            # The graph last: it is what is opened, and then its weights are there.
            for suffix in (".bin", target.suffix):
                copy_whole(made.with_suffix(suffix), target.with_suffix(suffix))


def export_coreml(
    model: LPIPS,
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] = 64,
    batch: int = 1,
    dynamic: Dynamic = "all",
    normalize: bool = False,
) -> Record:
    """Writes a Core ML package (an ML program in float32, for iOS 16 and macOS 13 or later).

    It is converted on any system, and runs on Apple's alone: its numbers were never compared.
    Float32 matters: in float16 the 1e-10 added to every norm is 0.

    Args:
        path: of the package, a folder ending in ``.mlpackage``; its own folder exists.
        image_size, batch, dynamic, normalize: as :func:`export_onnx`; a dynamic batch goes to 64
            pairs and images to 4096 pixels a side, since Core ML wants an end.

    Raises:
        ImportError: ``coremltools`` is not installed.
        ExportError: the folder does not exist, or maps of a dynamic size, which Core ML's converter
            cannot enlarge.
        ValueError, TypeError: as :func:`export_program`.
    """
    target = check_target(path, ".mlpackage", is_folder=True)
    record = _record(model, image_size, batch, dynamic, normalize)
    if record.spatial and dynamic == "all":
        raise ExportError(
            "Core ML's converter cannot enlarge maps to a dynamic size: export a spatial model "
            "with dynamic='batch' or 'none'"
        )
    with _quietly():
        ct = require("coremltools", "coreml", "writing Core ML's packages")
        height, width = record.image_size
        axes = [record.batch, 3, height, width]
        if dynamic != "none":
            axes[0] = ct.RangeDim(1, 64, default=1)
        if dynamic == "all":
            axes[2] = ct.RangeDim(record.minimum_size, 4096, default=height)
            axes[3] = ct.RangeDim(record.minimum_size, 4096, default=width)
        converted = ct.convert(
            _traced(model, record),
            inputs=[ct.TensorType(name, shape=ct.Shape(axes)) for name in ("in0", "in1")],
            outputs=[ct.TensorType(record.output)],
            convert_to="mlprogram",
            compute_precision=ct.precision.FLOAT32,
            minimum_deployment_target=ct.target.iOS16,
            skip_model_load=True,
        )
        converted.short_description = f"LPIPS {model.pnet_type}, version {model.version}"
        converted.user_defined_metadata[RECORD_KEY] = record.to_json()
        with folder_in_its_place(target) as made:
            converted.save(str(made))
    return record


# ------------------------------------------------------------------------------------ all of them


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        suffix: of its name.
        title: for people.
        write: the function that writes it.
        fixes_axes: whether ``batch`` and ``dynamic`` are arguments of that function.
    """

    suffix: str
    title: str
    write: Callable[..., Record]
    fixes_axes: bool = True


#: Every format by the name that the command line knows.
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "onnx": Format(".onnx", "ONNX", export_onnx),
        "torch-export": Format(".pt2", "torch.export", export_torch),
        "torchscript": Format(".ts", "TorchScript", export_torchscript, fixes_axes=False),
        "openvino": Format(".xml", "OpenVINO", export_openvino),
        "coreml": Format(".mlpackage", "Core ML", export_coreml),
    }
)


def format_of(path: str | os.PathLike[str], name: str | None = None) -> str:
    """The format that a file is to have: the one named, or the one of its suffix.

    >>> format_of("model.onnx"), format_of("model.xml")
    ('onnx', 'openvino')
    """
    if name is not None:
        if name not in FORMATS:
            raise ValueError(f"unknown format {name!r}; expected one of {', '.join(FORMATS)}")
        return name
    suffix = Path(path).suffix.lower()
    for name, kind in FORMATS.items():
        if kind.suffix == suffix:
            return name
    known = ", ".join(f"{kind.suffix} ({name})" for name, kind in FORMATS.items())
    raise ValueError(f"{Path(path)} does not say its format by its suffix; expected one of {known}")


def export_model(
    model: LPIPS,
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    image_size: int | tuple[int, int] = 64,
    batch: int = 1,
    dynamic: Dynamic = "all",
    normalize: bool = False,
) -> Record:
    """Writes a model in any format.

    Args:
        path: of the file; its suffix says the format unless ``format`` does.
        format: a key of :data:`FORMATS`.
        image_size, batch, dynamic, normalize: as :func:`export_onnx`. A TorchScript file takes all
            sizes, whatever ``dynamic`` says.

    Raises:
        ValueError: an unknown format, or a suffix that is not the format's.
        ImportError, ExportError, ValueError, TypeError: as the format's own function.
    """
    kind = FORMATS[format_of(path, format)]
    options: dict[str, Any] = {"image_size": image_size, "normalize": normalize}
    if kind.fixes_axes:
        options |= {"batch": batch, "dynamic": dynamic}
    return kind.write(model, path, **options)
