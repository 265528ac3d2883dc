"""What is asked at every call, compiled: whether modules and weights are as they were."""

from . import libraries  # noqa: F401  (says what is missing where nothing is built)
from ._C import AttributeCheck, ModuleCheck, WeightsCheck, WeightWatch, lie_plainly

__all__ = ["AttributeCheck", "ModuleCheck", "WeightWatch", "WeightsCheck", "lie_plainly"]
