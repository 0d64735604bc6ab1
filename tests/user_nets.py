"""What users bring, beyond the ordinary: more cases for `nets.MENAGERIE`. Importing this module registers them."""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nets import Case, Function, case, conv, head, image


class Sized(Function):
    """A `Function` that keeps whole numbers as attributes too."""

    def __init__(self, forward: Any, sizes: dict[str, Any], **modules: Any) -> None:
        super().__init__(forward, **modules)
        for name, value in sizes.items():
            setattr(self, name, value)


# --- sizes kept in attributes ------------------------------------------------------------------------------------


@case()
def split_by_stored_sizes() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b, c = torch.split(m.mixed(m.stem(x)), m.sizes, 1)
        return m.head(torch.cat([m.one(a), b, m.two(c)], 1))

    net = Sized(
        forward,
        {"sizes": (4, 5, 3)},
        stem=conv(3, 8),
        mixed=conv(8, 12),
        one=conv(4, 4, groups=4),
        two=conv(3, 6),
        head=nn.Sequential(*head(15)),
    )
    return net, image()


@case()
def split_by_a_list_and_back() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        a, b = x.split([m.touched, m.untouched], dim=1)
        return m.head(x + torch.cat((m.one(a), b), 1))

    sizes = {"touched": 3, "untouched": 7}
    return Sized(forward, sizes, stem=conv(3, 10), one=conv(3, 3), head=nn.Sequential(*head(10))), image()


@case()
def split_off_and_the_rest() -> Case:
    """SHViT: the second size is what the first leaves of a stored whole."""

    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = torch.split(m.stem(x), [m.part, m.dim - m.part], 1)
        return m.head(torch.cat([m.one(a), b], 1))

    sizes = {"part": 3, "dim": 10}
    return Sized(forward, sizes, stem=conv(3, 10), one=conv(3, 3), head=nn.Sequential(*head(10))), image()


@case()
def normalised_by_an_appended_one() -> Case:
    """Linear attention: a constant channel is appended, and divides the others."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.pad(m.stem(x).flatten(2).transpose(1, 2), (0, 1), value=1.0)
        return m.last(m.hidden(x[..., :-1] / x[..., -1:]).relu().mean(1))

    return Function(forward, stem=conv(3, 6), hidden=nn.Linear(6, 7), last=nn.Linear(7, 4)), image(size=3)


@case()
def split_by_one_width() -> Case:
    """Res2Net: equal parts of a stored width, each fed to the next."""

    def forward(m: Any, x: Tensor) -> Tensor:
        parts = torch.split(m.stem(x), m.width, 1)
        outs = [m.convs[0](parts[0])]
        for layer, part in zip(m.convs[1:], parts[1:-1], strict=True):
            outs.append(layer(outs[-1] + part))
        return m.head(torch.cat([*outs, parts[-1]], 1))

    convs = nn.ModuleList([conv(4, 4), conv(4, 4)])
    return Sized(forward, {"width": 4}, stem=conv(3, 12), convs=convs, head=nn.Sequential(*head(12))), image()


@case()
def slices_at_a_stored_place() -> Case:
    """DPN: the first channels are added to, the others appended."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.main(x)
        summed = x[:, : m.kept] + y[:, : m.kept]
        return m.head(torch.cat([summed, x[:, m.kept :], y[:, m.kept :]], 1))

    net = Sized(forward, {"kept": 6}, stem=conv(3, 8), main=conv(8, 9), head=nn.Sequential(conv(11, 6), *head(6)))
    return net, image()


