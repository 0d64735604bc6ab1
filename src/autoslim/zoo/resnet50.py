"""ResNet-50 (He et al. 2015) with stride in the 3x3 convolution."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from autoslim.errors import ConfigError
from autoslim.zoo.layers import Classifier, Residual, check_options, checked, conv_bn, relu, scaled

_BLOCKS = (3, 4, 6, 3)


def resnet50(
    width: float = 1.0,
    channels: Sequence[int] | None = None,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    stem_stride: int = 2,
) -> nn.Module:
    """ResNet-50 (He et al. 2015) for images (N, in_channels, H, W); logits (N, num_classes).

    `width` multiplies all channels, rounded to multiples of 8. `channels` replaces `width` and `num_classes`: [conv0,
    then per stage stage_out and per block (mid1, mid2, out), num_classes]. With `stem_stride=1` (small images) the stem
    is a 3x3 convolution and there is no pooling after it. Raises `ConfigError`.
    """
    check_options(width, channels, num_classes=num_classes, in_channels=in_channels, stem_stride=stem_stride)
    if channels is None:
        plan = scaled([64], width)
        for index, blocks in enumerate(_BLOCKS):
            middle, outgoing = scaled([64 * 2**index, 256 * 2**index], width)
            plan += [outgoing, *[middle, middle, outgoing] * blocks]
        plan.append(num_classes)
    else:
        length = 2 + sum(1 + 3 * blocks for blocks in _BLOCKS)
        layout = "[conv0, per stage: out, per block (mid1, mid2, out); num_classes]"
        plan = checked(channels, length, layout, num_classes)
    conv0, *rest, num_classes = plan
    small = stem_stride == 1
    features: list[nn.Module] = [conv_bn(in_channels, conv0, 3 if small else 7, stem_stride, activation=relu)]
    if not small:
        features.append(nn.MaxPool2d(3, 2, 1))
    incoming = conv0
    for stage, blocks in enumerate(_BLOCKS):
        stage_out, *rest = rest
        for index in range(blocks):
            first, second, outgoing, *rest = rest
            if outgoing != stage_out:
                raise ConfigError(
                    f"channels: all blocks of stage {stage + 1} must end with its {stage_out} channels, "
                    f"block {index + 1} has {outgoing}"
                )
            main = nn.Sequential(
                conv_bn(incoming, first, activation=relu),
                conv_bn(first, second, 3, 2 if stage and index == 0 else 1, activation=relu),
                conv_bn(second, outgoing),
            )
            features.append(Residual(main, incoming, outgoing, 2 if stage and index == 0 else 1))
            incoming = outgoing
    return Classifier(nn.Sequential(*features), incoming, num_classes)
