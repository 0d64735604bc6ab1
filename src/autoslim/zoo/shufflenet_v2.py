"""ShuffleNet v2 (Ma et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoslim.errors import ConfigError
from autoslim.zoo.layers import Classifier, check_options, conv_bn, relu, shuffle

_V2_CHANNELS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}


def shufflenet_v2(
    width: float = 1.0, *, num_classes: int = 1000, in_channels: int = 3, stem_stride: int = 2
) -> nn.Module:
    """ShuffleNet v2 (Ma et al. 2018) for images (N, in_channels, H, W); logits (N, num_classes).

    `width` is 0.5, 1.0, 1.5 or 2.0, else `ConfigError` is raised.
    """
    check_options(width, num_classes=num_classes, in_channels=in_channels, stem_stride=stem_stride)
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
