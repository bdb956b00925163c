"""What a layer that learns its groups has learned."""

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from dyn_lightning.protocols import Grouped


def count_groups(membership: Tensor) -> int:
    """Count the groups of channels that are not connected with each other, directly or through others.

    Args:
        membership: binary ``(C_out, C_in)``: which channel pairs are connected. A channel without any connection is in
            no group.

    Example:
        >>> count_groups(torch.block_diag(torch.ones(2, 3), torch.ones(4, 1)))
        2
    """
    outputs, inputs = membership.shape
    rows, columns = membership.detach().cpu().nonzero(as_tuple=True)
    # Outputs and inputs are the nodes of one graph.
    edges = (torch.ones(len(rows)), (rows, outputs + columns))
    _, group = connected_components(coo_array(edges, shape=(outputs + inputs,) * 2), directed=False)
    return len(np.unique(group[rows]))


def gates(layer: Grouped) -> list[nn.Parameter]:
    """Find the parameters that a layer's membership depends on, by its gradient; none if it has no gradient."""
    assert isinstance(layer, nn.Module)
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        total = layer.membership().sum()
    if not total.requires_grad or not parameters:
        return []
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return [parameter for parameter, gradient in zip(parameters, found, strict=True) if gradient is not None]
