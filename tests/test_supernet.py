"""The sandwich step, BatchNorm statistics, and the judge."""

from __future__ import annotations

import copy
import math
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nets
from autoslim import (
    Judge,
    Recipe,
    Supernet,
    SupernetRecipe,
    SwitchableNet,
    batch_statistics,
    evaluate,
    extract,
    recalibrate_batchnorm,
    retrain,
    sandwich_backward,
    soft_cross_entropy,
    switch_backward,
    trace,
    train_supernet,
)
from autoslim.errors import AutoSlimError, ConfigError, DataError, SpaceError, TrainError
from autoslim.slicing import gradients_in_place
from autoslim.tracing import tensors_in

CASES = ["plain", "residual", "depthwise", "concatenated", "squeeze_excite", "shared_layer", "flattened"]


def _supernet(name: str) -> tuple[Supernet, Tensor, Tensor]:
    net, x = nets.build(name)
    supernet = Supernet(net, trace(net, x).with_choices(4, 2, 0.25))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16, *x.shape[1:], generator=generator, dtype=torch.float64)
    return supernet, images, torch.randint(0, 5, (16,), generator=generator)


@pytest.mark.parametrize("num_random", [0, 1, 3])
def test_a_us_net_step_draws_one_ratio_for_the_whole_net(num_random: int, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet, images, targets = _supernet("residual")
    space, seen = supernet.space, []
    forward = supernet.forward
    monkeypatch.setattr(supernet, "forward", lambda x, widths=None: (seen.append(widths), forward(x, widths))[1])
    losses = sandwich_backward(
        supernet,
        images,
        targets,
        loss=nn.CrossEntropyLoss(),
        rng=random.Random(0),
        num_random=num_random,
        ratios=(0.3, 0.9),
    )
    assert len(losses) == len(seen) == 2 + num_random
    assert seen[:2] == [space.uniform(0.9), space.uniform(0.3)]
    uniform = {space.uniform(0.3 + 0.6 * step / 500) for step in range(501)}
    assert set(seen[2:]) <= uniform
    loss, rng = nn.CrossEntropyLoss(), random.Random(0)
    for ratios in ((0.9, 0.3), (0.5,), (0.25, 1.5), 0.5, (None, 1.0), (0.25, 0.5, 1.0)):
        with pytest.raises(SpaceError, match="ratios must be two that ascend"):
            sandwich_backward(supernet, images, targets, loss=loss, rng=rng, ratios=ratios)  # type: ignore[arg-type]
    for wrong in (-1, 1.5, "2"):
        with pytest.raises(SpaceError, match="num_random must be a whole number of at least 0"):
            sandwich_backward(supernet, images, targets, loss=loss, rng=rng, num_random=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_a_sandwich_step_is_the_sum_of_four_separate_ones(name: str) -> None:
    supernet, images, targets = _supernet(name)
    loss = nn.CrossEntropyLoss()
    rng = random.Random(5)
    expected_widths = [supernet.space.smallest(), supernet.space.sample(rng), supernet.space.sample(rng)]
    supernet.zero_grad()
    losses = sandwich_backward(supernet, images, targets, loss=loss, rng=random.Random(5))
    together = {key: p.grad.clone() for key, p in supernet.named_parameters() if p.grad is not None}
    assert list(losses) == ["widest", "narrowest", "random_1", "random_2"]

    separate = {key: torch.zeros_like(p) for key, p in supernet.named_parameters()}
    teacher = supernet(images).detach()
    for index, widths in enumerate([supernet.space.full(), *expected_widths]):
        supernet.zero_grad()
        output = supernet(images, widths)
        single = loss(output, targets) if index == 0 else -(teacher.softmax(1) * output.log_softmax(1)).sum(1).mean()
        single.backward()
        assert float(single.detach()) == pytest.approx(list(losses.values())[index], abs=1e-12)
        for key, parameter in supernet.named_parameters():
            if parameter.grad is not None:
                separate[key] += parameter.grad
    for key, gradient in together.items():
        assert torch.allclose(gradient, separate[key], atol=1e-12)


def test_the_teacher_gets_no_gradient_from_its_students() -> None:
    """Where the students' widths do not reach, only the widest net's own loss has moved anything."""
    supernet, images, targets = _supernet("plain")
    loss = nn.CrossEntropyLoss()
    supernet.zero_grad()
    loss(supernet(images), targets).backward()
    alone = {key: p.grad.clone() for key, p in supernet.named_parameters()}
    supernet.zero_grad()
    narrow = supernet.space.smallest()
    sandwich_backward(supernet, images, targets, loss=loss, rng=random.Random(0), num_random=0)
    for key, parameter in supernet.named_parameters():
        beyond = torch.ones_like(parameter, dtype=torch.bool)
        for dim, axis in enumerate(supernet.space.parameters[key]):
            kept = torch.zeros(axis.size, dtype=torch.bool)
            kept[list(axis.positions(narrow))] = True
            beyond &= kept.view([-1 if d == dim else 1 for d in range(parameter.ndim)])
        assert torch.equal(parameter.grad[~beyond], alone[key][~beyond])


def test_statistics_after_a_step_are_those_of_the_widest_net_alone() -> None:
    supernet, images, targets = _supernet("residual")
    twin, _, _ = _supernet("residual")
    supernet.train()
    sandwich_backward(supernet, images, targets, loss=nn.CrossEntropyLoss(), rng=random.Random(0))
    twin.train()
    twin(images)
    expected = dict(twin.named_buffers())
    assert expected
    assert all(torch.equal(tensor, expected[key]) for key, tensor in supernet.named_buffers())


def test_steps_say_what_they_need() -> None:
    data = torch.zeros(1, 2), torch.zeros(1)
    expected = "expected a {}, or one in DistributedDataParallel, got Linear"
    with pytest.raises(SpaceError, match=expected.format("Supernet")):
        sandwich_backward(nn.Linear(2, 2), *data, loss=nn.functional.cross_entropy, rng=random.Random(0))  # type: ignore[arg-type]
    with pytest.raises(SpaceError, match=expected.format("SwitchableNet")):
        switch_backward(nn.Linear(2, 2), *data, loss=nn.functional.cross_entropy)  # type: ignore[arg-type]


class _Checkpointing(nn.Module):
    """Computes its blocks again in the backward pass, one of them twice, by its own code."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.one, self.two = (
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in (self.one, self.two, self.one):
            if self.reentrant is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own, without gradients
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_model_computes_again_is_that_of_the_subnet(reentrant: bool) -> None:
    torch.manual_seed(0)
    plain, model = _Checkpointing(None).double(), _Checkpointing(reentrant).double()
    model.load_state_dict(plain.state_dict())
    space = trace(_Checkpointing(None), torch.zeros(2, 3, 8, 8)).with_choices(4, 1, 0.25)
    assert trace(_Checkpointing(reentrant), torch.zeros(2, 3, 8, 8)).groups.keys() == space.groups.keys()
    x, targets = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4)
    switches = []
    for net in (plain, model):
        widths = space.smallest()
        statistics = {name: buffer.clone() for name, buffer in net.named_buffers()}
        nn.functional.cross_entropy(Supernet(net, space).train()(x, widths), targets).backward()
        assert all(torch.equal(buffer, statistics[name]) for name, buffer in net.named_buffers())
        switches.append(SwitchableNet(net, space, [0.5, 0.25]).train())
        switch_backward(switches[-1], x, targets, loss=nn.functional.cross_entropy)
        sandwich_backward(Supernet(net, space), x, targets, loss=nn.functional.cross_entropy, rng=random.Random(0))
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-12)
    for one, other in zip(switches[0].norms.parameters(), switches[1].norms.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-12)
    for one, other in zip(switches[0].norms.buffers(), switches[1].norms.buffers(), strict=True):
        assert torch.allclose(one, other)  # the block that runs twice was counted twice, not four times


def test_hooks_of_parameters_see_gradients_of_all_nets() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)), torch.randn(2, 3, 8, 8)
    seen: list[Tensor] = []
    parameter = next(net.parameters())
    parameter.register_hook(seen.append)
    space = trace(net, x).with_choices(4, 1, 0.25)
    sandwich_backward(
        Supernet(net, space), x, torch.zeros(len(x)).long(), loss=nn.functional.cross_entropy, rng=random.Random(0)
    )
    assert len(seen) == 4
    assert parameter.grad is not None
    assert torch.allclose(sum(seen), parameter.grad)


def test_widths_and_distillation_that_cannot_be() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 2))
    x = torch.randn(2, 3, 8, 8)
    supernet = Supernet(net, trace(net, x))
    full = supernet.space.full()
    for widths, message in (
        ({**full, "typo": 3}, "no channel group 'typo'"),
        ({**full, "0": 999}, "group '0' cannot have width 999"),
        ({"0": 4}, "the width of group '2' is missing"),
        (0.5, "widths are a mapping"),
    ):
        with pytest.raises(SpaceError, match=message):
            supernet(x, widths)
    step = partial(sandwich_backward, supernet, x, torch.zeros(2).long(), loss=nn.functional.cross_entropy)
    with pytest.raises(TrainError, match=r"distill is True, False or a function of two outputs.*'alpha'"):
        step(rng=random.Random(0), distill="alpha")
    with pytest.raises(SpaceError, match=r"rng draws the widths: give random.Random\(0\), got 0"):
        step(rng=0)


class _Keeping(nn.Module):
    """Keeps what it computed, for somebody to look at."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
        self.kept = kind()

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if isinstance(self.kept, dict):
            self.kept["x"] = [(x,)]
        else:
            self.kept.x = x
        return self.two(x.mean((2, 3)))


def test_what_a_model_keeps_of_a_pass_is_copied_or_named() -> None:
    x = torch.randn(2, 3, 8, 8)
    for kind in (dict, SimpleNamespace):
        net = _Keeping(kind)
        space = trace(net, x)
        net(x).sum().backward()
        if kind is dict:
            assert extract(net, space, space.smallest())(x).shape == (2, 2)
        else:
            with pytest.raises(SpaceError, match=r"_Keeping cannot be copied \(Only Tensors"):
                extract(net, space, space.smallest())


def test_losses_are_arguments() -> None:
    supernet, images, targets = _supernet("plain")
    seen: list[str] = []

    def hard(output: Tensor, target: Tensor) -> Tensor:
        seen.append("hard")
        return nn.functional.cross_entropy(output, target)

    def imitate(student: Tensor, teacher: Tensor) -> Tensor:
        seen.append("soft")
        assert not teacher.requires_grad
        return (student - teacher).square().mean()

    options: dict[str, Any] = {"loss": hard, "rng": random.Random(0)}
    assert len(sandwich_backward(supernet, images, targets, num_random=3, distill=imitate, **options)) == 5
    assert seen == ["hard", "soft", "soft", "soft", "soft"]
    seen.clear()
    sandwich_backward(supernet, images, targets, distill=False, **options)
    assert seen == ["hard"] * 4
    with pytest.raises(SpaceError, match="num_random"):
        sandwich_backward(supernet, images, targets, num_random=-1, **options)


def test_soft_cross_entropy_is_minus_the_teachers_mean_log_likelihood() -> None:
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    expected = -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
    assert float(soft_cross_entropy(student, teacher)) == pytest.approx(float(expected), abs=1e-12)


def test_a_supernet_is_the_users_model_under_another_call() -> None:
    supernet, images, _ = _supernet("plain")
    net = supernet.model
    assert supernet.state_dict().keys() == net.state_dict().keys()
    assert [id(p) for p in supernet.parameters()] == [id(p) for p in net.parameters()]
    supernet.eval()
    assert not net.training
    assert not any(module.training for module in net.modules())
    assert torch.equal(supernet(images), net(images))
    supernet.float()
    assert next(net.parameters()).dtype is torch.float32
    other, _ = nets.build("residual")
    with pytest.raises(SpaceError, match="another model"):
        Supernet(other, supernet.space)
    with pytest.raises(SpaceError, match="cannot have width"):
        extract(net, supernet.space, supernet.space.full().replaced(next(iter(supernet.space.groups)), 1))


# --- BatchNorm ---------------------------------------------------------------------------------------------------


def _population(net: nn.Module, images: Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and variance of what reaches each BatchNorm in evaluation mode, by NumPy."""
    found: dict[str, list[np.ndarray]] = {}
    handles = []
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            found[name] = []

            def hook(module: nn.Module, args: Any, kwargs: Any, at: list[np.ndarray] = found[name]) -> None:
                at.append((*args, *kwargs.values())[0].detach().numpy())

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    net.eval()
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    stacked = {name: np.concatenate(arrays) for name, arrays in found.items() if arrays}
    axes = {name: tuple(d for d in range(array.ndim) if d != 1) for name, array in stacked.items()}
    return {name: (array.mean(axes[name]), array.var(axes[name])) for name, array in stacked.items()}


@pytest.mark.parametrize(
    "name", ["plain", "residual", "depthwise", "concatenated", "one_dimensional", "three_dimensional"]
)
def test_recalibration_gives_population_statistics_however_images_are_split(name: str) -> None:
    net, x = nets.build(name)
    space = trace(net, x)
    images = torch.randn(37, *x.shape[1:], dtype=torch.float64)
    widths = space.sample(random.Random(3))
    results = []
    for sizes in ([37], [20, 17], [1] * 37, [30, 5, 2]):
        subnet = extract(net, space, widths)
        recalibrate_batchnorm(subnet, list(images.split(sizes)))
        population = _population(subnet, images)
        assert population
        for key, (mean, variance) in population.items():
            layer = subnet.get_submodule(key)
            np.testing.assert_allclose(layer.running_mean.numpy(), mean, atol=1e-12)
            np.testing.assert_allclose(layer.running_var.numpy(), variance, atol=1e-12, rtol=1e-12)
        results.append(subnet(images))
    assert all(torch.allclose(result, results[0], atol=1e-10) for result in results)


def test_recalibration_touches_nothing_else() -> None:
    net, _ = nets.build("residual")
    images = torch.randn(20, 3, 8, 8, dtype=torch.float64)
    net.train()
    net.stem[1].eval()
    net.two[1].momentum = None
    modes = [module.training for module in net.modules()]
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    momenta = [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    other = extract(net, space := trace(net, images[:1]), space.smallest()).state_dict()
    kept = {key: tensor.clone() for key, tensor in other.items()}
    recalibrate_batchnorm(net, [images])
    assert [module.training for module in net.modules()] == modes
    assert [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    for key, tensor in net.state_dict().items():
        is_statistic = key.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(tensor, before[key]) != (is_statistic and "num_batches" not in key) or "num_batches" in key
    assert all(torch.equal(tensor, kept[key]) for key, tensor in other.items())
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_recalibration_takes_loaders_and_any_inputs() -> None:
    net, _ = nets.build("plain")
    images, labels = torch.randn(12, 3, 8, 8, dtype=torch.float64), torch.zeros(12, dtype=torch.int64)
    plain, labelled = (extract(net, s := trace(net, images[:1]), s.full()) for _ in range(2))
    recalibrate_batchnorm(plain, [images[:6], images[6:]])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=6)
    recalibrate_batchnorm(labelled, loader)
    assert torch.equal(plain[0][1].running_var, labelled[0][1].running_var)
    several, inputs = nets.build("several_inputs")
    before = several.left[1].running_mean.clone()
    recalibrate_batchnorm(several, [inputs])
    assert not torch.equal(several.left[1].running_mean, before)
    with pytest.raises(DataError, match="at least one batch"):
        recalibrate_batchnorm(plain, [])


def test_recalibration_mends_a_narrow_net() -> None:
    """A net cut without it is far from what it computes in training mode; with it, it is close."""
    net, x = nets.build("residual")
    space = trace(net, x)
    images = torch.randn(200, 3, 8, 8, dtype=torch.float64)
    subnet = extract(net, space, space.uniform(0.5))
    with torch.no_grad():
        wanted = subnet.train()(images)
        subnet = extract(net, space, space.uniform(0.5)).eval()
        off = float((subnet(images) - wanted).abs().mean())
        recalibrate_batchnorm(subnet, [images])
        close = float((subnet(images) - wanted).abs().mean())
    assert close < 1e-9 < 0.01 < off


class Recurrent(nn.Module):
    """One BatchNorm layer is called twice, around two that are called once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shared, self.one, self.two, self.last = (nn.BatchNorm2d(8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.again(self.shared(self.first(x)).relu())).relu()
        x = self.two(input=self.again(x)).relu()
        return self.last(self.shared(self.again(x)).relu())


def test_recalibration_does_not_depend_on_the_statistics_that_were_there() -> None:
    torch.manual_seed(0)
    one, images = Recurrent().double(), torch.randn(16, 3, 8, 8, dtype=torch.float64)
    two = copy.deepcopy(one)
    for layer in (two.shared, two.one, two.two, two.last):
        layer.running_mean.fill_(math.nan)
        layer.running_var.uniform_(3, 5)
        layer.num_batches_tracked.fill_(7)
    nets_after = []
    for net in (one, two, two):
        recalibrate_batchnorm(net, [images[:10], images[10:]])
        nets_after.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    for after in nets_after[1:]:
        assert all(torch.equal(tensor, nets_after[0][name]) for name, tensor in after.items())
    assert all(layer.track_running_stats for layer in (one.shared, one.one, one.two, one.last))
    for name, (mean, variance) in _population(one, images).items():
        if name in ("one", "two", "last"):  # those called once are exact, under the final statistics of the others
            layer = one.get_submodule(name)
            np.testing.assert_allclose(layer.running_mean.numpy(), mean, atol=1e-12)
            np.testing.assert_allclose(layer.running_var.numpy(), variance, atol=1e-12, rtol=1e-12)


def test_recalibration_that_fails_leaves_the_layers_that_it_did_not_reach() -> None:
    net = Recurrent()
    with torch.no_grad():
        net.again.weight.fill_(math.inf)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(DataError, match="layer 'shared' has no finite mean"):
        recalibrate_batchnorm(net, [torch.randn(4, 3, 8, 8)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(module.training for module in net.modules())


def test_recalibration_under_another_default_device() -> None:
    net, images = Recurrent(), torch.randn(4, 3, 8, 8)
    with torch.device("meta"):
        recalibrate_batchnorm(net, [images])
    assert net.two.running_mean.any()


# --- the judge ---------------------------------------------------------------------------------------------------


def test_the_judge_uses_batch_statistics_and_leaves_the_model_as_it_was() -> None:
    supernet, images, targets = _supernet("residual")
    supernet.train()
    before = {key: tensor.clone() for key, tensor in supernet.state_dict().items()}
    judge = Judge(supernet, [(images[:10], targets[:10]), (images[10:], targets[10:])], "loss")
    for widths in (supernet.space.full(), supernet.space.smallest()):
        twin = extract(supernet.model, supernet.space, widths).train()
        with torch.no_grad():
            losses = [
                nn.functional.cross_entropy(twin(images[a:b]).float(), targets[a:b]) for a, b in ((0, 10), (10, 16))
            ]
        expected = -(10 * float(losses[0]) + 6 * float(losses[1])) / 16
        assert judge(widths) == pytest.approx(expected, abs=1e-6)
        assert judge(widths) == judge(widths)
    assert supernet.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in supernet.state_dict().items())


def test_dropout_sleeps_while_searching() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    with batch_statistics(net):
        assert net[1].training
        assert not net[2].training
    assert net[2].training


def test_scores_are_names_or_functions_and_mistakes_are_named() -> None:
    supernet, images, targets = _supernet("plain")
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        Judge(supernet, [(images, targets)], "acuracy")
    with pytest.raises(DataError, match="held-out images"):
        Judge(supernet, [])
    judge = Judge(supernet, [(images, targets)], lambda output, target: output.sum() * 0 + 7)
    assert judge(supernet.space.full()) == 7


def test_evaluation_counts_by_images_and_restores_modes() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    net.train()
    images, targets = torch.randn(7, 4), torch.randint(0, 2, (7,))
    expected = float((net(images).argmax(1) == targets).double().mean())
    batches = [(images[:4], targets[:4]), (images[4:], targets[4:])]
    assert evaluate(net, batches) == pytest.approx(expected, abs=1e-12)
    assert net.training
    with pytest.raises(DataError, match="no images"):
        evaluate(net, [])


@pytest.mark.parametrize("name", nets.MENAGERIE)
def test_gradients_added_in_place_are_those_that_autograd_adds(name: str) -> None:
    net, inputs = nets.build(name)
    supernet = Supernet(net.train(), trace(net, inputs))
    space, before = supernet.space, {key: tensor.clone() for key, tensor in net.state_dict().items()}
    found: list[dict[str, Tensor | None]] = []
    for direct in (False, True):
        net.load_state_dict(before)
        net.zero_grad(set_to_none=True)
        for widths in (space.smallest(), space.full(), space.sample(random.Random(1))):  # the first finds no gradients
            torch.manual_seed(0)
            with gradients_in_place() if direct else nullcontext():
                outputs = tensors_in(supernet(inputs, widths))
            sum(output.square().mean() for output in outputs if output.requires_grad).backward()
        found.append({key: parameter.grad for key, parameter in net.named_parameters()})
    for key, gradient in found[0].items():
        other = found[1][key]
        assert (gradient is None) == (other is None), key
        assert gradient is None or torch.equal(gradient, other), key


def test_frozen_parameters_get_no_gradients_in_place() -> None:
    net, inputs = nets.build("plain")
    next(net.parameters()).requires_grad_(False)
    supernet = Supernet(net, trace(net, inputs))
    with gradients_in_place():
        supernet(inputs, supernet.space.smallest()).sum().backward()
    assert next(net.parameters()).grad is None
    assert list(net.parameters())[-1].grad is not None


def test_gradients_in_place_are_for_backward_alone_and_nets_outside_have_all_of_autograd() -> None:
    net, inputs = nets.build("plain")
    supernet, first = Supernet(net, trace(net, inputs)), next(net.parameters())
    widths = supernet.space.smallest()
    (gradient,) = torch.autograd.grad(supernet(inputs, widths).square().sum(), [first], create_graph=True)
    assert gradient.requires_grad
    with gradients_in_place():
        loss = supernet(inputs, widths).square().sum()
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(loss, [first])


def _normed(*, freezes: bool = False, writes: bool = False) -> nn.Module:
    """A net with BatchNorm that it keeps frozen, or that normalises its input in place."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
            self.head = nn.Linear(8, 4)
            self.mean = torch.zeros(1)

        def forward(self, x: Tensor) -> Tensor:
            x = x.sub_(0.5).div_(0.25) if writes else (x - 0.5) / 0.25
            return self.head(nn.functional.dropout(self.body(x.clamp(-3, 3)).flatten(1), 0.5, self.training))

        def train(self, mode: bool = True) -> Net:
            super().train(mode)
            if freezes:
                self.body[1].eval()
            return self

        def _apply(self, fn: Any, *rest: Any, **named: Any) -> Net:
            super()._apply(fn, *rest, **named)
            self.mean = fn(self.mean)
            return self

        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            assert state == {"version": 1}

    torch.manual_seed(0)
    return Net()


def _some(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 8, 8, generator=generator), torch.randint(0, 4, (count,), generator=generator)


def test_what_a_model_does_about_modes_and_devices_and_its_state_it_does_for_its_supernet_too() -> None:
    model, (images, targets) = _normed(freezes=True), _some()
    supernet = Supernet(model, trace(model, images[:1]))
    supernet.train()
    assert supernet.training
    assert model.training
    assert not model.get_submodule("body.1").training, "the model keeps it frozen"
    before = model.get_buffer("body.1.running_mean").clone()
    list(train_supernet(supernet, [(images, targets)], SupernetRecipe(epochs=1, batch_size=8)))
    assert torch.equal(model.get_buffer("body.1.running_mean"), before)
    supernet.load_state_dict(model.state_dict())
    assert supernet.state_dict().keys() == model.state_dict().keys()
    both = nn.ModuleList([supernet])
    both.load_state_dict(both.state_dict())
    assert supernet.double() is supernet
    assert model.mean.dtype == torch.float64


@pytest.mark.parametrize("mode", [True, False])
def test_modes_of_a_model_and_of_its_supernet_are_one_and_evaluation_leaves_them(mode: bool) -> None:
    model, (images, targets) = _normed(), _some()
    supernet = Supernet(model, trace(model, images[:1]))
    supernet.train(not mode)
    model.train(mode)
    assert supernet.training is mode
    evaluate(supernet, [(images, targets)])
    assert model.training is mode
    assert copy.deepcopy(supernet).training is mode


def test_a_model_that_writes_into_its_input_is_trained_like_one_that_does_not() -> None:
    found, (images, targets), loss = [], _some(), nn.functional.cross_entropy
    for writes in (False, True):
        model, teacher = _normed(writes=writes).eval(), _normed(writes=writes).double()
        teacher.load_state_dict(model.state_dict())
        space = trace(model, images[:1].clone()).with_choices(bins=4, divisor=2)
        given = images.clone()
        losses = sandwich_backward(Supernet(model, space), given, targets, loss=loss, rng=random.Random(0))
        switches = switch_backward(SwitchableNet(model, space, [1.0, 0.5]).eval(), given, targets, loss=loss)
        assert torch.equal(given, images), "they are the user's"
        recipe = Recipe(epochs=1, batch_size=8, lr=1e-9)
        taught = retrain(model, [(images.clone(), targets)], recipe, teacher=teacher.float(), distill=1.0)
        found.append([*losses.values(), *switches.values(), *(log.losses["loss"] for log in taught)])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@dataclass(frozen=True)
class _Logits:
    logits: Tensor
    of: Any = None


def test_what_narrow_nets_learn_from_is_detached_whatever_it_is_wrapped_in() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> _Logits:
            logits = self.head(self.body(x).relu().mean((2, 3)))
            return _Logits(logits, SimpleNamespace(again=[_Logits(logits)]))

    images, targets = _some()
    seen = []

    def distill(output: _Logits, teacher: _Logits) -> Tensor:
        seen.append(teacher.logits.requires_grad or teacher.of.again[0].logits.requires_grad)
        assert output.logits.requires_grad
        return soft_cross_entropy(output.logits, teacher.logits)

    net = Net()
    supernet = Supernet(net, trace(net, images[:1]))
    loss = lambda output, targets: nn.functional.cross_entropy(output.logits, targets)  # noqa: E731
    sandwich_backward(supernet, images, targets, loss=loss, distill=distill, rng=random.Random(0))
    assert seen == [False, False, False]


@pytest.mark.parametrize("ratios", [None, (0.25, 1.0)])
def test_statistics_are_those_of_the_widest_net_alone_even_if_a_random_one_is_as_wide(ratios: Any) -> None:
    model, (images, targets) = _normed(), _some()
    supernet = Supernet(model.train(), trace(model, images[:1]).with_choices(bins=2, divisor=4))
    rng = random.Random(0)
    for _ in range(20):
        sandwich_backward(supernet, images, targets, loss=nn.functional.cross_entropy, rng=rng, ratios=ratios)
    assert int(model.get_buffer("body.1.num_batches_tracked")) == 20


@pytest.mark.parametrize("kind", ["supernet", "S-Net"])
def test_threads_that_run_subnets_side_by_side_leave_the_model_whole(kind: str) -> None:
    model, (images, _) = _normed().eval(), _some()
    space = trace(model, images[:1])
    net: Any = Supernet(model, space) if kind == "supernet" else SwitchableNet(model, space, [1.0, 0.5, 0.25]).eval()
    which = [space.uniform(ratio) if kind == "supernet" else ratio for ratio in (1.0, 0.5, 0.25)]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items() if isinstance(tensor, Tensor)}
    with torch.no_grad():
        expected = [net(images, each) for each in which]

    def serve(number: int) -> bool:
        torch.set_num_threads(1)
        with torch.no_grad():
            at = [(number + turn) % 3 for turn in range(60)]
            return all(torch.equal(net(images, which[each]), expected[each]) for each in at)

    threads = torch.get_num_threads()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that they meet
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(serve, range(4)))
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(threads)
    after = {name: tensor for name, tensor in net.state_dict().items() if isinstance(tensor, Tensor)}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert before.keys() == after.keys()
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())


@pytest.mark.parametrize("kind", [Supernet, partial(SwitchableNet, switches=[1.0, 0.5])])
def test_replicas_of_data_parallel_are_refused(kind: Any) -> None:
    model, (images, _) = _normed(), _some()
    net = kind(model, trace(model, images[:1]))
    with pytest.raises(SpaceError, match="use DistributedDataParallel"):
        net._replicate_for_data_parallel()  # of nn.DataParallel, which needs GPUs


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": 1, "label": 2}, r"batches are pairs \(inputs, targets\).*number 1 is a dict"),
        ((1, 2, 3), "number 1 is a tuple of 3"),
        ((np.zeros((8, 3, 8, 8)), torch.zeros(8)), "the inputs of batch 1 are a NumPy array"),
        (
            (torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.long)),
            "step 2 of epoch 1 got no samples: its batch is empty",
        ),
    ],
)
def test_batches_that_are_none_are_named_in_training(batch: Any, message: str) -> None:
    model, some = _normed(), _some()
    supernet = Supernet(model, trace(model, some[0][:1]))
    with pytest.raises(AutoSlimError, match=message):
        list(train_supernet(supernet, [some, batch], SupernetRecipe(epochs=1, batch_size=8)))
