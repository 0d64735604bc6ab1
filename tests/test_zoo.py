"""The package's networks cost what the papers say, compute what torchvision's do, and fit small and grey images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoslim import MemoryCost, extract, trace, zoo
from autoslim.cli import main
from autoslim.errors import ConfigError
from autoslim.models import build_model
from autoslim.published import WITHOUT_LISTS, PublishedNet, published_net, published_nets


def costs(build: Callable[..., nn.Module], **options: object) -> tuple[float, float, float]:
    """In millions at 224 pixels: MACs by torch's own counter, parameters, memory as the paper counts it."""
    with torch.device("meta"):
        net = build(**options).eval()
    outputs: list[int] = []
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output.numel()))
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, 224, 224, device="meta"))
    params = sum(p.numel() for p in net.parameters())
    return counter.get_total_flops() / 2e6, params / 1e6, (params + sum(outputs)) / 1e6


def as_shown(million: float, claimed: str) -> bool:
    """Is this the digit that the paper shows? It rounds some of its figures and cuts others off."""
    return claimed in (f"{million:.1f}M", f"{math.floor(10 * million) / 10:.1f}M")


@pytest.mark.parametrize("net", published_nets(), ids=lambda net: net.name)
def test_published_nets_cost_what_the_paper_says(net: PublishedNet) -> None:
    macs, params, memory = costs(getattr(zoo, net.builder), channels=net.channels)
    assert macs == pytest.approx(net.million_macs, abs=1e-6)
    assert macs == pytest.approx(net.claimed_million_macs, rel=1.2e-3)
    assert round(1e6 * params) == round(1e6 * net.million_params)  # to the last one: rounded twice it may be another
    assert as_shown(params, net.claimed_params)  # MBv2 305M: 5.7, and 5.77
    model = build_model(f"autoslim:published/{net.name}", {"num_classes": 7})
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    space = trace(model, torch.zeros(1, 3, 224, 224))
    classifier = 993 * (net.channels[-2] + 2) / 1e6  # seven classes are 993 fewer: weights, bias and output
    assert MemoryCost(space)(space.full()) / 1e6 == pytest.approx(memory - classifier, abs=1e-6)
    assert memory == pytest.approx(net.million_memory, abs=1e-6)
    assert as_shown(memory, net.claimed_memory)


