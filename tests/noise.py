"""Noise in place of initial values: biases that start at zero and norms that start as identities hide mistakes."""

from typing import TypeVar

import torch
from torch import Generator, nn

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def fill_with_noise_(module: Module, seed: int = 0, scale: float = 1.0) -> Module:
    """Draw every parameter and every batch norm's statistics; the same numbers for the same seed, in any dtype."""
    generator = Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return randomize_norms_(module, seed)


@torch.no_grad()
def randomize_norms_(module: Module, seed: int = 0) -> Module:
    """Draw every batch norm's scale, shift and statistics, near enough to the identity for a deep network."""
    generator = Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for tensor, centre in ((norm.weight, 1), (norm.running_var, 1), (norm.bias, 0), (norm.running_mean, 0)):
                tensor.copy_(centre + torch.rand(tensor.shape, generator=generator) - 0.5)
    return module
