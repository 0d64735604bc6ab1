"""MobileNet v1 (Howard et al. 2017), MobileNet v2 (Sandler et al. 2018) and MNasNet (Tan et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from autoslim.errors import ConfigError
from autoslim.space import make_divisible
from autoslim.zoo.layers import Classifier, checked, conv_bn, relu6, scaled


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
    if repeats < 0:
        raise ConfigError(f"repeats must be at least 0, got {repeats}; the paper has 5")
    strides = [1, 2, 1, 2, 1, 2, *[1] * repeats, 2, 1]
    if channels is None:
        plan = [*scaled([32, 64, 128, 128, 256, 256, 512, *[512] * repeats, 1024, 1024], width), num_classes]
    else:
        plan = checked(channels, len(strides) + 2, f"[conv0, pw1..pw{len(strides)}, num_classes]", num_classes)
    *plan, num_classes = plan
    features = [conv_bn(in_channels, plan[0], 3, stem_stride, activation=relu6)]
    for incoming, outgoing, stride in zip(plan, plan[1:], strides, strict=False):
        features.append(_separable(incoming, outgoing, 3, stride, last_activation=True))
    return Classifier(nn.Sequential(*features), plan[-1], num_classes)


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
        _Stage(24, 2, 2, 6, 3),
        _Stage(32, 3, 2, 6, 3),
        _Stage(64, 4, 2, 6, 3),
        _Stage(96, 3, 1, 6, 3),
        _Stage(160, 3, 2, 6, 3),
        _Stage(320, 1, 1, 6, 3),
    ]
    return _inverted_net(stages, width, channels, num_classes, in_channels, stem_stride)


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
        _Stage(24, 3, 2, 3, 3),
        _Stage(40, 3, 2, 3, 5),
        _Stage(80, 3, 2, 6, 5),
        _Stage(96, 2, 1, 6, 3),
        _Stage(192, 4, 2, 6, 5),
        _Stage(320, 1, 1, 6, 3),
    ]
    return _inverted_net(stages, width, channels, num_classes, in_channels, stem_stride)


class _Stage:
    """Blocks of equal width: channels, number of blocks, stride of the first, expansion, kernel size."""

    def __init__(self, channels: int, blocks: int, stride: int, expansion: int, kernel: int) -> None:
        self.channels, self.blocks, self.stride = channels, blocks, stride
        self.expansion, self.kernel = expansion, kernel


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; the input is added if the shape stays the same."""

    def __init__(self, incoming: int, middle: int, outgoing: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.expand = conv_bn(incoming, middle, activation=relu6)
        self.separable = _separable(middle, outgoing, kernel, stride, last_activation=False)
        self.is_residual = stride == 1 and incoming == outgoing

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride)."""
        y: Tensor = self.separable(self.expand(x))
        return x + y if self.is_residual else y


def _separable(incoming: int, outgoing: int, kernel: int, stride: int, *, last_activation: bool) -> nn.Sequential:
    depthwise = conv_bn(incoming, incoming, kernel, stride, groups=incoming, activation=relu6)
    return nn.Sequential(depthwise, conv_bn(incoming, outgoing, activation=relu6 if last_activation else None))


def _inverted_net(
    stages: Sequence[_Stage],
    width: float,
    channels: Sequence[int] | None,
    num_classes: int,
    in_channels: int,
    stem_stride: int,
) -> nn.Module:
    blocks = [(stage, index) for stage in stages for index in range(stage.blocks)]
    if channels is None:
        plan = scaled([32, 16], width)
        for stage, _ in blocks:
            plan += [plan[-1] * stage.expansion, make_divisible(stage.channels * width)]
        plan += [make_divisible(1280 * max(1.0, width)), num_classes]
    else:
        layout = f"[conv0, block0_out, (mid, out) for blocks 1..{len(blocks)}, conv_last, num_classes]"
        plan = checked(channels, 2 * len(blocks) + 4, layout, num_classes)
    conv0, block0, *pairs, last, num_classes = plan
    features: list[nn.Module] = [
        conv_bn(in_channels, conv0, 3, stem_stride, activation=relu6),
        _separable(conv0, block0, 3, 1, last_activation=False),
    ]
    incoming = block0
    for (stage, index), middle, outgoing in zip(blocks, pairs[::2], pairs[1::2], strict=True):
        stride = stage.stride if index == 0 else 1
        features.append(InvertedResidual(incoming, middle, outgoing, stage.kernel, stride))
        incoming = outgoing
    features.append(conv_bn(incoming, last, activation=relu6))
    return Classifier(nn.Sequential(*features), last, num_classes)