@case(zeroable=False)
def heads_in_attributes() -> Case:
    """Attention over image positions; heads and their width are attributes."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        b, _, h, w = x.shape
        qkv = m.qkv(x).reshape(b, 3, m.num_heads, m.head_dim, h * w)
        q, k, v = qkv.unbind(1)
        weights = (q.transpose(-2, -1) @ k).softmax(-1)
        x = x + m.proj((v @ weights.transpose(-2, -1)).reshape(b, m.num_heads * m.head_dim, h, w))
        return m.head(x)

    net = Sized(
        forward,
        {"num_heads": 2, "head_dim": 6},
        stem=conv(3, 8),
        qkv=nn.Conv2d(8, 36, 1),
        proj=nn.Conv2d(12, 8, 1),
        head=nn.Sequential(*head(8)),
    )
    return net, image(size=4)


@case(zeroable=False)
def attention_of_a_transformer() -> Case:
    """As everyone writes it: the width of a head is `C // num_heads`, and the result is viewed as the input was."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        b, n, c = x.shape
        qkv = m.qkv(x).reshape(b, n, 3, m.num_heads, c // m.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + m.proj(y)
        return m.last((x + m.mlp(m.norm(x))).mean(1))

    net = Sized(
        forward,
        {"num_heads": 2},
        embed=nn.Linear(5, 12),
        qkv=nn.Linear(12, 36),
        proj=nn.Linear(12, 12),
        norm=nn.LayerNorm(12),
        mlp=nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)),
        last=nn.Linear(12, 4),
    )
    return net, torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))


@case()
def flattened_by_a_stored_size() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(m.hidden(m.stem(x).view(-1, m.channels * m.side * m.side)).relu())

    sizes = {"channels": 6, "side": 8}
    return Sized(forward, sizes, stem=conv(3, 6), hidden=nn.Linear(384, 20), last=nn.Linear(20, 4)), image()


@case()
def unflattened() -> Case:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 96), nn.ReLU(), nn.Unflatten(1, (6, 4, 4)), conv(6, 5), *head(5))
    return net, image()


@case()
def hidden_state_made_in_forward() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        state = torch.zeros(x.shape[0], m.hidden, *x.shape[2:], dtype=x.dtype, device=x.device)
        for _ in range(2):
            state = m.update(torch.cat([x, state], 1))
        return m.head(state)

    net = Sized(forward, {"hidden": 5}, stem=conv(3, 6), update=conv(11, 5), head=nn.Sequential(*head(5)))
    return net, image()


@case()
def shape_of_a_norm_in_forward() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.batch_norm(m.stem(x), None, None, m.scale, m.shift, True)
        return m.head(x.relu())

    net = Function(
        forward,
        stem=nn.Conv2d(3, 8, 3, padding=1),
        scale=nn.Parameter(torch.rand(8) + 0.5),
        shift=nn.Parameter(torch.randn(8)),
        head=nn.Sequential(*head(8)),
    )
    return net, image()


# --- parameters that are computed --------------------------------------------------------------------------------


@case(zeroable=False)  # a direction of zeros has no length to be divided by
def weight_norm() -> Case:
    def normed(layer: nn.Module) -> nn.Module:
        return parametrizations.weight_norm(layer)

    net = nn.Sequential(normed(nn.Conv2d(3, 8, 3)), nn.ReLU(), normed(nn.Conv2d(8, 6, 3)), nn.ReLU(), *head(6))
    return net, image()


@case(zeroable=False)
def weight_norm_of_old() -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stem = nn.utils.weight_norm(nn.Conv2d(3, 8, 3))
    return nn.Sequential(stem, nn.ReLU(), conv(8, 6), *head(6)), image()


@case(zeroable=False)
def spectral_norm() -> Case:
    stem, one = (parametrizations.spectral_norm(layer) for layer in (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)))
    return nn.Sequential(stem, nn.ReLU(), one, nn.ReLU(), *head(6)), image()


@case(zeroable=False)
def weight_standardised() -> Case:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = F.batch_norm(
                self.weight.reshape(1, self.out_channels, -1), None, None, self.gain, None, True, 0.0, 1e-6
            ).reshape_as(self.weight)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    layers = [Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 6, 1), nn.ReLU()]
    for layer in layers[::2]:
        layer.gain = nn.Parameter(torch.rand(layer.out_channels) + 0.5)
    return nn.Sequential(*layers, *head(6)), image()


