"""ShuffleNet v1 with 3 groups (Zhang et al. 2017) and ShuffleNet v2 (Ma et al. 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from autoslim.errors import ConfigError
from autoslim.zoo.layers import Classifier, conv_bn, relu

_V2_CHANNELS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}


def shufflenet_v1(
    width: float = 1.0, *, groups: int = 3, num_classes: int = 1000, in_channels: int = 3, stem_stride: int = 2
) -> nn.Module:
    """ShuffleNet v1 (Zhang et al. 2017) for images (N, in_channels, H, W); logits (N, num_classes).

    `width` multiplies 240-480-960, rounded to multiples of 4 x `groups`, so that shuffling and grouped convolutions
    work. The first convolution has 12, 24 or 48 channels at widths below 1, from 1 and from 2. Raises `ConfigError`.
    """
    if groups < 1 or not 0 < width < math.inf:
        raise ConfigError(f"groups must be at least 1 and width above 0, got groups={groups}, width={width}")
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


def shufflenet_v2(
    width: float = 1.0, *, num_classes: int = 1000, in_channels: int = 3, stem_stride: int = 2
) -> nn.Module:
    """ShuffleNet v2 (Ma et al. 2018) for images (N, in_channels, H, W); logits (N, num_classes).

    `width` is 0.5, 1.0, 1.5 or 2.0, else `ConfigError` is raised.
    """
    if width not in _V2_CHANNELS:
        raise ConfigError(f"shufflenet_v2 has no width {width}; the paper has {', '.join(map(str, _V2_CHANNELS))}")
    *stages, last = _V2_CHANNELS[width]
    features: list[nn.Module] = [conv_bn(in_channels, 24, 3, stem_stride, activation=relu)]
    if stem_stride > 1:
        features.append(nn.MaxPool2d(3, 2, 1))
    incoming = 24
    for outgoing, blocks in zip(stages, (4, 8, 4), strict=True):
        for block in range(blocks):
            features.append(ShuffleUnitV2(incoming, outgoing, 2 if block == 0 else 1))
            incoming = outgoing
    features.append(conv_bn(incoming, last, activation=relu))
    return Classifier(nn.Sequential(*features), last, num_classes)


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


class ShuffleUnitV2(nn.Module):
    """One half of the channels passes by, the other through a small net; both are shuffled together."""

    def __init__(self, incoming: int, outgoing: int, stride: int) -> None:
        super().__init__()
        half = outgoing // 2
        self.stride = stride
        self.beside = nn.Sequential()
        if stride == 2:
            self.beside = nn.Sequential(
                conv_bn(incoming, incoming, 3, 2, groups=incoming), conv_bn(incoming, half, activation=relu)
            )
        self.main = nn.Sequential(
            conv_bn(incoming if stride == 2 else half, half, activation=relu),
            conv_bn(half, half, 3, stride, groups=half),
            conv_bn(half, half, activation=relu),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride)."""
        beside, through = (x, x) if self.stride == 2 else x.chunk(2, dim=1)
        return shuffle(torch.cat([self.beside(beside), self.main(through)], dim=1), 2)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` equal parts of (N, C, H, W)."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)
