"""The nets that the authors published: channel lists, costs, and the accuracy claimed (ImageNet, 224 pixels)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from autoslim.errors import ConfigError, nearest


@dataclass(frozen=True)
class PublishedNet:
    """A net of the AutoSlim table: `channels` builds it with the function `builder` of `autoslim.zoo`.

    MACs, parameters and memory are computed, in millions; what the paper claims stands beside. `claimed_top1` is a
    fraction, of training by the authors: nothing of theirs but the channel numbers is here.
    """

    name: str
    builder: str
    million_macs: float
    million_params: float
    million_memory: float
    claimed_million_macs: float
    claimed_params: str
    claimed_top1: float
    source: str
    format: str
    channels: tuple[int, ...]


@cache
def published_nets() -> tuple[PublishedNet, ...]:
    """All of them, by network and from the smallest on."""
    text = (files("autoslim") / "assets" / "published.json").read_text(encoding="utf-8")
    return tuple(PublishedNet(**entry | {"channels": tuple(entry["channels"])}) for entry in json.loads(text))


def published_net(name: str) -> PublishedNet:
    """The net of this name, such as mobilenet_v2-207m; `ConfigError` with the nearest if there is none."""
    by_name = {net.name: net for net in published_nets()}
    if name not in by_name:
        raise ConfigError(f"no published net {name!r}; {nearest(name, by_name)}")
    return by_name[name]