@case()
def blur_from_a_buffer() -> Case:
    class Blur(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.channels = channels
            self.register_buffer("kernel", torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16)

        def forward(self, x: Tensor) -> Tensor:
            kernel = self.kernel.expand(self.channels, 1, 3, 3)
            return F.conv2d(x, kernel, stride=2, padding=1, groups=self.channels)

    return nn.Sequential(conv(3, 8), Blur(8), conv(8, 6), *head(6)), image()


@case()
def parameters_in_a_list() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        for weight, bias in zip(m.weights, m.biases, strict=True):
            x = F.conv2d(x, weight, bias, padding=1).relu()
        return m.head(x)

    net = Function(
        forward,
        weights=nn.ParameterList([torch.randn(6, 3, 3, 3) / 5, torch.randn(8, 6, 3, 3) / 7]),
        biases=nn.ParameterList([torch.randn(6), torch.randn(8)]),
        head=nn.Sequential(*head(8)),
    )
    return net, image()


@case()
def constants_in_buffers() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.stem((x - m.mean) / m.std) * m.scale + m.shift)

    net = Function(
        forward,
        mean=torch.rand(3, 1, 1),
        std=torch.rand(3, 1, 1) + 0.5,
        stem=conv(3, 8),
        scale=torch.rand(8, 1, 1),
        shift=torch.rand(1, 8, 1, 1),
        head=nn.Sequential(*head(8)),
    )
    return net, image()


@case()
def frozen_batch_norm() -> Case:
    class FrozenBatchNorm(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(channels) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight * (self.running_var + 1e-5).rsqrt()
            shift = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)

    return nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm(8), nn.ReLU(), conv(8, 6), *head(6)), image()


# --- channels that move ------------------------------------------------------------------------------------------


@case(zeroable=False)
def shuffled_units() -> Case:
    """ShuffleNet v2: halves, one of them convolved, shuffled; again and again."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([m.left(x), m.right(x)], 1)
        for unit in m.units:
            kept, used = F.channel_shuffle(x, 2).chunk(2, 1)
            x = torch.cat([kept, unit(used)], 1)
        return m.head(x)

    units = nn.ModuleList(nn.Sequential(conv(7, 5, 1), conv(5, 7)) for _ in range(4))
    net = Function(forward, left=conv(3, 7), right=conv(3, 7), units=units, head=nn.Sequential(*head(14)))
    return net, image()


@case(zeroable=False)
def unequal_chunks() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        parts = m.stem(x).chunk(3, 1)
        outs = [layer(part) for layer, part in zip(m.layers, parts, strict=True)]
        return m.head(torch.cat(outs, 1))

    layers = nn.ModuleList(conv(n, n, groups=n) for n in (4, 4, 3))
    return Function(forward, stem=conv(3, 11), layers=layers, head=nn.Sequential(*head(11))), image()


@case(zeroable=False)
def attention_along_channels() -> Case:
    """ECA: a convolution over the channels gates them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        gate = m.mix(x.mean((2, 3)).view(x.shape[0], 1, -1)).sigmoid()
        return m.head(x * gate.view(x.shape[0], -1, 1, 1))

    mix = nn.Conv1d(1, 1, 3, padding=1, bias=False)
    return Function(forward, stem=conv(3, 8), mix=mix, head=nn.Sequential(conv(8, 6), *head(6))), image()


