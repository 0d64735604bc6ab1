"""Saved nets come back bit for bit without unpickling; exported ones compute the same."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import autoslim
from autoslim import errors
from autoslim.errors import AutoSlimError, ExportError, RunError, SpaceError

NET = f"{Path(__file__).parent / 'small_net.py'}:net"


def _subnet(seed: int = 0) -> tuple[nn.Module, autoslim.ChannelSpace, autoslim.Widths]:
    from autoslim.models import build_model

    model = build_model(NET, {"channels": 12})
    space = autoslim.trace(model, torch.zeros(1, 1, 16, 16))
    widths = space.sample(random.Random(seed))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return autoslim.extract(model, space, widths).eval(), space, widths


@pytest.mark.parametrize("seed", range(3))
def test_save_then_load_is_the_identity(tmp_path: Path, seed: int) -> None:
    subnet, space, widths = _subnet(seed)
    autoslim.save_subnet(tmp_path, subnet, space, widths, model=NET, model_args={"channels": 12})
    again = autoslim.load_subnet(tmp_path)
    assert not again.training
    assert type(again) is type(subnet)
    expected = subnet.state_dict()
    assert expected.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    x = torch.randn(3, 1, 16, 16)
    assert torch.equal(again(x), subnet(x))
    assert autoslim.Widths.from_json((tmp_path / "widths.json").read_text()) == widths


def test_tied_weights_and_half_precision_come_back(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 10)
            self.one, self.two = nn.Linear(10, 10), nn.Linear(10, 10)
            self.two.weight = self.one.weight
            self.head = nn.Linear(10, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.two(self.one(self.stem(x).relu()).relu()).relu())

    model = Tied()
    space = autoslim.trace(model, torch.zeros(1, 6))
    widths = space.uniform(0.5)
    subnet = autoslim.extract(model, space, widths).bfloat16().eval()
    autoslim.save_subnet(tmp_path, subnet, space, widths)
    again = autoslim.load_subnet(tmp_path, Tied)
    assert again.two.weight is again.one.weight
    assert again.stem.weight.dtype is torch.bfloat16
    x = torch.randn(4, 6).bfloat16()
    assert torch.equal(again(x), subnet(x))


def test_a_net_without_a_name_needs_its_original(tmp_path: Path) -> None:
    subnet, space, widths = _subnet()
    autoslim.save_subnet(tmp_path, subnet, space, widths)
    with pytest.raises(ExportError, match="load_subnet\\(directory, model=my_network\\)"):
        autoslim.load_subnet(tmp_path)
    from autoslim.models import build_model

    again = autoslim.load_subnet(tmp_path, build_model(NET, {"channels": 12}))
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(again(x), subnet(x))
    with pytest.raises(AutoSlimError, match="another model"):
        autoslim.load_subnet(tmp_path, build_model(NET, {"channels": 16}))


def test_files_that_are_no_subnets_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no file"):
        autoslim.load_subnet(tmp_path)
    for content in (b"", b"x" * 100, (2**60).to_bytes(8, "little") + b"{}"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(RunError, match=r"model\.safetensors is damaged"):
            autoslim.load_subnet(tmp_path)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")  # a pickle is never read
    with pytest.raises(RunError, match="damaged"):
        autoslim.load_subnet(tmp_path)


def test_onnx_computes_the_same_for_any_batch(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from autoslim.export import verify_onnx

    subnet, _, _ = _subnet()
    path = tmp_path / "model.onnx"
    autoslim.export_onnx(subnet, torch.zeros(1, 1, 16, 16), path)
    for batch in (1, 5):
        assert verify_onnx(path, subnet, torch.randn(batch, 1, 16, 16)) < 1e-4
    with torch.no_grad():
        subnet.head.bias += 1
    with pytest.raises(ExportError, match="onnxruntime differs"):
        verify_onnx(path, subnet, torch.randn(2, 1, 16, 16))


class Branches(nn.Module):
    """What it computes depends on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x


