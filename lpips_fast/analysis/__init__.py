"""What a distance is made of: layers, channels, normalisations (:mod:`.parts`), their pictures
(:mod:`.figures`), and where a trunk looks (:mod:`.attention`).
"""

from .attention import attention_map
from .figures import (
    plot_channel_importance,
    plot_layer_contributions,
    plot_layer_maps,
    plot_normalization_table,
    plot_normalizations,
    require_matplotlib,
)
from .parts import (
    ChannelImportance,
    LayerContributions,
    LayerImportance,
    NormalizationResult,
    NormalizationTable,
    channel_importance,
    compare_normalizations,
    describe,
    layer_contributions,
    layer_maps,
    layer_names,
    rank_correlation,
)

__all__ = [
    "ChannelImportance",
    "LayerContributions",
    "LayerImportance",
    "NormalizationResult",
    "NormalizationTable",
    "attention_map",
    "channel_importance",
    "compare_normalizations",
    "describe",
    "layer_contributions",
    "layer_maps",
    "layer_names",
    "plot_channel_importance",
    "plot_layer_contributions",
    "plot_layer_maps",
    "plot_normalization_table",
    "plot_normalizations",
    "rank_correlation",
    "require_matplotlib",
]
