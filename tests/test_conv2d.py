import math

import pytest
import torch
from torch import nn

from dyn_lightning.conv2d import BatchNorm2d, init_kernels_
from tests.tolerances import assert_close


def test_init_kernels_has_the_fan_of_one_kernel() -> None:
    weight, bias = torch.empty(3, 64, 8, 3, 3), torch.ones(3, 64)
    init_kernels_(weight, bias)
    bound = 1 / math.sqrt(8 * 3 * 3)
    assert weight.abs().amax((1, 2, 3, 4)).tolist() == [pytest.approx(bound, rel=0.01)] * 3
    assert not bias.any()


class TestBatchNorm2d:
    @pytest.mark.parametrize("shape", [(1, 3, 2, 1), (2, 3, 1, 1), (0, 3, 1, 1)])
    @pytest.mark.parametrize("training", [True, False])
    def test_is_torch_s(self, training: bool, shape: tuple[int, ...]) -> None:
        ours, theirs, x = BatchNorm2d(3).train(training), nn.BatchNorm2d(3).train(training), torch.randn(shape)
        assert torch.equal(ours(x), theirs(x))
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())

    def test_one_value_is_normalised_by_the_running_statistics(self) -> None:
        norm, x = BatchNorm2d(3), torch.randn(1, 3, 1, 1)
        norm.running_mean.fill_(2)
        before = norm.state_dict(keep_vars=True)["running_mean"].clone()
        assert_close(norm.train()(x), norm.eval()(x))
        assert torch.equal(norm.running_mean, before)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            nn.BatchNorm2d(3)(x)
