"""Split attention: ResNeSt: Split-Attention Networks (Zhang et al., 2020), arXiv 2004.08955."""

import math

import torch
from torch import Tensor, nn

from dyn_lightning.checks import Pair, as_geometry, check_batched, check_channels, check_count
from dyn_lightning.conv2d import BatchNorm2d, add_bias, conv2d_arguments, conv2d_repr, copy_bias_, in_format_of


class SplitAttentionConv2d(nn.Module):
    """Convolve to R splits of C_out channels, and sum them by channel weights that depend on the image.

    ``y = sum_r a_r s_r``, ``s = ReLU(BN(conv(x)))`` cut into R splits, ``a = r-softmax(fc2(ReLU(BN(fc1(GAP(sum_r
    s_r))))))``; with R = 1 the softmax is a sigmoid. The paper's cardinality K is ``groups``; the convolution has K R
    groups, so each split sees a part of the input. In a network the layer takes the place of a convolution and of the
    batch norm and ReLU behind it. ``bias`` is added to the output.

    Args:
        in_channels: as in ``nn.Conv2d``, like all arguments before the star.
        out_channels: channels of the output, and of each split.
        kernel_size: rows and columns of the kernel.
        stride: step of the kernel.
        padding: zeros around the input, or ``"same"`` or ``"valid"``.
        dilation: distance of the kernel's elements.
        groups: K, the cardinality.
        bias: whether there is a bias.
        radix: R, the number of splits.
        reduction: the attention's hidden layer has ``in_channels * radix / reduction`` units, at least 32, and so many
            more that ``groups`` divides them.

    Shape:
        ``(B, C_in, H, W)`` to ``(B, C_out, H', W')`` as in ``nn.Conv2d``.

    Raises:
        ValueError: ``groups * radix`` that does not divide C_in, groups that do not divide the channels, a count below
            1, an unknown padding.

    Example:
        >>> SplitAttentionConv2d(4, 6, 3, padding=1)(torch.randn(2, 4, 7, 6)).shape
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
        radix: int = 2,
        reduction: int = 4,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        check_count("radix", radix)
        check_count("reduction", reduction)
        if in_channels % (groups * radix):
            raise ValueError(
                f"groups * radix = {groups} * {radix} must divide in_channels={in_channels}: take another radix (1 is "
                "attention over the channels alone), or leave the layer static"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = as_geometry(kernel_size, stride, padding, dilation)
        self.radix = radix
        splits = out_channels * radix
        hidden = math.ceil(max(in_channels * radix // reduction, 32) / groups) * groups
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, groups * radix)
        self.conv = nn.Conv2d(in_channels, splits, *geometry, bias=False)
        self.norm = BatchNorm2d(splits)
        self.fc1 = nn.Conv2d(out_channels, hidden, 1, groups=groups)
        self.norm1 = BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, splits, 1, groups=groups)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(B, C_in, H, W)``."""
        check_batched(x.shape)
        splits = torch.relu(self.norm(self.conv(x))).unflatten(1, (self.radix, -1))
        attention = self.attention(splits.sum(1).mean((2, 3), keepdim=True))
        y = (attention[..., None, None] * splits).sum(1).to(splits.dtype)  # autocast sums in float32 on some devices
        return in_format_of(x, add_bias(y, self.bias))

    def attention(self, pooled: Tensor) -> Tensor:
        """Weigh the splits: ``(B, C_out, 1, 1)`` to ``(B, R, C_out)``."""
        logits = self.fc2(torch.relu(self.norm1(self.fc1(pooled))))
        # fc2's groups make its output (K R c), the splits are (R K c).
        logits = logits.reshape(-1, self.groups, self.radix, self.out_channels // self.groups).transpose(1, 2)
        weights = torch.sigmoid(logits) if self.radix == 1 else torch.softmax(logits, 1)
        return weights.flatten(2).to(pooled.dtype)

    @classmethod
    @torch.no_grad()
    def from_conv(cls, conv: nn.Conv2d, *, radix: int = 2, reduction: int = 4) -> "SplitAttentionConv2d":
        """Build the layer from a trained convolution; the output is not the same, since each split sees a part of it.

        The bias is kept, and with groups=1 each split starts from the kernels that belong to its part of the input.

        Args:
            conv: the trained convolution.
            radix: R.
            reduction: of the attention's hidden layer.

        Raises:
            ValueError: a padding mode other than zeros, or what the constructor refuses.
        """
        layer = cls(**conv2d_arguments(conv), radix=radix, reduction=reduction).to(conv.weight)
        if conv.groups == 1:
            layer.conv.weight.copy_(torch.cat(conv.weight.chunk(radix, 1)))
        copy_bias_(layer, conv)
        return layer

    def extra_repr(self) -> str:
        """Describe the layer inside its name."""
        return f"{conv2d_repr(self)}, radix={self.radix}, hidden={self.fc1.out_channels}"
