"""A sample of the public zoo, at least one net of every family: graded as `benchmarks/zoo.py` grades all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autoslim
from autoslim import export

pytest.importorskip("timm")
pytest.importorskip("torchvision")
import grading

TIMM = (
    *("test_byobnet", "convmixer_1024_20_ks9_p14", "test_convnext3", "cs3darknet_s", "cspnext_s", "densenetblur121d"),
    *("dla46_c", "dpn48b", "test_efficientnet", "fasternet_t0", "fastvit_t8", "focalnet_tiny_srf", "ghostnet_050"),
    *("ghostnetv2_100", "hardcorenas_a", "hgnetv2_b1", "hrnet_w18_small", "inception_next_atto", "inception_resnet_v2"),
    *("inception_v3", "inception_v4", "lcnetv2_small", "test_mambaout", "lcnet_035", "mixnet_s", "nasnetalarge"),
    *("test_nfnet", "nf_resnet50", "pnasnet5large", "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m1"),
    *("res2net50_48w_2s", "resnest14d", "test_resnet", "resnetv2_18", "rexnet_100", "selecsls60", "legacy_seresnet18"),
    *("skresnet18", "starnet_s050", "tresnet_m", "vgg11", "ese_vovnet19b_slim", "legacy_xception", "xception41"),
    *("edgenext_xx_small", "cspdarknet53", "eca_nfnet_l0", "shvit_s1"),
)
TORCHVISION = (
    *("alexnet", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5", "mobilenet_v2"),
    *(
        "mobilenet_v3_small",
        "regnet_x_400mf",
        "resnet18",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "lraspp_mobilenet_v3_large",
    ),
    *("fasterrcnn_mobilenet_v3_large_320_fpn", "deeplabv3_mobilenet_v3_large"),
)
SAFE = ("timm:test_vit", "timm:levit_128s", "torchvision:ssdlite320_mobilenet_v3_large")  # no convnets: right, at least
EVERY = [*(f"timm:{name}" for name in TIMM), *(f"torchvision:{name}" for name in TORCHVISION)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERY)
def test_a_convnet_of_the_zoo_is_understood(name: str) -> None:
    row = grading.grade(name)
    assert row.grade == "A", row


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAFE)
def test_what_is_no_convnet_is_at_least_right(name: str) -> None:
    row = grading.grade(name)
    assert row.grade in "ABC", row


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["timm:res2net50_48w_2s", "timm:inception_next_atto", "torchvision:shufflenet_v2_x0_5"]
)
def test_subnets_survive_saving_and_exporting(name: str, tmp_path: Path) -> None:
    """Nets in which more is cut than weights: sizes in attributes, splits, shuffles."""
    model = grading.randomise(grading.build(name)).eval()
    inputs: Any = torch.randn(1, 3, 64, 64)
    space = autoslim.trace(model, inputs)
    widths = space.uniform(0.5)
    subnet = autoslim.extract(model, space, widths).eval()
    with torch.no_grad():
        expected = subnet(inputs)
        autoslim.save_subnet(tmp_path / "net", subnet, space, widths)
        again = autoslim.load_subnet(tmp_path / "net", lambda: grading.build(name)).eval()
        assert torch.equal(again(inputs), expected)
        program = torch.export.export(subnet, (inputs,))
        assert torch.allclose(program.module()(inputs), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    export.export_onnx(subnet, inputs, tmp_path / "net.onnx")
    assert export.verify_onnx(tmp_path / "net.onnx", subnet, inputs) < 1e-3


def test_the_page_of_the_zoo_counts_grades_and_lists_what_is_not_a() -> None:
    import dataclasses

    import zoo

    rows = [
        grading.Grade(
            "timm:resnet18", "timm resnet", identity="yes", run="yes", zeroed="yes", backward="yes", cuttable=1.0
        ),
        grading.Grade("timm:resnet34", "timm resnet", failure="no result within 300 s"),
        grading.Grade(
            "timm:vit_tiny", "timm vision_transformer", identity="yes", run="yes", zeroed="n/a", backward="yes"
        ),
    ]
    text = zoo.page([dataclasses.asdict(row.judge()) for row in rows])
    assert [row.grade for row in rows] == ["A", "F", "C"]
    assert "| timm resnet | 2 | 1 | 0 | 0 | 1 |" in text
    assert "| timm:resnet34 | F |" in text
    assert "no result within 300 s" in text
    assert "| timm:vit_tiny | C |" in text


def test_a_wrong_or_slow_model_is_graded_f() -> None:
    row = grading.Grade("x", identity="yes", run="yes", zeroed="no", backward="yes", cuttable=1.0)
    assert row.judge().grade == "F"
    row.zeroed, row.trace_s = "yes", 11.0
    assert row.judge().grade == "F"
    row.trace_s = 1.0
    assert row.judge().grade == "A"


@pytest.mark.filterwarnings("ignore")
def test_grading_sees_a_wrong_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks can fail: with the positions of one consumer reversed they do."""
    import dataclasses as dc

    from autoslim.space import Axis

    def wrong(model: Any, inputs: Any) -> autoslim.ChannelSpace:
        space = autoslim.trace(model, inputs)
        name = "layer1.0.conv2.weight"
        out, axis, *rest = space.parameters[name]
        ranks = [(span.group, span.start + i * span.step) for span in axis.spans for i in range(span.count)]
        return dc.replace(space, parameters={**space.parameters, name: (out, Axis.from_ranks(reversed(ranks)), *rest)})

    monkeypatch.setattr(grading, "trace", wrong)
    row = grading.grade("torchvision:resnet18")
    assert (row.grade, row.run, row.zeroed) == ("F", "yes", "no")
