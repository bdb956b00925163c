"""Dynamic and efficient convolutions: layers, conversion of any network, and the observation of what the layers learn.

This package and everything below ``layers`` need torch alone; what trains (``classifier``, ``data``, ``callbacks``,
``fit``) is imported by its own name.
"""

from dyn_lightning.convert import ConversionReport, convert
from dyn_lightning.fold import fold
from dyn_lightning.functional import dynamic_conv2d
from dyn_lightning.layers import CONVS, CondConv2d, DynamicConv2d
from dyn_lightning.routing import aggregation, watch

__all__ = [
    "CONVS",
    "CondConv2d",
    "ConversionReport",
    "DynamicConv2d",
    "aggregation",
    "convert",
    "dynamic_conv2d",
    "fold",
    "watch",
]
