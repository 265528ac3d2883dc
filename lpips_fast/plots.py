"""The path of version 0.1 to :mod:`lpips_fast.analysis`: its pictures."""

from .analysis.figures import (
    plot_channel_importance,
    plot_layer_contributions,
    plot_layer_maps,
    plot_normalization_table,
    plot_normalizations,
    require_matplotlib,
)

__all__ = [
    "plot_channel_importance",
    "plot_layer_contributions",
    "plot_layer_maps",
    "plot_normalization_table",
    "plot_normalizations",
    "require_matplotlib",
]
