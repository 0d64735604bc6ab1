"""S-Nets: a list of widths in one network, with BatchNorm of their own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nets
from autoslim import (
    SwitchableNet,
    export_onnx,
    extract,
    load_subnet,
    recalibrate_batchnorm,
    save_subnet,
    switch_backward,
    trace,
    zoo,
)
from autoslim.errors import SpaceError
from autoslim.export import load_tensors, save_tensors, verify_onnx

CASES = ["plain", "residual", "depthwise", "concatenated", "squeeze_excite", "shared_layer", "flattened"]
SWITCHES = (0.25, 1.0, 0.5)


def s_net(name: str, **options: Any) -> tuple[SwitchableNet, Tensor, Tensor]:
    net, x = nets.build(name)
    switchable = SwitchableNet(net, trace(net, x).with_choices(8, 1, 0.1), SWITCHES, **options)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16, *x.shape[1:], generator=generator, dtype=torch.float64)
    return switchable, images, torch.randint(0, 5, (16,), generator=generator)


def train(switchable: SwitchableNet, images: Tensor, targets: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(switchable.parameters(), lr=0.05)
    switchable.train()
    for _ in range(steps):
        optimizer.zero_grad()
        switch_backward(switchable, images, targets, loss=nn.CrossEntropyLoss())
        optimizer.step()


def private(switchable: SwitchableNet) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: tensor.detach().clone() for key, tensor in switchable.private_tensors(name).items()}
        for name in switchable.switches
    }


@pytest.mark.parametrize("name", CASES)
def test_each_switch_is_the_plain_net_extracted_from_it(name: str) -> None:
    switchable, images, targets = s_net(name)
    train(switchable, images, targets)
    switchable.eval()
    with torch.no_grad():
        for ratio in SWITCHES:
            expected = switchable.subnet(ratio).eval()(images)
            assert torch.allclose(switchable.switch(ratio)(images), expected, atol=1e-10)
            assert torch.allclose(switchable(images, ratio), expected, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_training_one_switch_leaves_the_batchnorm_of_the_others_bit_identical(name: str) -> None:
    switchable, images, targets = s_net(name)
    before = private(switchable)
    optimizer = torch.optim.SGD(switchable.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    switchable.switch(0.5).train()
    nn.functional.cross_entropy(switchable(images), targets).backward()
    optimizer.step()
    after = private(switchable)
    for other in ("1", "0.25"):
        assert all(torch.equal(after[other][key], tensor) for key, tensor in before[other].items())
    changed = [key for key, tensor in before["0.5"].items() if not torch.equal(after["0.5"][key], tensor)]
    assert len(changed) == len(before["0.5"])  # weights, biases, statistics and counters, every one of them


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("distill", [False, True])
def test_a_step_is_the_sum_of_the_losses_of_all_switches(name: str, distill: bool) -> None:
    switchable, images, targets = s_net(name)
    switchable.train()
    loss = nn.CrossEntropyLoss()
    switchable.zero_grad()
    losses = switch_backward(switchable, images, targets, loss=loss, distill=distill)
    assert list(losses) == ["1", "0.5", "0.25"]  # the widest first
    together = {key: p.grad.clone() for key, p in switchable.named_parameters() if p.grad is not None}
    switchable.zero_grad()
    outputs = {ratio: switchable(images, ratio) for ratio in losses}
    lesson = outputs["1"].detach().softmax(1)
    singles = [loss(output, targets if ratio == "1" or not distill else lesson) for ratio, output in outputs.items()]
    torch.stack(singles).sum().backward()
    assert together
    for key, parameter in switchable.named_parameters():
        if key in together:
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, together[key], atol=1e-10), key
        else:
            assert parameter.grad is None or not parameter.grad.any(), key
    assert losses["0.25"] == pytest.approx(float(singles[-1].detach()), abs=1e-9)


def test_one_switch_at_full_width_trains_as_the_plain_net_does() -> None:
    net, x = nets.build("residual")
    plain = extract(net, trace(net, x), trace(net, x).full())
    switchable = SwitchableNet(net, trace(net, x), [1.0])
    images, targets = torch.randn(16, *x.shape[1:], dtype=torch.float64), torch.randint(0, 5, (16,))
    for model in (plain, switchable):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), targets).backward()
            optimizer.step()
        model.eval()
    assert torch.allclose(plain(images), switchable(images), atol=1e-10)


def test_shared_batchnorm_keeps_the_statistics_of_all_switches_in_one_place() -> None:
    switchable, images, _ = s_net("residual", private=False)
    assert not switchable.private_tensors(0.5)
    layer = next(module for module in switchable.shared.modules() if isinstance(module, nn.BatchNorm2d))
    assert layer.running_mean is not None
    switchable.train()
    before = layer.running_mean.clone()
    switchable(images, 0.25)
    width = switchable.subnet(0.25).get_submodule(switchable._layers[0]).num_features
    assert not torch.equal(layer.running_mean[:width], before[:width])
    assert torch.equal(layer.running_mean[width:], before[width:])
    middle = layer.running_mean.clone()
    switchable(images, 1.0)
    assert not torch.equal(layer.running_mean[:width], middle[:width])  # the first channels serve both
    switchable.eval()
    assert torch.allclose(switchable(images, 0.25), switchable.subnet(0.25).eval()(images), atol=1e-10)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ratio", SWITCHES)
def test_calibration_is_that_of_the_plain_net_and_leaves_other_switches_bit_identical(name: str, ratio: float) -> None:
    switchable, images, targets = s_net(name)
    train(switchable, images, targets, steps=1)
    batches = [images[:9] + 0.3, images[9:]]
    expected = switchable.subnet(ratio)
    recalibrate_batchnorm(expected, batches)
    before = {key: tensor.clone() for key, tensor in switchable.state_dict().items()}
    recalibrate_batchnorm(switchable.switch(ratio), batches)
    assert switchable.training
    own = {id(tensor) for tensor in switchable.private_tensors(ratio).values()}
    changed = {key for key, t in switchable.state_dict(keep_vars=True).items() if not torch.equal(t, before[key])}
    assert changed
    for key, tensor in switchable.state_dict(keep_vars=True).items():
        assert key not in changed or id(tensor) in own, key
    for key, tensor in switchable.subnet(ratio).state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[key]), key


def test_shared_batchnorm_is_not_calibrated_for_one_switch() -> None:
    switchable, images, _ = s_net("residual", private=False)
    before = {key: tensor.clone() for key, tensor in switchable.state_dict().items()}
    with pytest.raises(SpaceError, match=r"recalibrate_batchnorm\(net\.subnet\('0\.5'\), batches\)"):
        recalibrate_batchnorm(switchable.switch(0.5), [images])
    assert all(torch.equal(tensor, before[key]) for key, tensor in switchable.state_dict().items())


def test_switches_may_be_the_widths_that_a_search_found() -> None:
    net, x = nets.build("residual")
    space = trace(net, x).with_choices(8, 1, 0.1)
    found = {"50%": space.uniform(0.5), "narrow first": space.narrowed(space.full(), next(iter(space.groups)))}
    switchable = SwitchableNet(net, space, found)
    assert switchable.current == "50%"
    assert switchable.switch("narrow first").widths == found["narrow first"]


def test_a_private_layer_holds_only_the_channels_of_its_switch() -> None:
    switchable, *_ = s_net("plain")
    sizes = [sum(t.numel() for t in switchable.private_tensors(ratio).values()) for ratio in ("0.25", "0.5", "1")]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] < sizes[2]


def test_private_batchnorm_costs_a_few_parameters_only() -> None:
    net = zoo.mobilenet_v1(num_classes=10)
    switchable = SwitchableNet(net, trace(net, torch.zeros(1, 3, 32, 32)), (1.0, 0.75, 0.5, 0.25))
    own = sum(p.numel() for p in net.parameters())
    assert sum(p.numel() for p in switchable.parameters()) < 1.02 * own


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, space: SwitchableNet(net, space, []), "at least one switch"),
        (lambda net, space: SwitchableNet(net, space, [1.5]), r"\(0, 1\]"),
        (lambda net, space: SwitchableNet(net, space, [1.0, 0.5]).switch(0.75), "no switch '0.75'"),
        (lambda net, space: SwitchableNet(net, space, 0.5), r"such as \[1\.0, 0\.5\], or widths by name, got 0\.5"),
        (lambda net, space: SwitchableNet(net, space, "0.5"), "got '0.5'"),
        (lambda net, space: SwitchableNet(net, space, ["a"]), r"\(0, 1\], got 'a'"),
        (lambda net, space: SwitchableNet(net, space, [1.0, None]), r"\(0, 1\], got None"),
        (lambda net, space: SwitchableNet(net, space, [0.5, 1.0, 0.5]), r"ratio 0\.5 is given twice"),
        (lambda net, space: SwitchableNet(net, space, [0.501, 1.0, 0.5]), r"ratio 0\.5 is the same widths as 0\.501"),
        (lambda net, space: SwitchableNet(net, space, {"a": 0.5}), "switch 'a' needs widths"),
        (lambda net, space: SwitchableNet(net, space, [1.0, 0.5]).switch(None), "a ratio or a name, got None"),
        (lambda net, space: SwitchableNet(net, space, {"a": space.full().replaced("nothing", 3)}), "nothing"),
    ],
)
def test_what_cannot_be_switched_is_refused_with_what_would_work(call: Any, message: str) -> None:
    net, x = nets.build("residual")
    with pytest.raises(SpaceError, match=message):
        call(net, trace(net, x))


@pytest.mark.parametrize("options", [{}, {"private": False}])
def test_one_file_holds_all_switches(options: dict[str, bool], tmp_path: Path) -> None:
    switchable, images, targets = s_net("residual", **options)
    train(switchable, images, targets)
    switchable.eval()
    save_subnet(tmp_path, switchable)
    again = load_subnet(tmp_path, nets.build("residual")[0])
    assert isinstance(again, SwitchableNet)
    assert list(again.switches) == list(switchable.switches)
    for ratio in SWITCHES:
        assert torch.equal(again(images, ratio), switchable(images, ratio))


@pytest.mark.parametrize("name", CASES)
def test_what_no_switch_uses_is_no_part_of_the_net(name: str) -> None:
    switchable, images, targets = s_net(name)
    switchable.train()
    switch_backward(switchable, images, targets, loss=nn.CrossEntropyLoss())
    assert all(parameter.grad is not None for parameter in switchable.parameters())
    assert {name for name, _ in switchable.named_parameters()} <= set(switchable.state_dict())
    norms = {f"shared.{key}" for key in switchable.private_tensors(0.5)}
    assert norms
    assert not norms & set(switchable.state_dict())
    wrapped = nn.ModuleDict({"net": switchable})
    assert not {f"net.{key}" for key in norms} & set(wrapped.state_dict())
    assert wrapped.load_state_dict(wrapped.state_dict())
    shared, *_ = s_net(name, private=False)
    assert norms <= set(shared.state_dict())


def test_files_of_older_versions_hold_what_no_switch_uses_and_are_read(tmp_path: Path) -> None:
    switchable, images, targets = s_net("residual")
    train(switchable, images, targets)
    save_subnet(tmp_path, switchable.eval())
    tensors, record = load_tensors(tmp_path / "model.safetensors")
    unused = {f"shared.{key}": tensor for key, tensor in switchable.shared.state_dict().items()}
    older = {**unused, **tensors}
    assert len(older) > len(tensors)
    save_tensors(tmp_path / "model.safetensors", older, record)
    again = load_subnet(tmp_path, nets.build("residual")[0])
    for ratio in SWITCHES:
        assert torch.equal(again(images, ratio), switchable(images, ratio))
    assert again.load_state_dict(older)
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict(unused)


def test_each_switch_becomes_an_onnx_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = zoo.mobilenet_v1(0.25, num_classes=5, stem_stride=1)
    images, targets = torch.randn(8, 3, 16, 16), torch.randint(0, 5, (8,))
    switchable = SwitchableNet(net, trace(net, images[:1]), SWITCHES)
    train(switchable, images, targets)
    sizes = []
    for ratio in sorted(SWITCHES):
        plain, path = switchable.subnet(ratio).eval(), tmp_path / f"{ratio}.onnx"
        export_onnx(plain, images[:1], path)
        assert verify_onnx(path, plain, images) < 1e-4
        sizes.append(path.stat().st_size)
    assert sizes == sorted(set(sizes))


def test_switching_takes_microseconds() -> None:
    import timeit

    net = zoo.mobilenet_v1(0.25, num_classes=10)
    switchable = SwitchableNet(net, trace(net, torch.zeros(1, 3, 32, 32)), (1.0, 0.5))
    ratios = itertools.cycle((0.5, 1.0))
    assert min(timeit.repeat(lambda: switchable.switch(next(ratios)), number=100, repeat=5)) / 100 < 1e-4
