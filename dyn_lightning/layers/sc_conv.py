"""Self-calibrated convolution: Improving Convolutional Networks with Self-Calibrated Convolutions (SCNet, Liu et al.,
CVPR 2020). Not ScConv, the spatial and channel reconstruction convolution of CVPR 2023.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn_lightning.checks import Pair, as_geometry, check_batched, check_channels, check_count
from dyn_lightning.conv2d import BatchNorm2d, add_bias, conv2d_arguments, conv2d_repr, copy_bias_, in_format_of


class SelfCalibratedConv2d(nn.Module):
    """Convolve one half of the channels plainly, the other half self-calibrated: ``concat(k1(x_a), calibrated(x_b))``.

    ``calibrated(x) = k4(k3(x) * sigmoid(x + up(k2(pool(x)))))``. The four kernels have a quarter of the weights of the
    convolution that they replace, so there are no more of them. As in SCNet k2 and k3 are followed by a batch norm, k1
    and k4 too, but that one is the norm that the network has behind the layer. ``bias`` is added to the output.

    Args:
        in_channels: as in ``nn.Conv2d``, like all arguments before the star; 2 or more.
        out_channels: channels of the output, 2 or more; may differ from ``in_channels``: only k1 and k4 change them.
        kernel_size: rows and columns of all kernels.
        stride: step of k1 and k4, like the next one; k2 and k3 keep the size of the map.
        padding: zeros around the input, or ``"same"`` or ``"valid"``.
        dilation: of all kernels.
        groups: of all kernels.
        bias: whether there is a bias.
        pooling: r, the window of the average pooling; on smaller maps it is the whole map.

    Shape:
        ``(B, C_in, H, W)`` to ``(B, C_out, H', W')`` as in ``nn.Conv2d``.

    Raises:
        ValueError: fewer than 2 channels, groups that do not divide each half of the channels, a count below 1, an
            unknown padding.

    Example:
        >>> SelfCalibratedConv2d(4, 6, 3, padding=1)(torch.randn(2, 4, 7, 6)).shape
        torch.Size([2, 6, 7, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        pooling: int = 4,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels < 2:
                raise ValueError(f"{name}={channels} must be at least 2, one for each half: leave the layer static")
            if channels // 2 % groups or (channels - channels // 2) % groups:
                raise ValueError(
                    f"groups={groups} must divide each half of {name}={channels}, {channels // 2} and "
                    f"{channels - channels // 2}: take groups=1, or leave the layer static"
                )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = as_geometry(kernel_size, stride, padding, dilation)
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, groups)
        self.k1 = nn.Conv2d(in_channels // 2, out_channels // 2, *geometry, bias=False)
        self.calibrated = SelfCalibration(
            in_channels - in_channels // 2, out_channels - out_channels // 2, *geometry, pooling=pooling
        )
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(B, C_in, H, W)``."""
        check_batched(x.shape)
        half = self.k1.in_channels
        y = torch.cat([self.k1(x[:, :half]), self.calibrated(x[:, half:])], 1)
        return in_format_of(x, add_bias(y, self.bias))

    @classmethod
    @torch.no_grad()
    def from_conv(cls, conv: nn.Conv2d, *, pooling: int = 4) -> "SelfCalibratedConv2d":
        """Build the layer from a trained convolution; the output is not the same, since the halves are kept apart.

        The bias is kept, and with groups=1 k1 and k4 start from the convolution's kernels within the first and within
        the second half of the channels.

        Args:
            conv: the trained convolution.
            pooling: r.

        Raises:
            ValueError: a padding mode other than zeros, or what the constructor refuses.
        """
        layer = cls(**conv2d_arguments(conv), pooling=pooling).to(conv.weight)
        k1, k4 = layer.k1.weight, layer.calibrated.k4.weight
        if conv.groups == 1:
            k1.copy_(conv.weight[: k1.shape[0], : k1.shape[1]])
            k4.copy_(conv.weight[k1.shape[0] :, -k4.shape[1] :])
        copy_bias_(layer, conv)
        return layer

    def extra_repr(self) -> str:
        """Describe the layer inside its name."""
        return f"{conv2d_repr(self)}, pooling={self.calibrated.pooling}"


class SelfCalibration(nn.Module):
    """The self-calibrated branch: ``k4(k3(x) * sigmoid(x + up(k2(pool(x)))))``; arguments as of the layer."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair | str,
        dilation: Pair,
        groups: int,
        *,
        pooling: int,
    ) -> None:
        super().__init__()
        check_count("pooling", pooling)
        self.pooling = pooling
        self.k2, self.k3 = (
            nn.Sequential(
                nn.Conv2d(in_channels, in_channels, kernel_size, 1, "same", dilation, groups, bias=False),
                BatchNorm2d(in_channels),
            )
            for _ in range(2)
        )
        self.k4 = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(B, C_in, H, W)``."""
        pooled = F.avg_pool2d(x, [min(self.pooling, size) for size in x.shape[2:]])
        gate = torch.sigmoid(x + F.interpolate(self.k2(pooled), x.shape[2:]))
        return self.k4(self.k3(x) * gate)
