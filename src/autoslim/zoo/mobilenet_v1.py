"""MobileNet v1 (Howard et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from autoslim.errors import ConfigError
from autoslim.zoo.layers import Classifier, check_options, checked, conv_bn, relu6, scaled, separable


def mobilenet_v1(
    width: float = 1.0,
    channels: Sequence[int] | None = None,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    stem_stride: int = 2,
    repeats: int = 5,
) -> nn.Module:
    """MobileNet v1 (Howard et al. 2017) for images (N, in_channels, H, W); logits (N, num_classes).

    `width` multiplies all channels, rounded to multiples of 8. `repeats` is the number of blocks with 512 channels in a
    row (5 in the paper). `channels` replaces `width` and `num_classes`: [conv0, pw1, ..., pw13, num_classes].
    `stem_stride=1` suits images of 32 pixels. Raises `ConfigError`.
    """
    check_options(width, channels, num_classes=num_classes, in_channels=in_channels, stem_stride=stem_stride)
    if not isinstance(repeats, int) or repeats < 0:
        raise ConfigError(f"repeats must be at least 0, got {repeats}; the paper has 5")
    strides = [1, 2, 1, 2, 1, 2, *[1] * repeats, 2, 1]
    if channels is None:
        plan = [*scaled([32, 64, 128, 128, 256, 256, 512, *[512] * repeats, 1024, 1024], width), num_classes]
    else:
        plan = checked(channels, len(strides) + 2, f"[conv0, pw1..pw{len(strides)}, num_classes]", num_classes)
    *plan, num_classes = plan
    features = [conv_bn(in_channels, plan[0], 3, stem_stride, activation=relu6)]
    for incoming, outgoing, stride in zip(plan, plan[1:], strides, strict=False):
        features.append(separable(incoming, outgoing, 3, stride, last_activation=True))
    return Classifier(nn.Sequential(*features), plan[-1], num_classes)
