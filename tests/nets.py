"""Tiny nets, one per difficulty, each with an example input. `MENAGERIE` maps a name to a function that builds both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Case = tuple[nn.Module, Any]
MENAGERIE: dict[str, Callable[[], Case]] = {}
# nets in which a channel whose parameters are zero is as good as gone, wherever it is used
ZEROABLE: set[str] = set()


def case(*, zeroable: bool = True) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def register(build: Callable[[], Case]) -> Callable[[], Case]:
        MENAGERIE[build.__name__] = build
        if zeroable:
            ZEROABLE.add(build.__name__)
        return build

    return register


def conv(incoming: int, outgoing: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(incoming, outgoing, kernel, padding=kernel // 2, **options), nn.BatchNorm2d(outgoing), nn.ReLU()
    )


def image(channels: int = 3, size: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]


class Function(nn.Module):
    """Modules by name, and a forward that is given as a function of them."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        self._function = forward
        for name, value in modules.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self, *args, **kwargs)


@case()
def plain() -> Case:
    return nn.Sequential(conv(3, 8), nn.MaxPool2d(2), conv(8, 12), *head(12)), image()


@case()
def grey_input() -> Case:
    return nn.Sequential(conv(1, 8), conv(8, 6), *head(6)), image(1)


@case()
def residual() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = x + m.one(x)
        y += m.two(x)
        return m.head(y)

    net = Function(
        forward,
        stem=conv(3, 8),
        one=nn.Sequential(conv(8, 6), conv(6, 8, 1)),
        two=conv(8, 8),
        head=nn.Sequential(*head(8)),
    )
    return net, image()


@case()
def depthwise() -> Case:
    return nn.Sequential(conv(3, 8), conv(8, 8, groups=8), conv(8, 10, 1), *head(10)), image()


@case()
def depth_multiplier() -> Case:
    return nn.Sequential(conv(3, 6), conv(6, 12, groups=6), conv(12, 8, 1), *head(8)), image()


@case()
def grouped() -> Case:
    return nn.Sequential(conv(3, 12), conv(12, 24, groups=4), conv(24, 8, 1), *head(8)), image()


@case()
def grouped_and_shuffled() -> Case:
    """ShuffleNet v1: no whole group can be cut, every group keeps the same ranks."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.one(m.stem(x))
        n, c, h, w = x.shape
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.head(m.three(m.two(x)))

    net = Function(
        forward,
        stem=conv(3, 12),
        one=conv(12, 27, 1, groups=3),
        two=conv(27, 27, groups=27),
        three=conv(27, 12, 1, groups=3),
        head=nn.Sequential(*head(12)),
    )
    return net, image()


@case()
def concatenated() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        a = m.stem(x)
        b = torch.cat([a, m.one(a)], 1)
        c = torch.cat([m.two(b), b], 1)
        return m.head(m.norm(c).relu())

    net = Function(
        forward,
        stem=conv(3, 6),
        one=conv(6, 4),
        two=conv(10, 8),
        norm=nn.BatchNorm2d(18),
        head=nn.Sequential(conv(18, 8), *head(8)),
    )
    return net, image()


@case()
def split_and_shuffled() -> Case:
    """A unit of ShuffleNet v2."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        a, b = x.chunk(2, 1)
        x = torch.cat([a, m.main(b)], 1)
        n, c, h, w = x.shape
        return m.head(x.view(n, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2))

    main = nn.Sequential(conv(8, 10, 1), conv(10, 10, groups=10), conv(10, 8, 1))
    return Function(forward, stem=conv(3, 16), main=main, head=nn.Sequential(*head(16))), image()


@case()
def flattened() -> Case:
    return nn.Sequential(
        conv(3, 6), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 5)
    ), image()


@case()
def shared_layer() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(m.twice(m.twice(x)))

    return Function(forward, stem=conv(3, 8), twice=conv(8, 8), head=nn.Sequential(*head(8))), image()


@case()
def squeeze_excite() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        gate = m.up(m.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return m.head(x * gate)

    net = Function(
        forward, stem=conv(3, 12), down=nn.Conv2d(12, 4, 1), up=nn.Conv2d(4, 12, 1), head=nn.Sequential(*head(12))
    )
    return net, image()


@case()
def tied_weights() -> Case:
    net = nn.Sequential(conv(3, 8), conv(8, 8), conv(8, 8), *head(8))
    net[2][0].weight = net[1][0].weight
    return net, image()


@case(zeroable=False)
def embedding_shared_with_the_output() -> Case:
    def forward(m: Any, tokens: Tensor) -> Tensor:
        x = m.embed(tokens)
        x = x + m.two(m.one(x).relu())
        return x @ m.embed.weight.t()

    net = Function(forward, embed=nn.Embedding(11, 8), one=nn.Linear(8, 12), two=nn.Linear(12, 8))
    return net, torch.arange(6).view(2, 3)


@case()
def transposed() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.norm(m.up(m.stem(x))).relu())

    net = Function(
        forward,
        stem=conv(3, 8),
        up=nn.ConvTranspose2d(8, 6, 4, 2, 1),
        norm=nn.BatchNorm2d(6),
        head=nn.Sequential(*head(6)),
    )
    return net, image()


