import pytest
from torch import Tensor, nn

from dyn_lightning.layers import CondConv2d, DynamicConv2d
from dyn_lightning.protocols import Annealed, Foldable, Grouped, Routed


class Own(nn.Module):
    """A user's own layer, which knows nothing of the protocols."""

    def routers(self) -> dict[str, nn.Module]:
        return {}

    def set_temperature(self, value: float) -> None: ...

    def membership(self) -> Tensor: ...

    def fold(self) -> nn.Module: ...


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (CondConv2d(4, 6, 3), {Routed}),
        (DynamicConv2d(4, 6, 3), {Routed, Annealed}),
        (Own(), {Routed, Annealed, Grouped, Foldable}),
        (nn.Conv2d(4, 6, 3), set()),
        (nn.Sequential(DynamicConv2d(4, 6, 3)), set()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_takes_part_by_having_the_method(layer: nn.Module, expected: set[type]) -> None:
    assert {protocol for protocol in (Routed, Annealed, Grouped, Foldable) if isinstance(layer, protocol)} == expected
