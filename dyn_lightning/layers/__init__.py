"""The papers' convolutions, each a drop-in for ``nn.Conv2d``, and their names."""

from torch import nn

from dyn_lightning.layers.comp_conv import CompConv2d
from dyn_lightning.layers.cond_conv import CondConv2d, CondLinear
from dyn_lightning.layers.dg_conv import DGConv2d
from dyn_lightning.layers.do_conv import DOConv2d
from dyn_lightning.layers.dynamic_conv import DynamicConv2d
from dyn_lightning.layers.ghost_conv import GhostConv2d
from dyn_lightning.layers.involution import Involution2d
from dyn_lightning.layers.sc_conv import SelfCalibratedConv2d
from dyn_lightning.layers.split_attention import SplitAttentionConv2d

CONVS: dict[str, type[nn.Module]] = {
    "compconv": CompConv2d,
    "condconv": CondConv2d,
    "dgconv": DGConv2d,
    "doconv": DOConv2d,
    "dynamic": DynamicConv2d,
    "ghost": GhostConv2d,
    "involution": Involution2d,
    "scconv": SelfCalibratedConv2d,
    "splitattention": SplitAttentionConv2d,
    "static": nn.Conv2d,
}

__all__ = [
    "CONVS",
    "CompConv2d",
    "CondConv2d",
    "CondLinear",
    "DGConv2d",
    "DOConv2d",
    "DynamicConv2d",
    "GhostConv2d",
    "Involution2d",
    "SelfCalibratedConv2d",
    "SplitAttentionConv2d",
]
