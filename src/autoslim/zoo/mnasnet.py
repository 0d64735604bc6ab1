"""MNasNet (Tan et al. 2018) without squeeze-excite."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from autoslim.zoo.inverted import Stage, inverted_net


def mnasnet(
    width: float = 1.0,
    channels: Sequence[int] | None = None,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    stem_stride: int = 2,
) -> nn.Module:
    """MNasNet (Tan et al. 2018) for images (N, in_channels, H, W); logits (N, num_classes).

    The variant without squeeze-excite that the published AutoSlim lists describe. `width` and `channels` as for
    `mobilenet_v2`. Raises `ConfigError`.
    """
    stages = [
        Stage(24, 3, 2, 3, 3),
        Stage(40, 3, 2, 3, 5),
        Stage(80, 3, 2, 6, 5),
        Stage(96, 2, 1, 6, 3),
        Stage(192, 4, 2, 6, 5),
        Stage(320, 1, 1, 6, 3),
    ]
    return inverted_net(stages, width, channels, num_classes, in_channels, stem_stride)
