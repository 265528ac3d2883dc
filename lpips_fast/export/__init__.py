"""Models for other runtimes: ONNX, TorchScript, OpenVINO, Core ML, and int8.

:mod:`.portable` is the model without operators of ours, :mod:`.exporters` write files of it,
:mod:`.exported` runs them again, :mod:`.quantization` makes int8 of them.
"""

from .exported import Exported, check_exported, load_exported
from .exporters import (
    FORMATS,
    Dynamic,
    ExportError,
    Record,
    export_coreml,
    export_model,
    export_onnx,
    export_openvino,
    export_program,
    export_torch,
    export_torchscript,
    format_of,
)
from .portable import PortableLPIPS, smallest_dynamic_size
from .quantization import (
    Method,
    QuantizationReport,
    QuantizationWarning,
    graded_distortions,
    quantize,
)

__all__ = [
    "FORMATS",
    "Dynamic",
    "ExportError",
    "Exported",
    "Method",
    "PortableLPIPS",
    "QuantizationReport",
    "QuantizationWarning",
    "Record",
    "check_exported",
    "export_coreml",
    "export_model",
    "export_onnx",
    "export_openvino",
    "export_program",
    "export_torch",
    "export_torchscript",
    "format_of",
    "graded_distortions",
    "load_exported",
    "quantize",
    "smallest_dynamic_size",
]
