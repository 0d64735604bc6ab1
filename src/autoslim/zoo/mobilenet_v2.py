"""MobileNet v2 (Sandler et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from autoslim.zoo.inverted import Stage, inverted_net


def mobilenet_v2(
    width: float = 1.0,
    channels: Sequence[int] | None = None,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    stem_stride: int = 2,
) -> nn.Module:
    """MobileNet v2 (Sandler et al. 2018) for images (N, in_channels, H, W); logits (N, num_classes).

    `width` multiplies all channels, rounded to multiples of 8; the last convolution keeps 1280 at widths below 1, as in
    the paper. `channels` replaces `width` and `num_classes`: [conv0, block0_out, (mid, out) for blocks 1..16,
    conv_last, num_classes]. A block adds its input if it has stride 1 and as many channels come out as go in. Raises
    `ConfigError`.
    """
    stages = [
        Stage(24, 2, 2, 6, 3),
        Stage(32, 3, 2, 6, 3),
        Stage(64, 4, 2, 6, 3),
        Stage(96, 3, 1, 6, 3),
        Stage(160, 3, 2, 6, 3),
        Stage(320, 1, 1, 6, 3),
    ]
    return inverted_net(stages, width, channels, num_classes, in_channels, stem_stride)