@case()
def transposed_in_groups() -> Case:
    return nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 16, 2, 2, groups=4), conv(16, 6), *head(6)), image()


@case(zeroable=False)
def layer_norm() -> Case:
    """A block of ConvNeXt, with its layer scale."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.norm(m.depthwise(x).permute(0, 2, 3, 1))
        y = (m.scale * m.two(F.gelu(m.one(y)))).permute(0, 3, 1, 2)
        x = F.layer_norm((x + y).mean((2, 3)), (x.shape[1],))
        return m.head(x)

    net = Function(
        forward,
        stem=nn.Conv2d(3, 8, 2, 2),
        depthwise=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        norm=nn.LayerNorm(8),
        one=nn.Linear(8, 24),
        two=nn.Linear(24, 8),
        scale=nn.Parameter(torch.rand(8)),
        head=nn.Linear(8, 5),
    )
    return net, image()


@case(zeroable=False)
def group_norm() -> Case:
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 6, 3), *head(6)), image()


@case(zeroable=False)
def instance_norm() -> Case:
    norm = nn.InstanceNorm2d(8, affine=True)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.PReLU(8), nn.Conv2d(8, 6, 3), *head(6)), image()


@case()
def padded_shortcut() -> Case:
    """ResNet's option A: zeros stand in for the channels that the shortcut lacks."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + m.main(x))

    main = nn.Sequential(conv(6, 10), conv(10, 10, stride=2))
    return Function(forward, stem=conv(3, 6), main=main, head=nn.Sequential(*head(10))), image()


@case()
def partial_sum() -> Case:
    """ReXNet: only the first channels get a shortcut."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.main(x)
        y = torch.cat([y[:, : x.shape[1]] + x, y[:, x.shape[1] :]], 1)
        return m.head(y)

    return Function(forward, stem=conv(3, 6), main=conv(6, 10), head=nn.Sequential(*head(10))), image()


@case()
def halves() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        c = x.shape[1]
        return m.head(x[:, : c // 2] * x[:, c // 2 :].sigmoid())

    return Function(forward, stem=conv(3, 12), head=nn.Sequential(conv(6, 6), *head(6))), image()


@case()
def gated() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(F.glu(m.stem(x), dim=1))

    return Function(forward, stem=nn.Conv2d(3, 12, 3), head=nn.Sequential(conv(6, 6), *head(6))), image()


@case()
def control_flow() -> Case:
    def forward(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        for layer in m.layers:
            if x.shape[-1] > 2:
                x = F.max_pool2d(layer(x), 2)
        return (m.head(x), m.aux(x.mean((2, 3)))) if m.training else m.head(x)

    net = Function(
        forward,
        stem=conv(3, 8),
        layers=nn.ModuleList([conv(8, 8), conv(8, 8), conv(8, 8)]),
        head=nn.Sequential(*head(8)),
        aux=nn.Linear(8, 5),
    )
    return net, image()


@case()
def auxiliary_head_with_norm() -> Case:
    """Inception: the auxiliary head normalises one value per channel, so one example is too few in training mode."""

    def forward(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        return (m.head(x), m.aux(x)) if m.training else m.head(x)

    aux = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(8, 6, 1), nn.Flatten(), nn.Linear(6, 5))
    return Function(forward, stem=conv(3, 8), head=nn.Sequential(*head(8)), aux=aux), image()


@case()
def dictionary_output() -> Case:
    def forward(m: Any, x: Tensor) -> dict[str, Any]:
        x = m.stem(x)
        return {"logits": m.head(x), "maps": [m.maps(x)]}

    return Function(forward, stem=conv(3, 8), head=nn.Sequential(*head(8)), maps=nn.Conv2d(8, 2, 1)), image()


@case()
def several_inputs() -> Case:
    def forward(m: Any, x: Tensor, *, other: Tensor, scale: float) -> Tensor:
        return m.head(torch.cat([m.left(x), m.right(other) * scale], 1))

    net = Function(forward, left=conv(3, 8), right=conv(1, 6), head=nn.Sequential(conv(14, 8), *head(8)))
    return net, {"x": image(), "other": image(1), "scale": 0.5}


@case()
def one_dimensional() -> Case:
    layers = [nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.AdaptiveAvgPool1d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 3)), torch.randn(2, 2, 12)


@case()
def three_dimensional() -> Case:
    layers = [nn.Conv3d(1, 6, 3), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(6, 4, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)), torch.randn(2, 1, 6, 6, 6)


@case()
def functional() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.conv2d(x, m.first, m.bias).relu()
        x = F.conv2d(x, m.second.transpose(0, 1)).relu()
        return F.linear(x.mean((2, 3)), m.last)

    net = Function(
        forward,
        first=nn.Parameter(torch.randn(8, 3, 3, 3)),
        bias=nn.Parameter(torch.randn(8)),
        second=nn.Parameter(torch.randn(8, 6, 1, 1)),
        last=nn.Parameter(torch.randn(5, 6)),
    )
    return net, image()


@case()
def pixel_shuffle() -> Case:
    return nn.Sequential(conv(3, 8), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2), conv(3, 6), *head(6)), image()


@case()
def resized_and_padded() -> Case:
    layers = [conv(3, 8), nn.ReflectionPad2d(1), nn.Upsample(scale_factor=2), nn.Upsample(size=9, mode="bilinear")]
    return nn.Sequential(*layers, conv(8, 6), *head(6)), image()


@case()
def linear_on_sequences() -> Case:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)), torch.randn(
        2, 3, 6
    )


@case(zeroable=False)
def attention() -> Case:
    """A transformer block with hand-written attention of two heads."""

    def forward(m: Any, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = m.qkv(m.norm(x)).reshape(n, length, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, -1)
        x = x + m.project(y)
        return x + m.two(F.gelu(m.one(x)))

    net = Function(
        forward,
        norm=nn.LayerNorm(8),
        qkv=nn.Linear(8, 24),
        project=nn.Linear(8, 8),
        one=nn.Linear(8, 16),
        two=nn.Linear(16, 8),
    )
    return net, torch.randn(2, 5, 8)


@case(zeroable=False)
def multihead_attention() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, _ = m.attend(x, x, x, need_weights=False)
        return m.two(m.one(x + y).relu())

    net = Function(
        forward, attend=nn.MultiheadAttention(8, 2, batch_first=True), one=nn.Linear(8, 16), two=nn.Linear(16, 8)
    )
    return net, torch.randn(2, 5, 8)


@case()
def hard_coded_view() -> Case:
    """`mixed` cannot be cut: its number of channels is written into the forward."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.mixed(m.stem(x))
        return m.head(x.view(2, 4, 3, 64).sum(2).view(2, 4, 8, 8))

    return Function(forward, stem=conv(3, 8), mixed=conv(8, 12), head=nn.Sequential(conv(4, 6), *head(6))), image()