@case()
def selected_kernels() -> Case:
    """SKNet: paths are stacked, weighed and summed."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        paths = torch.stack([m.one(x), m.two(x)], 1)
        b, c = paths.shape[0], paths.shape[2]
        gate = m.gate(paths.sum(1).mean((2, 3))).view(b, m.paths, c, 1, 1).softmax(1)
        return m.head((paths * gate).sum(1))

    net = Sized(
        forward,
        {"paths": 2},
        stem=conv(3, 6),
        one=conv(6, 8),
        two=conv(6, 8, 1),
        gate=nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 16)),
        head=nn.Sequential(*head(8)),
    )
    return net, image()


@case()
def unshuffled_pixels() -> Case:
    return nn.Sequential(conv(3, 4), nn.PixelUnshuffle(2), conv(16, 6), nn.PReLU(6), *head(6)), image()


@case()
def einsum_of_axes() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.einsum("bchw,dc->bdhw", m.stem(x), m.mix).relu())

    mix = nn.Parameter(torch.randn(6, 8) / 3)
    return Function(forward, stem=conv(3, 8), mix=mix, head=nn.Sequential(*head(6))), image()


@case()
def picked_and_put() -> Case:
    """Rows are picked by an index or a mask and written into a tensor made for them, as detectors do with regions."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        rows = torch.cat([x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]])
        result = torch.zeros((rows.shape[0], x.shape[1], 4, 4), dtype=x.dtype, device=x.device)
        order = torch.arange(rows.shape[0], device=x.device)
        result[order.flip(0)] = rows[order]
        return m.head(m.one(result.index_select(0, order[: x.shape[0]])))

    net = Function(forward, stem=conv(3, 8), one=conv(8, 6), head=nn.Sequential(*head(6)))
    return net, image()


@case()
def unfolded() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.last(m.hidden(F.unfold(x, 2, stride=2).transpose(1, 2)).relu().mean(1))

    return Function(forward, stem=conv(3, 5), hidden=nn.Linear(20, 7), last=nn.Linear(7, 4)), image()


# --- inputs, outputs, and habits ---------------------------------------------------------------------------------


@dataclass
class Answer:
    """An output that is no tensor."""

    logits: Tensor
    features: list[Tensor]


@case()
def dataclass_output() -> Case:
    def forward(m: Any, x: Tensor) -> Answer:
        x = m.one(m.stem(x))
        return Answer(m.head(x), [m.side(x)])

    net = Function(forward, stem=conv(3, 8), one=conv(8, 6), side=conv(6, 4), head=nn.Sequential(*head(6)))
    return net, image()


@case()
def lists_and_keywords() -> Case:
    def forward(m: Any, images: list[Tensor], *, scale: Tensor, flip: bool = False) -> Tensor:
        features = torch.stack([m.stem(one[None])[0] for one in images])
        features = features.flip(-1) if flip else features
        return m.head(features * scale)

    net = Function(forward, stem=conv(3, 8), head=nn.Sequential(conv(8, 6), *head(6)))
    return net, {"images": [*image()], "scale": torch.rand(1), "flip": True}


@case(zeroable=False)
def recurrent() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).flatten(2).transpose(1, 2)
        x, _ = m.lstm(m.proj(x))
        return m.last(m.gru(x)[0][:, -1])

    net = Function(
        forward,
        stem=conv(3, 8),
        proj=nn.Linear(8, 6),
        lstm=nn.LSTM(6, 5, batch_first=True),
        gru=nn.GRU(5, 4, batch_first=True),
        last=nn.Linear(4, 3),
    )
    return net, image(size=3)


@case(zeroable=False)
def recurrent_in_both_directions() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).flatten(2).permute(2, 0, 1)
        x, _ = m.lstm(m.proj(x))
        return m.last(m.gru(x)[0].mean(0))

    net = Function(
        forward,
        stem=conv(3, 8),
        proj=nn.Linear(8, 6),
        lstm=nn.LSTM(6, 5, num_layers=2, bidirectional=True, proj_size=3),
        gru=nn.GRU(6, 4, bidirectional=True, bias=False),
        last=nn.Linear(8, 3),
    )
    return net, image(size=3)