class Distances(nn.Module):
    """An operator that ONNX has not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x, x)


def test_a_net_that_cannot_be_exported_is_one_line_with_the_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    example, path = torch.zeros(1, 1, 4, 4), tmp_path / "net"
    for export, net, text in (
        (
            autoslim.export_onnx,
            Branches(),
            r"Branches cannot be exported to ONNX: .* values .* \(at test_export.py:\d+\)",
        ),
        (
            autoslim.export_onnx,
            Distances(),
            "Distances cannot be exported to ONNX: .*No ONNX function found for .*cdist",
        ),
        (autoslim.export_program, Branches(), r"Branches cannot be exported by torch.export: .* values"),
    ):
        with pytest.raises(ExportError, match=text) as error:
            export(net.train(), example, path)
        assert not {"\n", "\x1b"} & set(str(error.value))
        assert net.training
    assert not path.exists()
    assert capfd.readouterr() == ("", ""), "torch prints the graph"
    assert not logging.root.manager.disable


def test_every_error_for_a_user_has_a_public_name() -> None:
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, AutoSlimError)]
    assert errors.TraceError in kinds
    for kind in kinds:
        assert getattr(autoslim, kind.__name__) is kind
        assert kind.__name__ in autoslim.__all__


def test_an_exported_program_computes_the_same(tmp_path: Path) -> None:
    subnet, _, _ = _subnet()
    autoslim.export_program(subnet, torch.zeros(2, 1, 16, 16), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.randn(2, 1, 16, 16)
    assert torch.allclose(program(x), subnet(x), atol=1e-6)


def _frozen() -> nn.Module:
    """In training mode, but for its BatchNorm layer."""
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *pooled)
    net[1].eval()
    return net


def test_an_export_leaves_each_module_its_own_mode(tmp_path: Path) -> None:
    net, x = _frozen(), torch.rand(2, 3, 8, 8)
    modes = [module.training for module in net.modules()]
    autoslim.export_program(net, x, tmp_path / "model.pt2")
    assert [module.training for module in net.modules()] == modes
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    autoslim.export_onnx(net, x, tmp_path / "model.onnx")
    assert [module.training for module in net.modules()] == modes
    autoslim.export.verify_onnx(tmp_path / "model.onnx", net, x)
    assert [module.training for module in net.modules()] == modes


def test_loading_leaves_the_network_given_as_it_was(tmp_path: Path) -> None:
    net = _frozen()
    space = autoslim.trace(net, torch.rand(1, 3, 8, 8))
    switchable = autoslim.SwitchableNet(net, space, [1.0, 0.5])
    autoslim.save_subnet(tmp_path / "switches", switchable)
    half = space.uniform(0.5)
    autoslim.save_subnet(tmp_path / "half", autoslim.extract(net, space, half), space, half)
    mine = _frozen()
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    modes = [module.training for module in mine.modules()]
    for name in ("switches", "half"):
        again = autoslim.load_subnet(tmp_path / name, mine)
        assert not any(module.training for module in again.modules())
        assert all(torch.equal(tensor, before[key]) for key, tensor in mine.state_dict().items())
        assert [module.training for module in mine.modules()] == modes
        if isinstance(again, autoslim.SwitchableNet):
            assert torch.equal(again.model[0].weight, net[0].weight)


@pytest.mark.parametrize("whole", [np.int64, np.float32, float, torch.tensor])
def test_widths_are_whole_numbers_of_any_kind(tmp_path: Path, whole: Callable[[int], int]) -> None:
    net, x = _frozen(), torch.rand(2, 3, 8, 8)
    space = autoslim.trace(net, x[:1]).with_choices(4, 2, 0.25)
    plain = space.uniform(0.5)
    widths = {group: whole(width) for group, width in plain.items()}
    assert autoslim.Widths(widths).to_json() == plain.to_json()
    assert hash(autoslim.Widths(widths)) == hash(plain)
    if whole is not torch.tensor:  # equal to a number, but with another hash: as `Widths` only
        assert autoslim.MacCost(space)(widths) == autoslim.MacCost(space)(plain)
        assert autoslim.Supernet(net, space)(x, widths).shape == (2, 4)
    subnet = autoslim.extract(net, space, autoslim.Widths(widths))
    autoslim.save_subnet(tmp_path, subnet, space, widths)
    assert torch.equal(autoslim.load_subnet(tmp_path, net)(x), subnet.eval()(x))
    autoslim.save_subnet(tmp_path, autoslim.SwitchableNet(net, space, {"half": autoslim.Widths(widths)}))
    for wrong in (4.5, np.float64(4.5), float("inf")):
        with pytest.raises(SpaceError, match=r"cannot have width (4\.5|inf); choices: 2, 4, 6, 8"):
            autoslim.Supernet(net, space)(x, dict.fromkeys(space.groups, wrong))
