"""The nets that the authors published: channel lists, costs, and the accuracy claimed (ImageNet, 224 pixels)."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    claimed_memory: str
    claimed_top1: float
    source: str
    format: str
    channels: tuple[int, ...]


# the rest of the 13 nets of the table, with the top-1 claimed: we have no channel lists of them to build them from
WITHOUT_LISTS: Mapping[str, float] = {
    "mobilenet_v1-572m": 0.730,
    "mnasnet-532m": 0.754,
    "resnet50-570m": 0.722,
    "resnet50-2000m": 0.756,
    "resnet50-3000m": 0.760,
}


@cache
def published_nets() -> tuple[PublishedNet, ...]:
    """All of them, by network and from the smallest on."""
    text = (files("autoslim") / "assets" / "published.json").read_text(encoding="utf-8")
    return tuple(PublishedNet(**entry | {"channels": tuple(entry["channels"])}) for entry in json.loads(text))


def published_net(name: str) -> PublishedNet:
    """The net of this name, such as mobilenet_v2-207m; `ConfigError` with the nearest if there is none."""
    by_name = {net.name: net for net in published_nets()}
    if name in WITHOUT_LISTS:
        raise ConfigError(
            f"the channel list of {name!r} is not here, only the accuracy claimed; {nearest(name, by_name)}"
        )
    if name not in by_name:
        raise ConfigError(f"no published net {name!r}; {nearest(name, by_name)}")
    return by_name[name]
