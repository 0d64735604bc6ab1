"""ResNet-20 and 56 for small images (He et al. 2015)."""

from __future__ import annotations

from torch import nn

from autoslim.zoo.layers import Classifier, Residual, check_options, conv_bn, relu, scaled


def resnet20(width: float = 1.0, *, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-20 (He et al. 2015) for images (N, in_channels, H, W) of about 32 pixels; logits (N, num_classes).

    `width` multiplies 16-32-64, rounded to multiples of 8. Shortcuts are 1x1 projections where the shape changes.
    Raises `ConfigError`.
    """
    return _small_resnet(3, width, num_classes, in_channels)


def resnet56(width: float = 1.0, *, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-56 (He et al. 2015): as `resnet20`, with nine blocks per stage instead of three."""
    return _small_resnet(9, width, num_classes, in_channels)


def _small_resnet(blocks: int, width: float, num_classes: int, in_channels: int) -> nn.Module:
    check_options(width, num_classes=num_classes, in_channels=in_channels)
    plan = scaled([16, 16, 32, 64], width)
    features: list[nn.Module] = [conv_bn(in_channels, plan[0], 3, activation=relu)]
    incoming = plan[0]
    for stage, outgoing in enumerate(plan[1:]):
        for index in range(blocks):
            stride = 2 if stage and index == 0 else 1
            main = nn.Sequential(
                conv_bn(incoming, outgoing, 3, stride, activation=relu), conv_bn(outgoing, outgoing, 3)
            )
            features.append(Residual(main, incoming, outgoing, stride))
            incoming = outgoing
    return Classifier(nn.Sequential(*features), incoming, num_classes)
