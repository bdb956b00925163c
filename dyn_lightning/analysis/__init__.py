"""What the layers learned, in numbers and figures; knows torch and matplotlib, not Lightning."""

from dyn_lightning.analysis.statistics import LayerStatistics, layer_statistics, similarity

__all__ = ["LayerStatistics", "layer_statistics", "similarity"]
