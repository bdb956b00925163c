"""Callbacks that anneal the temperature and show what the layers learn; imported as ``dyn_lightning.callbacks``."""