@case(zeroable=False)
def insists_on_its_channels() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.one(x)
        _, channels, _, _ = x.shape
        assert channels == m.channels, "channels"
        x = m.two(x / math.sqrt(channels))
        if x.shape[1] != m.embed_dim:
            raise ValueError("embed_dim")
        return m.last(x.flatten(2).mean(2) * channels**-0.5)

    net = Sized(
        forward, {"channels": 8, "embed_dim": 10}, one=conv(3, 8), two=nn.Conv2d(8, 10, 3), last=nn.Linear(10, 4)
    )
    return net, image()


@case()
def quantisation_stubs() -> Case:
    class Stub(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Observed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(0.1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127).to(x.dtype)

    return nn.Sequential(Stub(), conv(3, 8), Observed(), conv(8, 6), *head(6), Stub()), image()


@case()
def changes_itself() -> Case:
    """Counts its calls and keeps features between them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        m.last_features = m.stem(x)
        return m.head(m.one(m.last_features))

    return Sized(forward, {"calls": 3}, stem=conv(3, 8), one=conv(8, 6), head=nn.Sequential(*head(6))), image()


@case()
def looks_at_values() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(m.one(x) if float(x.detach().sum()) > -1e9 else m.two(x))

    return Function(forward, stem=conv(3, 8), one=conv(8, 6), two=conv(8, 6), head=nn.Sequential(*head(6))), image()


@case()
def stays_on_the_cpu() -> Case:
    """Does not run on meta tensors, but on fake ones."""

    def forward(m: Any, x: Tensor) -> Tensor:
        ramp = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype).to(x.device)
        return m.head((m.stem(x) * ramp).cpu())

    return Function(forward, stem=conv(3, 8), head=nn.Sequential(conv(8, 6), *head(6))), image()


@case()
def draws_its_path() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = m.one(x) if random.random() < 2 else m.two(x)
        return m.head(x)

    return Function(forward, stem=conv(3, 8), one=conv(8, 6), two=conv(8, 6), head=nn.Sequential(*head(6))), image()


@case(zeroable=False)
def deviations_of_groups() -> Case:
    """EvoNorm: the deviation within parts of the channels, spread over them again."""

    def forward(net: Function, x: Tensor) -> Tensor:
        x = net.stem(x)
        batch, channels, height, width = x.shape
        parts = x.reshape(batch, channels // 2, 2, height, width)
        deviation = parts.var(dim=(2, 3, 4), unbiased=False, keepdim=True).add(1e-5).sqrt()
        x = x * x.sigmoid() / deviation.expand(parts.shape).reshape(batch, channels, height, width)
        return net.head(x)

    return Function(forward, stem=conv(3, 8), head=nn.Sequential(*head(8))), image()


@case(zeroable=False)
def rms_norm() -> Case:
    """With and without a scale, as a layer and as a function."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        x = x + m.two(m.one(m.norm(x)).relu())
        return m.last(F.rms_norm(m.bare(x), x.shape[-1:]))

    net = Function(
        forward,
        embed=nn.Linear(5, 8),
        norm=nn.RMSNorm(8),
        bare=nn.RMSNorm(8, elementwise_affine=False),
        one=nn.Linear(8, 12),
        two=nn.Linear(12, 8),
        last=nn.Linear(8, 3),
    )
    return net, torch.randn(2, 7, 5)


@case()
def expanded_and_joined() -> Case:
    """Image features (ASPP), global features (PointNet): one place, expanded to all, beside those of each place."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        pooled = m.pooled(x.mean((2, 3), keepdim=True)).relu().expand(-1, -1, *x.shape[2:])
        return m.head(torch.cat([m.local(x), pooled], 1))

    net = Function(
        forward,
        stem=conv(3, 8),
        local=conv(8, 6),
        pooled=nn.Conv2d(8, 10, 1),
        head=nn.Sequential(conv(16, 8), *head(8)),
    )
    return net, image()
