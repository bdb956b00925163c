"""Print parameters and multiply-adds of each layer: ``python -m experiments.layer_table``."""

from dyn_lightning.cost import multiply_adds, parameters
from dyn_lightning.layers import CONVS

for name, layer in CONVS.items():
    conv = layer(64, 64, (3, 3), padding=1, bias=False)
    print(f"{name:12} {parameters(conv):>9,} parameters {multiply_adds(conv, (64, 56, 56)) / 1e6:8.1f} M multiply-adds")
