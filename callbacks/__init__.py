"""Callbacks that anneal the temperature and show what the layers learn; imported as ``dyn_lightning.callbacks``."""

from dyn_lightning.callbacks.routing_histogram import RoutingHistogram
from dyn_lightning.callbacks.temperature import TemperatureAnnealing

__all__ = ["RoutingHistogram", "TemperatureAnnealing"]
