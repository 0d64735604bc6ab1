"""ShuffleNet v1 (Zhang et al. 2017), with 3 groups."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from autoslim.errors import ConfigError
from autoslim.zoo.layers import Classifier, check_options, conv_bn, relu, shuffle


def shufflenet_v1(
    width: float = 1.0, *, groups: int = 3, num_classes: int = 1000, in_channels: int = 3, stem_stride: int = 2
) -> nn.Module:
    """ShuffleNet v1 (Zhang et al. 2017) for images (N, in_channels, H, W); logits (N, num_classes).

    `width` multiplies 240-480-960, rounded to multiples of 4 x `groups`, so that shuffling and grouped convolutions
    work. The first convolution has 12, 24 or 48 channels at widths below 1, from 1 and from 2. Raises `ConfigError`.
    """
    check_options(width, groups=groups, num_classes=num_classes, in_channels=in_channels, stem_stride=stem_stride)
    multiple = 4 * groups
    stages = [max(multiple, round(channels * width / multiple) * multiple) for channels in (240, 480, 960)]
    # not 24 x width: so it is in the authors' code, and only so do widths 0.5 to 2.0 cost what the paper says
    stem = 12 if width < 1 else 24 if width < 2 else 48
    stem = math.ceil(stem / groups) * groups
    features: list[nn.Module] = [conv_bn(in_channels, stem, 3, stem_stride, activation=relu)]
    if stem_stride > 1:
        features.append(nn.MaxPool2d(3, 2, 1))
    incoming = stem
    for index, (outgoing, blocks) in enumerate(zip(stages, (4, 8, 4), strict=True)):
        for block in range(blocks):
            # the very first grouped convolution would see too few channels per group
            first = 1 if index == block == 0 else groups
            features.append(ShuffleUnitV1(incoming, outgoing, groups, first, 2 if block == 0 else 1))
            incoming = outgoing
    return Classifier(nn.Sequential(*features), incoming, num_classes)


class ShuffleUnitV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise, grouped 1x1; added to the input, or beside its average at stride 2."""

    def __init__(self, incoming: int, outgoing: int, groups: int, first_groups: int, stride: int) -> None:
        super().__init__()
        added = outgoing - incoming if stride == 2 else outgoing
        middle = max(groups, outgoing // 4 // groups * groups)
        if added < groups:
            raise ConfigError(
                f"a stage of {outgoing} channels has no room beside the {incoming} passed to it; choose a larger width"
            )
        self.compress = conv_bn(incoming, middle, groups=first_groups, activation=relu)
        self.depthwise = conv_bn(middle, middle, 3, stride, groups=middle)
        self.expand = conv_bn(middle, added, groups=groups)
        self.groups, self.stride = groups, stride
        self.pool = nn.AvgPool2d(3, 2, 1)
        self.activation = relu()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride)."""
        y = self.expand(self.depthwise(shuffle(self.compress(x), self.groups)))
        if self.stride == 2:
            return self.activation(torch.cat([self.pool(x), y], dim=1))  # type: ignore[no-any-return]
        return self.activation(x + y)  # type: ignore[no-any-return]
