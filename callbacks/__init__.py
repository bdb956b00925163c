"""Callbacks that anneal the temperature and show what the layers learn; imported as ``dyn_lightning.callbacks``."""

from dyn_lightning.callbacks.expert_examples import ExpertExamples
from dyn_lightning.callbacks.group_tracker import GroupTracker
from dyn_lightning.callbacks.routing_histogram import RoutingHistogram
from dyn_lightning.callbacks.routing_projector import RoutingProjector
from dyn_lightning.callbacks.routing_report import RoutingReport
from dyn_lightning.callbacks.scalar_layout import ScalarLayout
from dyn_lightning.callbacks.temperature import TemperatureAnnealing

__all__ = [
    "ExpertExamples",
    "GroupTracker",
    "RoutingHistogram",
    "RoutingProjector",
    "RoutingReport",
    "ScalarLayout",
    "TemperatureAnnealing",
]
