import pytest
from torch import nn

from dyn_lightning.callbacks import (
    ExpertExamples,
    GroupTracker,
    RoutingHistogram,
    RoutingProjector,
    RoutingReport,
    ScalarLayout,
)
from dyn_lightning.callbacks.default import default_observers
from dyn_lightning.layers import DGConv2d, DynamicConv2d

ROUTED = [RoutingHistogram, RoutingReport, ExpertExamples, RoutingProjector]


@pytest.mark.parametrize(
    ("layers", "kinds"),
    [
        ([nn.Conv2d(2, 4, 3)], []),
        ([DynamicConv2d(2, 4, 3)], [*ROUTED, ScalarLayout]),
        ([DGConv2d(2, 4, 3)], [GroupTracker, ScalarLayout]),
        ([DGConv2d(2, 4, 3), DynamicConv2d(4, 2, 1)], [*ROUTED, GroupTracker, ScalarLayout]),
    ],
    ids=["static", "routed", "grouped", "both"],
)
def test_suit_the_layers(layers: list[nn.Module], kinds: list[type]) -> None:
    assert [type(each) for each in default_observers(nn.Sequential(*layers), [])] == kinds


def test_leave_out_what_is_given() -> None:
    model = nn.Sequential(DynamicConv2d(2, 4, 3))
    found = default_observers(model, [RoutingReport(max_images=7), RoutingProjector()])
    assert [type(each) for each in found] == [RoutingHistogram, ExpertExamples, ScalarLayout]
