"""The systems of the papers: which network a run trains, by which step, and what it gives at one of its widths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from autoslim.calibrate import recalibrate_batchnorm
from autoslim.config import Config
from autoslim.slicing import extract
from autoslim.space import ChannelSpace, Widths, name_of_ratio
from autoslim.supernet import Supernet
from autoslim.switchable import SwitchableNet, named_ratios
from autoslim.train import Step, sandwich_step, switch_step

Net = Supernet | SwitchableNet


def build_net(config: Config, model: nn.Module, space: ChannelSpace) -> Net:
    """The network that shares its weights among all widths; of an I-Net, which shares none, only a handle."""
    if config.system in ("s-net", "shared-bn"):
        widths = named_ratios(space, config.ratios, name_of_ratio("{:g}"))
        return SwitchableNet(model, space, widths, private=config.system == "s-net")
    return Supernet(model, space)


def training_step(config: Config, net: Net) -> Step:
    """The step that trains it."""
    if isinstance(net, SwitchableNet):
        return switch_step(net, config.train)
    ratios = (min(config.ratios), max(config.ratios)) if config.system == "us-net" else None
    return sandwich_step(net, config.train, ratios=ratios)


def net_at(net: Net, name: str, widths: Widths, batches: Iterable[Any]) -> nn.Module:
    """A plain module of these widths with the shared weights; `name` is its switch, if the net has switches.

    Statistics of BatchNorm are measured on `batches` (US-Net, section 3.4); switches bring their own.
    """
    if isinstance(net, SwitchableNet):
        return net.subnet(name)
    plain = extract(net.model, net.space, widths)
    recalibrate_batchnorm(plain, batches)
    return plain


def widths_of_ratios(space: ChannelSpace, ratios: Iterable[float]) -> Mapping[str, Widths]:
    """Uniform widths by the name of their ratio, the widest first."""
    return {name_of_ratio(ratio): space.uniform(ratio) for ratio in sorted(ratios, reverse=True)}