def test_the_published_nets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["published"]) == 0
    table = capsys.readouterr().out
    assert "4.13M (4.1M)" in table  # 4,125,104: what `inspect` says
    for net in published_nets():
        line = next(line for line in table.splitlines() if net.name in line)
        assert f"({net.claimed_params})" in line
        assert f"({net.claimed_memory})" in line
    assert len(published_nets()) + len(WITHOUT_LISTS) == 13
    assert all(name in table for name in WITHOUT_LISTS)
    assert main(["published", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == [net.name for net in published_nets()]
    with pytest.raises(ConfigError, match="mobilenet_v2-207m"):
        build_model("autoslim:published/mobilenet_v2-207")
    with pytest.raises(ConfigError, match="the channel list of 'resnet50-570m' is not here"):
        build_model("autoslim:published/resnet50-570m")


@pytest.mark.parametrize(
    ("build", "width", "macs", "params", "memory"),  # million, as the papers print them; None where they say nothing
    [
        (zoo.mobilenet_v1, 1.0, 569, "4.2M", "9.3M"),
        (zoo.mobilenet_v1, 0.75, 325, "2.6M", "6.4M"),
        (zoo.mobilenet_v1, 0.5, 150, "1.3M", "3.8M"),
        (zoo.mobilenet_v2, 1.0, 300, "3.5M", "10.2M"),
        (zoo.mobilenet_v2, 0.75, 209, "2.6M", "8.5M"),
        (zoo.mobilenet_v2, 1.3, 509, "5.3M", "14.3M"),
        (zoo.mnasnet, 1.0, 317, "4.3M", "9.8M"),  # 314.4 here
        (zoo.mnasnet, 0.75, 216, "3.1M", "7.9M"),
        (zoo.mnasnet, 1.3, 535, "6.8M", "14.2M"),
        (zoo.resnet50, 1.0, 4100, "25.5M", "36.6M"),
        (zoo.resnet50, 0.75, 2300, "14.7M", "23.1M"),
        (zoo.resnet50, 0.5, 1100, None, "12.5M"),  # 1,052 here, which is 1.1G; parameters 6.9M, the paper has 6.8M
        (zoo.resnet50, 0.25, 278, "1.9M", "4.8M"),
        (zoo.shufflenet_v1, 0.5, 38, None, None),
        (zoo.shufflenet_v1, 1.0, 138, "1.8M", "4.9M"),
        (zoo.shufflenet_v1, 1.5, 292, "3.4M", None),  # memory 7.8M, the paper has 8.0M
        (zoo.shufflenet_v1, 2.0, 524, "5.4M", None),  # memory 11.4M, the paper has 11.6M
        (zoo.shufflenet_v2, 1.0, 146, None, None),
        (zoo.shufflenet_v2, 2.0, 591, None, None),  # 583 here
    ],
)
def test_width_multipliers_cost_what_the_papers_say(
    build: Callable[..., nn.Module], width: float, macs: float, params: str | None, memory: str | None
) -> None:
    measured_macs, measured_params, measured_memory = costs(build, width=width)
    shown = round(measured_macs, -2) if macs in (1100, 2300, 4100) else measured_macs  # in G, with one digit
    # the papers' 38 is 37.6, and ShuffleNet v2 at 2.0 has 1.3 % less; everything else is within 1 %
    assert shown == pytest.approx(macs, rel=0.014, abs=0.5)
    assert params is None or as_shown(measured_params, params)
    assert memory is None or as_shown(measured_memory, memory)


@pytest.mark.parametrize(
    ("build", "width", "name"),
    [
        (zoo.mobilenet_v2, 1.0, "mobilenet_v2"),
        (zoo.resnet50, 1.0, "resnet50"),
        (zoo.shufflenet_v2, 0.5, "shufflenet_v2_x0_5"),
        (zoo.shufflenet_v2, 2.0, "shufflenet_v2_x2_0"),
    ],
)
def test_the_function_is_that_of_torchvision(build: Callable[..., nn.Module], width: float, name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    theirs, ours = models.get_model(name, weights=None).eval(), build(width).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):  # fresh ones would hide a mistaken order
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize(
    ("build", "num_groups"),
    [(zoo.mobilenet_v1, 14), (zoo.mobilenet_v2, 25), (zoo.resnet50, 37), (zoo.resnet20, 12), (zoo.resnet56, 30)],
)
def test_the_channels_can_be_cut_as_in_the_papers(build: Callable[..., nn.Module], num_groups: int) -> None:
    net, images = build(num_classes=10).eval(), torch.randn(1, 3, 32, 32)
    space = trace(net, images)
    assert len(space.groups) == num_groups
    assert [note.name for note in space.notes] == ["classifier"]
    with torch.no_grad():
        assert extract(net, space, space.smallest())(images).shape == (1, 10)


@pytest.mark.parametrize(
    "build",
    [
        zoo.mobilenet_v1,
        zoo.mobilenet_v2,
        zoo.mnasnet,
        zoo.shufflenet_v1,
        zoo.shufflenet_v2,
        zoo.resnet50,
        zoo.resnet20,
        zoo.resnet56,
    ],
)
@pytest.mark.parametrize("size", [28, 32])
def test_small_grey_images(build: Callable[..., nn.Module], size: int) -> None:
    options = {} if build in (zoo.resnet20, zoo.resnet56) else {"stem_stride": 1}
    net = build(num_classes=7, in_channels=1, **options).eval()
    with torch.no_grad():
        logits = net(torch.randn(2, 1, size, size))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_a_shallow_mobilenet_for_the_quickstart(stem_stride: int) -> None:
    options = {"num_classes": 10, "in_channels": 1, "stem_stride": stem_stride}
    net = zoo.mobilenet_v1(0.5, repeats=1, **options).eval()
    with torch.no_grad():
        assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    convolutions = [sum(isinstance(m, nn.Conv2d) for m in each.modules()) for each in (net, zoo.mobilenet_v1(0.5))]
    assert convolutions == [19, 27]


def test_equal_seeds_give_equal_nets() -> None:
    nets = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        nets.append(zoo.mobilenet_v2(0.25).state_dict())
    one, two, other = nets
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert not torch.equal(one["features.0.0.weight"], other["features.0.0.weight"])


@pytest.mark.parametrize("build", [zoo.mobilenet_v1, zoo.resnet20, zoo.shufflenet_v1])
def test_initial_weights_are_those_of_the_papers_code(build: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    for module in build(num_classes=1000).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            kernel_height, kernel_width = module.kernel_size
            expected = math.sqrt(2 / (kernel_height * kernel_width * module.out_channels))  # depthwise ones too
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06)
        elif isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.06)
            assert not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_a_block_adds_its_input_only_where_the_shape_stays() -> None:
    published = published_net("mobilenet_v2-207m").channels
    blocks = list(zoo.mobilenet_v2(channels=published).features)[2:-1]
    assert [i for i, block in enumerate(blocks) if block.is_residual] == [1, 3, 4, 6, 7, 8, 10, 11, 13, 14]
    uneven = [*published]
    uneven[5] = 24  # block 2 gives 24 channels and is given 16
    net = zoo.mobilenet_v2(channels=uneven).eval()
    assert not list(net.features)[3].is_residual
    with torch.no_grad():
        assert net(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_a_channel_list_sets_the_number_of_classes() -> None:
    channels = [8] * 14 + [7]
    for same in (channels, np.array(channels), torch.tensor(channels), [torch.tensor(each) for each in channels]):
        for net in (zoo.mobilenet_v1(channels=same), zoo.mobilenet_v1(channels=same, num_classes=7)):
            assert net.classifier.out_features == 7
            assert type(net.features[0][0].out_channels) is int
    with pytest.raises(ConfigError, match="channels ends with 7 classes and num_classes is 10; end the list with 10"):
        zoo.mobilenet_v1(channels=channels, num_classes=10)


@pytest.mark.parametrize(
    ("build", "channels", "expected"),
    [
        (zoo.mobilenet_v1, [32, 64], "has 2 entries; this network needs 15"),
        (zoo.mobilenet_v1, [32] * 14 + [0], r"channels\[14\] is 0"),
        (zoo.mobilenet_v1, [32] * 13 + [1.5, 10], r"channels\[13\] is 1.5"),
        (zoo.mobilenet_v1, [True] * 15, r"channels\[0\] is True"),
        (zoo.mobilenet_v2, [16] * 35, r"has 35 entries; this network needs 36: \[conv0, block0_out"),
        (zoo.mnasnet, [16] * 37, r"has 37 entries; this network needs 36: .* blocks 1\.\.16"),
        (zoo.resnet50, [64] * 53, "has 53 entries; this network needs 54"),
        (zoo.resnet50, [64] + [9] * 6 + [11] + [9] * 46, "stage 1 must end with its 9 channels, block 2 has 11"),
    ],
)
def test_a_wrong_channel_list_is_explained(build: Callable[..., nn.Module], channels: list[int], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        build(channels=channels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("build", "options", "expected"),
    [
        (build, options, expected)
        for build in (zoo.mobilenet_v1, zoo.mobilenet_v2, zoo.mnasnet, zoo.resnet50, zoo.shufflenet_v1, zoo.resnet20)
        for options, expected in (
            ({"width": "1.0"}, "width must be a number above 0, got '1.0'"),
            ({"width": None}, "width must be a number above 0, got None"),
            ({"width": True}, "width must be a number above 0, got True"),
            ({"width": [32, 64]}, r"got \[32, 64\] \(a list of channels goes to channels=\)"),
            ({"num_classes": 0}, "num_classes must be a whole number of at least 1, got 0"),
            ({"num_classes": 2.5}, "num_classes must be a whole number of at least 1, got 2.5"),
            ({"in_channels": 0}, "in_channels must be a whole number of at least 1, got 0"),
        )
    ]
    + [
        (zoo.shufflenet_v2, {"width": [1]}, "width must be a number above 0"),
        (zoo.shufflenet_v1, {"groups": 0}, "groups must be a whole number of at least 1, got 0"),
        (zoo.mobilenet_v1, {"stem_stride": 0}, "stem_stride must be a whole number"),
        (zoo.mobilenet_v1, {"channels": 5}, r"channels must be a list, \[conv0, pw1..pw13, num_classes\]; got 5"),
        (zoo.mobilenet_v2, {"channels": "8"}, "channels must be a list"),
        (zoo.resnet50, {"channels": [8] * 54, "width": 0.5}, "width=0.5 beside it must be left out"),
    ],
)
def test_a_wrong_option_is_one_line(build: Callable[..., nn.Module], options: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        build(**options)
    assert "\n" not in str(caught.value)


def test_impossible_widths_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"0\.5, 1\.0, 1\.5, 2\.0"):
        zoo.shufflenet_v2(0.7)
    for width in (0, -1, math.nan, math.inf):
        for build in (zoo.mobilenet_v1, zoo.mobilenet_v2, zoo.resnet20, zoo.shufflenet_v1):
            with pytest.raises(ConfigError, match="above 0"):
                build(width)
    with pytest.raises(ConfigError, match="choose a larger width"):
        zoo.shufflenet_v1(0.05)
    with pytest.raises(ConfigError, match="repeats must be at least 0, got -1"):
        zoo.mobilenet_v1(repeats=-1)
