"""Compare a layer with the vectors of ``tests/reference``, which its authors' code produced."""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.tolerances import assert_close

FOLDER = Path(__file__).parent / "reference"


def assert_equals_reference(
    file: str, layer: nn.Module, names: Mapping[str, str], own: Collection[str] = (), unused: Collection[str] = ()
) -> None:
    """Compare output, input gradient and parameter gradients, in float64.

    Args:
        file: name of the vector.
        layer: built with the vector's configuration.
        names: name in the source -> name here, of every parameter and buffer but the following.
        own: names of the layer's state that the source has not; they stay as they are.
        unused: names of the source's state that the layer has not.
    """
    reference = {key: torch.from_numpy(np.asarray(value)) for key, value in _load(file).items()}
    given = {key.removeprefix("state/") for key in reference if key.startswith("state/")}
    assert given == {*names, *unused}
    layer = layer.double().eval()
    state = layer.state_dict()
    assert set(state) == {*names.values(), *own}
    for theirs, ours in names.items():
        state[ours] = reference[f"state/{theirs}"].reshape(state[ours].shape)
    layer.load_state_dict(state)

    x = reference["x"].requires_grad_()
    y = layer(x)
    (y * reference["cotangent"]).sum().backward()
    assert_close(y, reference["y"])
    assert_close(x.grad, reference["grad_x"])
    parameters = dict(layer.named_parameters())
    compared = {theirs for theirs, ours in names.items() if ours in parameters}
    assert compared == {key.removeprefix("grad/") for key in reference if key.startswith("grad/")} - {*unused}
    for theirs in compared:
        gradient = parameters[names[theirs]].grad
        assert_close(gradient, reference[f"grad/{theirs}"].reshape(gradient.shape))


def _load(file: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{file}.npz") as arrays:
        return {key: array for key, array in arrays.items() if array.dtype.kind != "U"}


def norm_names(theirs: str, ours: str) -> dict[str, str]:
    """Map the state of a batch norm."""
    state = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{theirs}.{name}": f"{ours}.{name}" for name in state}
