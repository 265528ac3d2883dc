from collections.abc import Sequence
from typing import Any

def build_info() -> str: ...

class WeightWatch:
    def __init__(
        self, address: int, element_size: int, shape: Sequence[int], strides: Sequence[int]
    ) -> None: ...
    @property
    def rounds(self) -> int: ...
    def look(self, address: int) -> int: ...

class ModuleCheck:
    def __init__(
        self,
        kind: type,
        keys: Sequence[str],
        configuration: Sequence[tuple[str, Any]],
        hooks: Sequence[str],
        shapes: Sequence[tuple[str, Any]],
        buffers: Sequence[str],
        children: Sequence[tuple[str, ModuleCheck]],
        parameter_kinds: Sequence[type],
    ) -> None: ...
    def matches(self, module: Any, found: list[Any]) -> bool: ...

class AttributeCheck:
    def __init__(self, attributes: Sequence[tuple[Any, str]]) -> None: ...
    def unchanged(self) -> bool: ...

def lie_plainly(tensors: list[Any], device: Any, dtype: Any, layout: Any) -> bool: ...
