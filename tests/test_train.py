"""Recipes, optimizer groups, exact resuming, losses that are no number, and what a sandwich step costs in memory."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from autoslim.errors import RunError, TrainError
from autoslim.recipe import Recipe, SupernetRecipe
from autoslim.supernet import Supernet
from autoslim.tracing import trace
from autoslim.train import Training, hard_loss, make_optimizer, plain_step, retrain, sandwich_step, train_supernet


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 16, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(16, 3),
    )


def _batches(count: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    labels = [torch.randint(0, 3, (20,), generator=generator) for _ in range(count)]
    return [(torch.randn(20, 1, 8, 8, generator=generator) + y.view(-1, 1, 1, 1), y) for y in labels]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_schedule_warms_up_and_ends_near_zero(schedule: str) -> None:
    recipe = Recipe(epochs=10, lr=0.4, schedule=schedule, warmup_epochs=2)  # type: ignore[arg-type]
    rates = [recipe.learning_rate(step, 50) for step in range(500)]
    assert rates[0] == pytest.approx(0.4 / 101)
    assert all(a < b for a, b in pairwise(rates[:100]))
    assert rates[100] == pytest.approx(0.4)
    assert all(a > b for a, b in pairwise(rates[100:]))
    assert 0 < rates[-1] < 0.002
    halfway = rates[300]
    assert halfway == pytest.approx(0.2, abs=1e-9)


def test_the_schedule_of_resnets_falls_by_tenths() -> None:
    recipe = Recipe(epochs=100, lr=0.1, schedule="step")
    rates = [recipe.learning_rate(epoch * 5, 5) for epoch in (0, 29, 30, 59, 60, 89, 90, 99)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


def test_no_weight_decay_on_depthwise_kernels_norms_and_biases() -> None:
    net = _net()
    decayed, others = make_optimizer(net, Recipe(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    # "0.weight" has one input channel, for grey images, and is no depthwise kernel
    assert {names[id(p)] for p in decayed["params"]} == {"0.weight", "4.weight", "10.weight"}
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_label_smoothing_spreads_over_the_other_classes() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 3, 0])
    soft = torch.full((5, 4), 0.1 / 3, dtype=torch.float64)
    soft[torch.arange(5), targets] = 0.9
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    assert float(hard_loss(Recipe(label_smoothing=0.1))(logits, targets)) == pytest.approx(float(expected), abs=1e-12)
    plain = hard_loss(Recipe())(logits, targets)
    assert torch.equal(plain, nn.functional.cross_entropy(logits, targets))


def test_training_resumed_between_epochs_is_bit_exact() -> None:
    recipe = SupernetRecipe(epochs=4, lr=0.1)
    batches = _batches()

    def fresh() -> tuple[Supernet, Training]:
        net = _net()
        supernet = Supernet(net, trace(net, torch.zeros(1, 1, 8, 8)).with_choices(4, 2, 0.25))
        return supernet, Training(supernet, recipe, len(batches), seed=3)

    supernet, straight = fresh()
    logs = [straight.run_epoch(batches, sandwich_step(supernet, recipe)) for _ in range(4)]
    supernet, first = fresh()
    for _ in range(2):
        first.run_epoch(batches, sandwich_step(supernet, recipe))
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    supernet, second = fresh()
    torch.manual_seed(123)  # whatever the process did before
    second.load_state(saved, 2)
    resumed = [second.run_epoch(batches, sandwich_step(supernet, recipe)) for _ in range(2)]
    assert [log.losses for log in resumed] == [log.losses for log in logs[2:]]
    assert straight.state().keys() == second.state().keys()
    assert all(torch.equal(tensor, second.state()[name]) for name, tensor in straight.state().items())
    assert set(logs[0].losses) == {"widest", "narrowest", "random_1", "random_2"}


def test_training_leaves_the_global_generator_alone() -> None:
    net = _net()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(retrain(net, _batches(), Recipe(epochs=1)))
    assert torch.equal(torch.rand(3), expected)


def test_retraining_learns_and_a_teacher_changes_it() -> None:
    batches = _batches()
    losses = [log.losses["loss"] for log in retrain(_net(), batches, Recipe(epochs=12, lr=0.1))]
    assert losses[-1] < 0.7 * losses[0]
    teacher = _net().eval()
    taught = [
        log.losses["loss"] for log in retrain(_net(), batches, Recipe(epochs=2, lr=0.1), teacher=teacher, distill=1.0)
    ]
    assert taught[0] != losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_public_training_loop_trains_a_supernet() -> None:
    net = _net()
    supernet = Supernet(net, trace(net, torch.zeros(1, 1, 8, 8)).with_choices(4, 2, 0.25))
    logs = list(train_supernet(supernet, _batches(), SupernetRecipe(epochs=10, lr=0.1, num_random=1)))
    assert [log.epoch for log in logs] == list(range(1, 11))
    assert set(logs[0].losses) == {"widest", "narrowest", "random_1"}
    assert logs[-1].losses["widest"] < 0.8 * logs[0].losses["widest"]


def test_a_loss_that_is_no_number_names_the_step() -> None:
    net = _net()
    training = Training(net, Recipe(epochs=1), 6)
    calls = 0

    def step(inputs: object, targets: object, rng: random.Random) -> dict[str, float]:
        nonlocal calls
        calls += 1
        return {"loss": math.inf if calls == 3 else 1.0}

    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(TrainError, match="loss became inf at step 3 of epoch 1"):
        training.run_epoch(_batches(), step)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_checkpoint_of_another_net_is_refused() -> None:
    state = Training(_net(), Recipe(), 6).state()
    other = nn.Sequential(nn.Conv2d(1, 4, 3))
    with pytest.raises(RunError, match="another network"):
        Training(other, Recipe(), 6).load_state(state, 1)


def test_one_optimizer_step_per_batch() -> None:
    net = _net()
    training = Training(net, Recipe(epochs=1), 6)
    steps = 0
    real = training.optimizer.step

    def counted(*arguments: object, **options: object) -> None:
        nonlocal steps
        steps += 1
        real()

    training.optimizer.step = counted  # type: ignore[method-assign]
    training.run_epoch(_batches(), plain_step(net, Recipe()))
    assert steps == 6


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_a_sandwich_step_needs_hardly_more_memory_than_a_plain_one() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/bench_memory.py", "--quick"], capture_output=True, text=True, check=True
    )
    ratios = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("ratio")]
    assert ratios
    assert max(ratios) <= 1.1
