"""The package's networks cost what the papers say, and fit small and grey images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoslim import zoo
from autoslim.errors import ConfigError

PUBLISHED = json.loads((Path(__file__).parent / "golden" / "published_channels.json").read_text())
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "mbv1": zoo.mobilenet_v1,
    "mbv2": zoo.mobilenet_v2,
    "mnas": zoo.mnasnet,
    "r50": zoo.resnet50,
}


def costs(build: Callable[..., nn.Module], **options: object) -> tuple[float, float]:
    """Million MACs by torch's own counter at 224 pixels, million parameters."""
    with torch.device("meta"):
        net = build(**options).eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops() / 2e6, sum(p.numel() for p in net.parameters()) / 1e6


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry["name"])
def test_published_channel_lists_cost_what_the_paper_says(entry: dict) -> None:
    macs, params = costs(BUILDERS[entry["arch"]], channels=entry["channels_forward_order"])
    assert macs == pytest.approx(entry["computed_macs_M"], rel=1e-3)
    assert macs == pytest.approx(entry["claimed_macs_M"], rel=2e-3)
    assert round(params, 3) == entry["computed_params_M"]


@pytest.mark.parametrize(
    ("build", "width", "macs"),
    [
        (zoo.mobilenet_v1, 1.0, 569),
        (zoo.mobilenet_v1, 0.75, 325),
        (zoo.mobilenet_v1, 0.5, 150),
        (zoo.mobilenet_v2, 1.0, 301),
        (zoo.mobilenet_v2, 0.75, 209),
        (zoo.mobilenet_v2, 1.3, 509),
        (zoo.mnasnet, 1.0, 317),
        (zoo.mnasnet, 0.75, 216),
        (zoo.mnasnet, 1.3, 535),
        (zoo.resnet50, 1.0, 4089),
        (zoo.resnet50, 0.25, 278),
        (zoo.shufflenet_v1, 1.0, 138),
        (zoo.shufflenet_v1, 1.5, 292),
        (zoo.shufflenet_v2, 1.0, 146),
    ],
)
def test_width_multipliers_cost_what_the_papers_say(build: Callable[..., nn.Module], width: float, macs: float) -> None:
    assert costs(build, width=width)[0] == pytest.approx(macs, rel=0.012)


@pytest.mark.parametrize(
    "build",
    [zoo.mobilenet_v1, zoo.mobilenet_v2, zoo.mnasnet, zoo.shufflenet_v1, zoo.shufflenet_v2, zoo.resnet50, zoo.resnet20],
)
@pytest.mark.parametrize("size", [28, 32])
def test_small_grey_images(build: Callable[..., nn.Module], size: int) -> None:
    options = {} if build is zoo.resnet20 else {"stem_stride": 1}
    net = build(num_classes=7, in_channels=1, **options).eval()
    with torch.no_grad():
        logits = net(torch.randn(2, 1, size, size))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


def test_equal_seeds_give_equal_nets() -> None:
    torch.manual_seed(3)
    one = zoo.mobilenet_v2(0.25).state_dict()
    torch.manual_seed(3)
    two = zoo.mobilenet_v2(0.25).state_dict()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("build", "channels", "expected"),
    [
        (zoo.mobilenet_v1, [32, 64], "has 2 entries; this network needs 15"),
        (zoo.mobilenet_v1, [32] * 14 + [0], r"channels\[14\] is 0"),
        (zoo.mobilenet_v1, [32] * 13 + [1.5, 10], r"channels\[13\] is 1.5"),
        (zoo.mobilenet_v2, [16, 8] + [48, 16] * 15 + [48, 24] + [64, 10], "need one width"),
        (zoo.resnet50, [64] + [9] * 53, "has 54 entries; this network needs 54|every block of stage"),
    ],
)
def test_a_wrong_channel_list_is_explained(build: Callable[..., nn.Module], channels: list[int], expected: str) -> None:
    if build is zoo.mobilenet_v2:
        channels[5] = 24  # block 2 of the first stage differs from block 1
    if build is zoo.resnet50:
        channels[4] = 11
    with pytest.raises(ConfigError, match=expected):
        build(channels=channels)


def test_impossible_widths_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"0\.5, 1\.0, 1\.5, 2\.0"):
        zoo.shufflenet_v2(0.7)
    with pytest.raises(ConfigError, match="above 0"):
        zoo.mobilenet_v1(0)