@case()
def stored_split() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.mixed(m.stem(x)).split([4, 8], 1)
        return m.head(torch.cat([m.one(a), b], 1))

    net = Function(
        forward, stem=conv(3, 8), mixed=conv(8, 12), one=conv(4, 6), head=nn.Sequential(conv(14, 6), *head(6))
    )
    return net, image()


@case()
def unknown_operator() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.mixed(m.stem(x))
        return m.head(torch.cummax(x, 1).values)

    return Function(forward, stem=conv(3, 8), mixed=conv(8, 6), head=nn.Sequential(conv(6, 6), *head(6))), image()


@case()
def full_size_constant() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.mixed(m.stem(x)) * m.mask)

    mask = torch.rand(1, 6, 1, 1)
    net = Function(forward, stem=conv(3, 8), mixed=conv(8, 6), mask=mask, head=nn.Sequential(*head(6)))
    return net, image()


@case()
def written_in_place() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        out = torch.zeros(2, 10, 8, 8, dtype=x.dtype, device=x.device)
        out[:, :6] = m.main(x)
        out[:, 6:] += 1
        return m.head(out)

    return Function(forward, stem=conv(3, 8), main=conv(8, 6), head=nn.Sequential(conv(10, 6), *head(6))), image()


@case()
def noise_and_masks() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + torch.zeros_like(x) + torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        mask = m.where(x).sigmoid().expand_as(x)
        return m.head(F.dropout2d(x * mask, 0.1, m.training))

    return Function(forward, stem=conv(3, 8), where=nn.Conv2d(8, 1, 1), head=nn.Sequential(*head(8))), image()


def build(name: str, seed: int = 0) -> Case:
    """A case in double precision, with statistics and affine parameters of BatchNorm that are not trivial."""
    torch.manual_seed(seed)
    net, inputs = MENAGERIE[name]()
    randomise(net.double())
    as_double = lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf  # noqa: E731
    return net, torch.utils._pytree.tree_map(as_double, inputs)


def randomise(net: nn.Module) -> None:
    """Fill statistics and affine parameters of norms at random."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
        if (
            isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm))
            and module.weight is not None
        ):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
