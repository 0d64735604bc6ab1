"""What the networks share: rounding of widths, a convolution with its BatchNorm, weights to begin with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real

from torch import Tensor, nn

from autoslim.errors import ConfigError
from autoslim.space import make_divisible


def check_options(width: object, channels: object = None, **counts: object) -> None:
    """`ConfigError` for options of a builder that cannot be: `counts` are numbers of at least 1, by their names."""
    if not isinstance(width, Real) or isinstance(width, bool) or not 0 < float(width) < math.inf:
        shown = " (a list of channels goes to channels=)" if isinstance(width, (Sequence, Tensor)) else ""
        raise ConfigError(f"width must be a number above 0, got {_short(width)}{shown}; the papers use 0.25 to 1.5")
    if channels is not None and width != 1.0:
        raise ConfigError(f"channels says how wide every layer is; width={width} beside it must be left out")
    for name, count in counts.items():
        if not _is_count(count):
            raise ConfigError(f"{name} must be a whole number of at least 1, got {_short(count)}")


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else text[:37] + "..."


def scaled(channels: Sequence[int], width: float) -> list[int]:
    """Channel numbers at a width multiplier."""
    return [make_divisible(channel * width) for channel in channels]


def checked(channels: Sequence[int], length: int, layout: str, num_classes: int) -> list[int]:
    """An explicit channel list of the right length; its last entry is the number of classes.

    A `num_classes` that differs from it was asked for by the caller, unless it is the default of 1000.
    """
    if isinstance(channels, str) or not isinstance(channels, Iterable):
        raise ConfigError(f"channels must be a list, {layout}; got {_short(channels)}")
    listed = [channel.item() if isinstance(channel, Tensor) and channel.ndim == 0 else channel for channel in channels]
    if len(listed) != length:
        raise ConfigError(f"channels has {len(listed)} entries; this network needs {length}: {layout}")
    for index, channel in enumerate(listed):
        if not _is_count(channel):
            raise ConfigError(f"channels[{index}] is {_short(channel)}; every entry is a whole number of at least 1")
    if num_classes not in (1000, listed[-1]):
        raise ConfigError(
            f"channels ends with {listed[-1]} classes and num_classes is {num_classes}; "
            f"end the list with {num_classes}, or leave num_classes out"
        )
    return [int(channel) for channel in listed]  # numbers of NumPy become Python's


def conv_bn(
    incoming: int,
    outgoing: int,
    kernel: int = 1,
    stride: int = 1,
    *,
    groups: int = 1,
    activation: Callable[[], nn.Module] | None = None,
) -> nn.Sequential:
    """A convolution without bias that keeps the size (at stride 1), BatchNorm, and an activation if there is one."""
    layers: list[nn.Module] = [
        nn.Conv2d(incoming, outgoing, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outgoing),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))


def separable(incoming: int, outgoing: int, kernel: int, stride: int, *, last_activation: bool) -> nn.Sequential:
    """A depthwise convolution and a 1x1 convolution, each with its BatchNorm; an activation after the first."""
    depthwise = conv_bn(incoming, incoming, kernel, stride, groups=incoming, activation=relu6)
    return nn.Sequential(depthwise, conv_bn(incoming, outgoing, activation=relu6 if last_activation else None))


def relu6() -> nn.Module:
    """The activation of the mobile networks."""
    return nn.ReLU6(inplace=True)


def relu() -> nn.Module:
    """The activation of the residual networks."""
    return nn.ReLU(inplace=True)


def initialise(model: nn.Module) -> None:
    """Convolutions N(0, sqrt(2 / (k * k * out))), linear layers N(0, 0.01), biases 0, as the papers' code."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


class Residual(nn.Module):
    """relu(main(x) + shortcut(x)); the shortcut is a 1x1 projection where the shape changes."""

    def __init__(self, main: nn.Sequential, incoming: int, outgoing: int, stride: int) -> None:
        super().__init__()
        self.main = main
        same = stride == 1 and incoming == outgoing
        self.shortcut = nn.Identity() if same else conv_bn(incoming, outgoing, 1, stride)
        self.activation = relu()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride)."""
        return self.activation(self.main(x) + self.shortcut(x))  # type: ignore[no-any-return]


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` equal parts of (N, C, H, W)."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


class Classifier(nn.Module):
    """Features (N, C, H, W), global average, one linear layer: logits (N, classes)."""

    def __init__(self, features: nn.Sequential, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images (N, C, H, W)."""
        return self.classifier(self.pool(self.features(images)).flatten(1))  # type: ignore[no-any-return]
