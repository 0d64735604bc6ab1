"""A user's own network file, as the command line is given it: `tests/small_net.py:net`."""

from torch import Tensor, nn


class Net(nn.Module):
    """A residual net for 16x16 grey images, with Python control flow in its forward."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, 2 * channels, 3, 1, 1, bias=False),
                nn.BatchNorm2d(2 * channels),
                nn.ReLU(),
                nn.Conv2d(2 * channels, channels, 1, bias=False),
                nn.BatchNorm2d(channels),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            x = x + block(x) if index or x.shape[-1] > 4 else block(x)
        return self.head(x.relu().mean((2, 3)))


def net(channels: int = 16, classes: int = 4) -> nn.Module:
    return Net(channels, classes)


def not_a_module() -> str:
    return "surprise"


def crashes() -> nn.Module:
    raise RuntimeError("the weights are on the other disk")


def only_linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 4))


class Flat(nn.Module):
    """A net without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.second, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.stem(x).relu()).relu().mean((2, 3)))


def flat() -> nn.Module:
    return Flat()


NUMBER = 3


class Auxiliary(Net):
    """Gives two outputs while it is trained, as GoogLeNet does."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return (logits, logits) if self.training else logits  # type: ignore[return-value]


def auxiliary() -> nn.Module:
    return Auxiliary(16, 4)


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("the second teacher is missing")
        return super().forward(x)


def broken() -> nn.Module:
    return Broken(16, 4)
