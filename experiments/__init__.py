"""Scripts around the experiments, run as ``python -m experiments.NAME``."""
