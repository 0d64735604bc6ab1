"""What MobileNet v2 and MNasNet are made of: inverted residual blocks in stages."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from autoslim.space import make_divisible
from autoslim.zoo.layers import Classifier, check_options, checked, conv_bn, relu6, scaled, separable


class Stage:
    """Blocks of equal width: channels, number of blocks, stride of the first, expansion, kernel size."""

    def __init__(self, channels: int, blocks: int, stride: int, expansion: int, kernel: int) -> None:
        self.channels, self.blocks, self.stride = channels, blocks, stride
        self.expansion, self.kernel = expansion, kernel


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; the input is added if the shape stays the same."""

    def __init__(self, incoming: int, middle: int, outgoing: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.expand = conv_bn(incoming, middle, activation=relu6)
        self.separable = separable(middle, outgoing, kernel, stride, last_activation=False)
        self.is_residual = stride == 1 and incoming == outgoing

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride)."""
        y: Tensor = self.separable(self.expand(x))
        return x + y if self.is_residual else y


def inverted_net(
    stages: Sequence[Stage],
    width: float,
    channels: Sequence[int] | None,
    num_classes: int,
    in_channels: int,
    stem_stride: int,
) -> nn.Module:
    """A net of inverted residual blocks; see `mobilenet_v2` for what the arguments mean."""
    check_options(width, channels, num_classes=num_classes, in_channels=in_channels, stem_stride=stem_stride)
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
        separable(conv0, block0, 3, 1, last_activation=False),
    ]
    incoming = block0
    for (stage, index), middle, outgoing in zip(blocks, pairs[::2], pairs[1::2], strict=True):
        stride = stage.stride if index == 0 else 1
        features.append(InvertedResidual(incoming, middle, outgoing, stage.kernel, stride))
        incoming = outgoing
    features.append(conv_bn(incoming, last, activation=relu6))
    return Classifier(nn.Sequential(*features), last, num_classes)
