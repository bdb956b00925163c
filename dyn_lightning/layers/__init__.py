"""The papers' convolutions, each a drop-in for ``nn.Conv2d``, and their names."""

from torch import nn

from dyn_lightning.layers.cond_conv import CondConv2d
from dyn_lightning.layers.dynamic_conv import DynamicConv2d

CONVS: dict[str, type[nn.Module]] = {
    "condconv": CondConv2d,
    "dynamic": DynamicConv2d,
    "static": nn.Conv2d,
}

__all__ = ["CONVS", "CondConv2d", "DynamicConv2d"]
