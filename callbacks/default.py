"""The callbacks that show what a model's layers learn, where the user chose none."""

from pytorch_lightning import Callback
from torch import nn

from dyn_lightning.callbacks.expert_examples import ExpertExamples
from dyn_lightning.callbacks.group_tracker import GroupTracker
from dyn_lightning.callbacks.routing_histogram import RoutingHistogram
from dyn_lightning.callbacks.routing_projector import RoutingProjector
from dyn_lightning.callbacks.routing_report import RoutingReport
from dyn_lightning.callbacks.scalar_layout import ScalarLayout
from dyn_lightning.protocols import Grouped, Routed, named_layers

ROUTED = (RoutingHistogram, RoutingReport, ExpertExamples, RoutingProjector)


def default_observers(model: nn.Module, given: list[Callback]) -> list[Callback]:
    """Make the observers that suit a model's layers, but for those that are given.

    Args:
        model: any module.
        given: the callbacks that the user chose.
    """
    kinds: list[type[Callback]] = [
        *(ROUTED if dict(named_layers(model, Routed)) else ()),
        *((GroupTracker,) if dict(named_layers(model, Grouped)) else ()),
    ]
    kinds += [ScalarLayout] if kinds else []
    return [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in given)]
