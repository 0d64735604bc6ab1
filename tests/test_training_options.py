"""What a recipe may ask for: laws of accumulation, averages, precisions, checkpointing, and steps that go wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import random
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoslim
from autoslim import pipeline
from autoslim.checkpointing import blocks_of, checkpointed
from autoslim.config import make_config
from autoslim.errors import ConfigError, TrainError
from autoslim.losses import plain_backward
from autoslim.optimizers import make_optimizer, make_schedule
from autoslim.recipe import Recipe, RetrainRecipe, SupernetRecipe
from autoslim.supernet import Supernet
from autoslim.tracing import trace
from autoslim.train import MOST_SKIPPED, Training, plain_step, retrain, sandwich_step, train_supernet, unshared
from test_pipeline import artefacts, config, fails, run

__all__ = ["config"]  # the fixture


def net(norm: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1), nn.ReLU()]
    if norm:
        layers.insert(1, nn.BatchNorm2d(8))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)).to(dtype)


def batches(size: int, count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (size * count,), generator=generator)
    images = torch.randn(size * count, 1, 8, 8, generator=generator, dtype=dtype) + labels.view(-1, 1, 1, 1)
    return list(zip(images.split(size), labels.split(size), strict=True))


def supernet_of(model: nn.Module) -> Supernet:
    return Supernet(model, trace(copy.deepcopy(model).float(), torch.zeros(1, 1, 8, 8)).with_choices(4, 2, 0.25))


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float = 0.0) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[k].double(), other[k].double(), rtol=tolerance, atol=tolerance) for k in one
    )


# --- accumulation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"optimizer": "adamw", "clip_value": 0.1}])
def test_accumulated_batches_are_one_large_batch(options: dict[str, Any]) -> None:
    """Plain and sandwich steps, with a last step of fewer batches and a last batch of fewer images."""
    small = batches(4, 11)
    small[-1] = (small[-1][0][:3], small[-1][1][:3])
    large = [
        (torch.cat([x for x, _ in group]), torch.cat([y for _, y in group]))
        for group in (small[start : start + 3] for start in range(0, 11, 3))
    ]
    nets = []
    for data, accumulate in ((small, 3), (large, 1)):
        plain, shared = net(), net()
        recipe = SupernetRecipe(epochs=2, lr=0.05, accumulate=accumulate, **options)
        logs = list(retrain(plain, data, recipe))
        logs += list(train_supernet(supernet_of(shared), data, recipe, seed=4))
        nets.append((plain.state_dict(), shared.state_dict(), logs))
    assert same(nets[0][0], nets[1][0], 1e-9)
    assert same(nets[0][1], nets[1][1], 1e-9)
    for one, other in zip(nets[0][2], nets[1][2], strict=True):
        assert one.losses == pytest.approx(other.losses, abs=1e-9)


def test_gradients_are_clipped_by_their_norm() -> None:
    model = net()
    training = Training(model, Recipe(epochs=1, lr=1.0, momentum=0, weight_decay=0, clip_norm=0.01), 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training.run_epoch(batches(16, 1), plain_step(model, Recipe()))
    moved = torch.cat([(p.detach() - before[name]).flatten() for name, p in model.named_parameters()])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


# --- averages -----------------------------------------------------------------------------------------------------


def test_the_average_is_that_of_torch_and_is_what_is_kept() -> None:
    data = batches(8, 5)
    decay, follower = 0.8, net(norm=True)
    by_hand = torch.optim.swa_utils.AveragedModel(
        follower, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True
    )
    training = Training(follower, Recipe(epochs=1, lr=0.05), 5)
    real = training._update

    def update() -> None:
        real()
        by_hand.update_parameters(follower)

    training._update = update  # type: ignore[method-assign]
    training.run_epoch(data, plain_step(follower, Recipe()))

    model = net(norm=True)
    list(retrain(model, data, Recipe(epochs=1, lr=0.05, ema=decay)))
    expected = by_hand.module.state_dict()
    expected["1.num_batches_tracked"] = follower.state_dict()["1.num_batches_tracked"]  # a whole number has no average
    assert same(model.state_dict(), expected, 1e-12)
    assert not same(model.state_dict(), follower.state_dict(), 1e-6)


@pytest.mark.parametrize("stop_at", [None, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"ema": 0.9},
        {"optimizer": "adamw", "optimizer_args": {"betas": [0.8, 0.9]}, "schedule": "torch:OneCycleLR"},
        {"optimizer": "timm:lamb", "schedule": "timm:cosine", "ema": 0.5},
        {
            "optimizer": "timm:lookahead_adamw",
            "optimizer_args": {"betas": [0.8, 0.9]},
        },  # slow weights at every sixth step
        {"optimizer": "nadam", "schedule": "torch:StepLR", "schedule_args": {"step_size": 1}},
        {"autocast": "fp16", "accumulate": 2},
    ],
)
def test_resuming_is_exact_in_the_middle_of_an_epoch_too(options: dict[str, Any], stop_at: int | None) -> None:
    if "timm" in str(options):
        pytest.importorskip("timm")
    recipe = SupernetRecipe(epochs=3, lr=0.01, warmup_epochs=0.5, **options)
    data = batches(8, 6, torch.float32)

    def fresh() -> tuple[Supernet, Training]:
        model = nn.Sequential(net(True, torch.float32), nn.Dropout(0.3))
        supernet = supernet_of(model)
        return supernet, Training(supernet, recipe, len(data), seed=7)

    supernet, straight = fresh()
    logs = [straight.run_epoch(data, sandwich_step(supernet, recipe)) for _ in range(3)]
    supernet, first = fresh()
    assert first.run_epoch(data, sandwich_step(supernet, recipe)) is not None
    if stop_at is not None:
        calls = iter(range(100))
        assert first.run_epoch(data, sandwich_step(supernet, recipe), stop=lambda: next(calls) + 1 == stop_at) is None
    saved, record = {k: t.clone() for k, t in first.state().items()}, json.loads(json.dumps(first.record()))
    assert record["steps"] == (stop_at or 0)
    supernet, second = fresh()
    torch.manual_seed(99)
    second.load_state(saved, record["epoch"], record)
    resumed = [second.run_epoch(data, sandwich_step(supernet, recipe)) for _ in range(2)]
    assert [log.losses for log in resumed if log] == [log.losses for log in logs[1:] if log]
    assert same(straight.state(), second.state())
    straight.finish()
    second.finish()
    assert same(unshared(straight.model), unshared(second.model))


# --- optimizers and schedules by name -----------------------------------------------------------------------------

OPTIMIZERS = ["sgd", "adam", "adamw", "adamax", "nadam", "radam", "rmsprop", "adagrad", "adadelta", "adafactor"]


@pytest.mark.parametrize("name", [*OPTIMIZERS, "timm:lamb", "timm:lion", "timm:lookahead_adamw"])
def test_weight_decay_spares_norms_biases_and_depthwise_kernels_whatever_the_optimizer(name: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    model = net(norm=True, dtype=torch.float32)
    optimizer = make_optimizer(model, Recipe(optimizer=name, lr=0.1, weight_decay=0.5))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(8):  # lookahead moves at its sixth
        optimizer.step()
    decayed = {n for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}
    assert decayed == {"0.weight", "4.weight", "8.weight"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"optimizer": "adamm"}, "did you mean 'adam"),
        ({"optimizer": "lbfgs"}, "several times a step"),
        ({"optimizer": "timm:lambb"}, "did you mean 'lamb"),
        ({"optimizer": "apex:lamb"}, "timm:NAME"),
        ({"optimizer": "adamw", "optimizer_args": {"beta": 1}}, "did you mean 'betas'"),
        ({"optimizer": "adamw", "optimizer_args": {"lr": 1}}, "a key of the recipe itself"),
        ({"optimizer": "adamw", "optimizer_args": {"betas": [2, 2]}}, "Invalid beta"),
        (
            {"optimizer": "adam", "optimizer_args": {"betas": [0.9]}},
            r"optimizer_args {'betas': \[0.9\]} cannot be used",
        ),
        ({"optimizer": "adam", "optimizer_args": {"betas": {"a": 1}}}, "cannot be used"),
        ({"optimizer": "timm:lamb", "optimizer_args": {"betas": [0.9]}}, "cannot be used: not enough values to unpack"),
        ({"optimizer": "rprop"}, "set weight_decay=0"),
        ({"schedule": "linaer"}, "did you mean 'linear'"),
        ({"schedule": "torch:StepLr2"}, "did you mean 'torch:StepLR'"),
        ({"schedule": "torch:StepLR"}, "step_size"),
        ({"schedule": "torch:StepLR", "schedule_args": {"gama": 1}}, "did you mean 'gamma'"),
        ({"schedule": "torch:ReduceLROnPlateau"}, "a figure to get worse"),
        ({"schedule": "torch:LambdaLR"}, "a Python function"),
        ({"schedule": "timm:plateau"}, "no schedule 'timm:plateau'"),
        ({"schedule": "cosine", "schedule_args": {"T_max": 3}}, "has no options"),
        ({"schedule": "torch:ExponentialLR", "schedule_args": {"gamma": "0,9"}}, "schedule_args gamma='0,9' cannot be"),
        (
            {"schedule": "torch:ExponentialLR", "schedule_args": {"gamma": -0.9}},
            "its learning rate is -0.09 at step 11",
        ),
        ({"schedule": "torch:StepLR", "schedule_args": {"step_size": 0}}, "with schedule_args step_size=0 cannot be"),
        ({"schedule": "torch:StepLR", "schedule_args": {"step_size": "a"}}, "step_size='a' cannot be used"),
        ({"schedule": "torch:MultiStepLR", "schedule_args": {"milestones": "30, 60"}}, "'30, 60' are no whole epochs"),
        ({"schedule": "torch:CosineAnnealingLR", "schedule_args": {"T_max": 0}}, "T_max=0 .* it is filled in"),
        ({"schedule": "torch:OneCycleLR", "schedule_args": {"total_steps": 3}}, "total_steps=3 .* it is filled in"),
        ({"schedule": "timm:step", "schedule_args": {"decay_epochs": 0}}, "decay_epochs=0 cannot be used"),
        ({"schedule": "timm:cosine", "schedule_args": {"num_epochs": 0}}, "t_initial > 0"),
    ],
)
def test_a_wrong_name_or_option_is_answered(options: dict[str, Any], expected: str) -> None:
    if "timm" in str(options):
        pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=expected) as error:
        Training(net(), Recipe(**options), 10)
    assert "\n" not in str(error.value)


def test_a_schedule_of_retraining_is_asked_for_its_rates_before_anything_is_trained(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ("--set", "retrain.epochs=2", "--set", "retrain.schedule=torch:StepLR")
    error = fails(capsys, "run", config, *wrong, "--set", "retrain.schedule_args={step_size: 0}")
    assert "schedule 'torch:StepLR' with schedule_args step_size=0 cannot be used" in error
    assert not Path("runs/small/train.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"train": {"lr": math.inf}}, "train.lr: Input should be less than inf"),
        ({"train": {"lr": True}}, "train.lr: a number is wanted here, got True"),
        ({"train": {"weight_decay": math.inf}}, "train.weight_decay: "),
        ({"train": {"warmup_epochs": math.inf}}, "train.warmup_epochs: "),
        ({"train": {"epochs": True}}, "train.epochs: a number is wanted"),
        ({"retrain": {"distill": True}}, "retrain.distill: a number is wanted"),
    ],
)
def test_rates_are_finite_numbers(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make_config({"model": "m:f", **options})
    assert make_config({"model": "m:f", "train": {"lr": "1e-3"}}).train.lr == 1e-3  # YAML reads it as text


def test_schedules_of_torch_and_timm_are_theirs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.4)
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    schedule = make_schedule(Recipe(epochs=8, lr=0.4, schedule="torch:CosineAnnealingLR", warmup_epochs=2), 5)
    assert [schedule(step)["lr"] for step in range(10)] == pytest.approx([0.4 * (s + 1) / 11 for s in range(10)])
    for epoch in range(6):
        assert {schedule(10 + 5 * epoch + step)["lr"] for step in range(5)} == {expected.get_last_lr()[0]}
        optimizer.step()
        expected.step()
    one = make_schedule(Recipe(epochs=4, lr=0.4, schedule="torch:OneCycleLR", schedule_args={"pct_start": 0.5}), 5)
    rates = [dict(one(step)) for step in range(20)]
    assert max(r["lr"] for r in rates) == pytest.approx(0.4)
    assert min(r["momentum"] for r in rates) == pytest.approx(0.85)  # it cycles momentum the other way
    assert dict(one(3)) == rates[3]  # walked back
    pytest.importorskip("timm")
    poly = make_schedule(Recipe(epochs=4, lr=0.4, schedule="timm:poly", schedule_args={"decay_rate": 1.0}), 5)
    assert [poly(step)["lr"] for step in range(20)] == pytest.approx([0.4 * (1 - step / 20) for step in range(20)])


# --- precisions, checkpointing, compile ---------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_learn(precision: str, device: torch.device) -> None:
    data = [(x.to(device), y.to(device)) for x, y in batches(16, 6, torch.float32)]
    model = net(True, torch.float32).to(device)
    logs = list(retrain(model, data, Recipe(epochs=6, lr=0.1, autocast=precision)))  # type: ignore[arg-type]
    assert logs[-1].losses["loss"] < 0.8 * logs[0].losses["loss"]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def test_fp16_scales_the_loss_and_leaves_out_steps_that_overflow() -> None:
    model = net(True, torch.float32)
    training = Training(model, Recipe(epochs=1, autocast="fp16", lr=0.01), 2)
    assert training.scaler is not None
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    training.run_epoch(batches(8, 1, torch.float32), plain_step(model, Recipe()))
    assert all(torch.equal(before[n], p.detach()) for n, p in model.named_parameters())
    assert training.scaler.get_scale() < 2.0**120


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 1, bias=False),
            nn.BatchNorm2d(4 * channels),
            nn.ReLU(),
            nn.Conv2d(4 * channels, 4 * channels, 3, padding=1, groups=4 * channels),
            nn.Dropout(0.2),
            nn.Conv2d(4 * channels, channels, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def deep(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    blocks = [Block(4) for _ in range(5)]
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Sequential(*blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).to(dtype)


def kept(run: Any) -> int:
    """Bytes that a forward pass keeps for its backward, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


def test_checkpointing_changes_memory_and_nothing_else() -> None:
    data = batches(8, 3)
    found = []
    for checkpointing in (False, True):
        recipe = SupernetRecipe(epochs=2, lr=0.05, checkpointing=checkpointing)
        plain, shared = deep(), deep()
        switchable = autoslim.SwitchableNet(deep(), supernet_of(deep()).space, [1.0, 0.5])
        logs = list(retrain(plain, data, recipe))
        logs += list(train_supernet(supernet_of(shared), data, recipe))
        step = autoslim.train.switch_step(switchable, recipe)
        training = Training(switchable, recipe, 3)
        training.run_epoch(data, step)
        found.append((plain.state_dict(), shared.state_dict(), switchable.state_dict(), [log.losses for log in logs]))
    assert same(found[0][0], found[1][0])  # running statistics and dropout too, to the bit
    assert same(found[0][1], found[1][1])
    assert same(found[0][2], found[1][2])
    assert found[0][3] == found[1][3]

    model, images = deep(), data[0][0]
    assert len(blocks_of(model)) == 5
    whole = kept(lambda: model(images))
    with checkpointed(model):
        little = kept(lambda: model(images))
    assert little < 0.5 * whole
    assert "forward" not in vars(model[1][0])


def test_long_sequences_are_checkpointed_in_pieces_and_a_bare_layer_says_no() -> None:
    flat = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Conv2d(2, 2, 3, padding=1), nn.ReLU()))).double()
    model = nn.Sequential(nn.Conv2d(1, 2, 3), flat, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).double()
    images, targets = batches(4, 1)[0]
    gradients, whole = [], 0
    for blocks in (False, True):
        model.zero_grad()
        if blocks:
            with checkpointed(model):
                assert kept(lambda: model(images)) < 0.6 * whole
                nn.functional.cross_entropy(model(images), targets).backward()
        else:
            whole = kept(lambda: model(images))
            nn.functional.cross_entropy(model(images), targets).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert same(gradients[0], gradients[1])
    with pytest.raises(TrainError, match="no blocks"):
        list(retrain(nn.Linear(3, 3), [(torch.randn(2, 3), torch.tensor([0, 1]))], Recipe(checkpointing=True)))


def test_compile_is_for_plain_nets(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "torch.compile would translate every one anew" in fails(capsys, "run", config, "--set", "train.compile=true")
    assert not (in_tmp / "runs").exists() or not (in_tmp / "runs/small/config.yaml").exists()
    translated = []

    def compiled(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:  # dynamo without a C++ compiler
        translated.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend=compiled))
    data, nets = batches(8, 4, torch.float32), (net(True, torch.float32), net(True, torch.float32))
    for model, asked in zip(nets, (True, False), strict=True):
        list(retrain(model, data, RetrainRecipe(epochs=2, lr=0.05, compile=asked)))
    assert len(translated) == 1  # once for all steps
    assert same(nets[0].state_dict(), nets[1].state_dict(), 1e-5)
    with pytest.raises(TrainError, match="choose one"):
        plain_step(nets[0], Recipe(compile=True, checkpointing=True))


# --- what goes wrong ----------------------------------------------------------------------------------------------


def poisoned(data: list[tuple[Tensor, Tensor]], *places: int) -> list[tuple[Tensor, Tensor]]:
    return [(x * math.nan if number in places else x, y) for number, (x, y) in enumerate(data)]


def test_steps_whose_loss_is_no_number_are_left_out_without_a_trace() -> None:
    data = batches(8, 6)
    recipe = SupernetRecipe(epochs=1, lr=0.05, on_nan="skip", schedule="linear", ema=0.9)
    told: list[str] = []
    model = net(norm=True)
    training = Training(model, recipe, 6)
    log = training.run_epoch(poisoned(data, 1, 4), plain_step(model, recipe), on_skip=told.append)
    assert log is not None
    assert log.skipped == 2
    assert math.isfinite(log.losses["loss"])
    assert all(tensor.isfinite().all() for tensor in training.state().values())
    assert "loss became nan at step 2 of epoch 1 (batch 2" in told[0]
    assert "2 in this epoch" in told[1]
    with pytest.raises(TrainError, match="leave such steps out with on_nan=skip"):
        list(retrain(net(), poisoned(data, 1), Recipe(epochs=1)))


def test_a_net_that_a_step_destroyed_is_no_result() -> None:
    recipe = Recipe(epochs=1, on_nan="skip")
    with pytest.raises(TrainError, match="2 of the 3 steps of epoch 1 were skipped; the weights are likely destroyed"):
        list(retrain(net(), poisoned(batches(4, 3), 1, 2), recipe))
    with pytest.raises(TrainError, match="the last 2 steps of the training were skipped"):
        list(retrain(net(), poisoned(batches(4, 6), 4, 5), recipe))
    assert [log.skipped for log in retrain(net(), poisoned(batches(4, 6), 5), recipe)] == [1]  # one bad batch


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("timm:adahessian", "needs second-order gradients"),
        ("timm:bnbadam", "needs bitsandbytes"),
        ("timm:fusedsgd", "needs apex"),
        ("muon", "takes matrices only"),
        ("timm:adahesian", "no optimizer 'timm:adahesian'"),
    ],
)
def test_optimizers_that_cannot_work_are_refused(name: str, text: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=text) as error:
        make_optimizer(net(), Recipe(optimizer=name))
    assert "'adahessian'" not in str(error.value)


def test_a_schedule_names_the_arguments_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"'torch:StepLR' needs step_size: .* schedule_args.step_size="):
        make_schedule(Recipe(schedule="torch:StepLR"), 10)
    assert make_schedule(Recipe(schedule="torch:StepLR", schedule_args={"step_size": 2}), 10)(0)["lr"] == 0.1


def test_blocks_are_looked_for_before_the_training(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = f"{Path(__file__).parent / 'small_net.py'}:flat"
    error = fails(capsys, "train", config, "--set", "train.checkpointing=true", "--set", f"model={flat}")
    assert "small_net.py:flat' has no blocks of layers" in error
    assert not Path("runs/small/train.jsonl").exists()


def test_too_many_in_a_row_stop_and_a_gradient_may_be_what_is_no_number() -> None:
    recipe = Recipe(epochs=1, on_nan="skip")
    data = batches(4, MOST_SKIPPED + 3)
    with pytest.raises(TrainError, match=f"{MOST_SKIPPED} steps in a row"):
        list(retrain(net(), poisoned(data, *range(1, len(data))), recipe))
    with pytest.raises(TrainError, match="every step of epoch 1 was skipped"):
        list(retrain(net(), poisoned(data[:3], 0, 1, 2), recipe))

    def steep(output: Tensor, targets: Tensor) -> Tensor:
        """A finite loss, with an infinite slope at the second step."""
        calls.append(1)
        extra = (output[0, 0] - output[0, 0].detach()).abs().sqrt() if len(calls) == 2 else 0.0
        return nn.functional.cross_entropy(output, targets) + extra

    calls: list[int] = []
    model = net()
    (log,) = retrain(model, data[:4], recipe, loss=steep)
    assert log.skipped == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())


class Small(nn.Module):
    """A net on a machine whose memory holds five images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.net, self.most = net(True), most

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.net(x)


def test_out_of_memory_names_a_batch_size_that_was_tried() -> None:
    model = Small(5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainError, match=r"at a batch of 24; .*of 3 was tried.*batch_size=3, with accumulate=8"):
        list(retrain(model, batches(24, 2), Recipe(epochs=1)))
    assert same(before, model.state_dict())
    supernet = supernet_of(net())
    real = supernet.forward
    supernet.forward = lambda x, w=None: model(x) if len(x) > 5 else real(x, w)  # type: ignore[method-assign]
    with pytest.raises(TrainError, match="batch_size=4, with accumulate=2"):
        list(train_supernet(supernet, batches(8, 2), SupernetRecipe(epochs=1)))
    with pytest.raises(TrainError, match="even for a batch of 1"):
        list(retrain(Small(0), batches(4, 1), Recipe(epochs=1)))


def test_a_run_goes_on_after_a_loss_that_is_no_number(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline.training_step

    def poison(*arguments: Any) -> Any:
        step, calls = real(*arguments), 0

        def wrapped(inputs: Any, *rest: Any) -> Any:
            nonlocal calls
            calls += 1
            return step(inputs * (math.nan if calls == 12 else 1.0), *rest)

        return wrapped

    monkeypatch.setattr(pipeline, "training_step", poison)
    error = fails(capsys, "train", config)
    assert "widest loss became nan at step 3 of epoch 2 (batch 3" in error
    assert "the last good checkpoint is" in error
    assert "--on-nan" in error or "on_nan=skip" in error
    capsys.readouterr()
    assert run("train", config, "--on-nan", "skip") == 0  # the same directory; the twelfth step of this process
    lines = [json.loads(line) for line in (in_tmp / "runs/small/train.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0, 1]
    assert "step left out, 1 in this epoch" in " ".join(capsys.readouterr().err.split())


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Send this process a signal at a step of training."""

    def arrange(step_number: int, number: int) -> None:
        real, calls = Training._forward_backward, 0

        def wrapped(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step_number:
                os.kill(os.getpid(), number)
            return real(*arguments)

        monkeypatch.setattr(Training, "_forward_backward", wrapped)

    yield arrange
    monkeypatch.undo()


def test_a_signal_finishes_the_step_and_the_run_goes_on_exactly(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], kill_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--set", "train.ema=0.9", "--set", "retrain.optimizer=adamw", "--set", "data.augment=crop"]
    assert run("run", config, *options, "--run-dir", "whole", "--set", "retrain.lr=0.01") == 0
    options += ["--run-dir", "cut", "--set", "retrain.lr=0.01"]
    for step, number, code in ((12, signal.SIGTERM, 143), (20, signal.SIGINT, 130)):  # in training, then in retraining
        with monkeypatch.context():
            kill_at(step, number)
            capsys.readouterr()
            assert run("run", config, *options) == code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert f"stopped by {signal.Signals(number).name}" in lines[0]
        monkeypatch.undo()
        monkeypatch.chdir(in_tmp)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        (checkpoint,) = (in_tmp / "cut").rglob("checkpoint.safetensors")
        record = autoslim.export.load_tensors(checkpoint)[1]
        assert record["steps"] > 0
    assert run("run", in_tmp / "cut") == 0
    assert artefacts(in_tmp / "cut") == artefacts(in_tmp / "whole")


def test_a_lost_process_goes_on_within_the_epoch(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--set", "train.ema=0.9", "--set", "data.augment=crop"]
    assert run("train", config, *options, "--run-dir", "whole") == 0
    real, calls = Training._forward_backward, 0

    def lost(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 14:
            raise KeyboardInterrupt  # nothing is written on the way out, as after kill -9
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_forward_backward", lost)
        assert run("train", config, *options, "--run-dir", "cut", "--set", "train.checkpoint_minutes=1e-9") == 130
    capsys.readouterr()
    assert run("train", config, *options, "--run-dir", "cut") == 0
    assert "continues after epoch 1 and 4 steps" in capsys.readouterr().err
    assert artefacts(in_tmp / "cut") == artefacts(in_tmp / "whole")


def test_a_recipe_is_plain_data() -> None:
    recipe = Recipe(optimizer_args={"betas": [0.9, 0.99]})
    assert hash(recipe) == hash(dataclasses.replace(recipe))
    rng = random.Random(0)
    model = net()
    assert plain_step(model, recipe)(*batches(4, 1)[0], rng, plain_backward).keys() == {"loss"}


def test_alpha_divergence_has_its_gradients_clipped_unless_something_else_is_asked() -> None:
    def clip_value(**train: Any) -> float | None:
        return make_config({"model": "m:f", "train": train}).train.clip_value

    assert clip_value(distill="alpha") == 1.0
    assert clip_value(distill="alpha", clip_value=0.5) == 0.5
    assert clip_value(distill="alpha", clip_value=None) is None
    assert clip_value() is clip_value(distill=True) is None


@pytest.mark.parametrize("place", [0, 1])
def test_checkpointing_leaves_a_forward_that_was_put_in_place(place: int) -> None:
    """As wrappers and hooks of others do; around a block, and around a sequence that would be run in pieces."""
    blocks = nn.Sequential(*(Block(4) for _ in range(4)))
    pieces = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(12)))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), blocks, pieces).double().eval()
    wrapped, images = [blocks[1], pieces][place], batches(4, 1)[0][0]
    own, calls = wrapped.forward, list[int]()

    def forward(x: Tensor) -> Tensor:
        calls.append(1)
        result: Tensor = own(x)
        return 2 * result

    wrapped.forward = forward
    expected = model(images)
    with checkpointed(model):
        calls.clear()
        assert torch.equal(model(images), expected)
        assert calls
    assert vars(wrapped)["forward"] is forward
    assert not any("forward" in vars(module) for module in model.modules() if module is not wrapped)
    assert torch.equal(model(images), expected)


class Normalised(nn.Module):
    """Normalisation of every kind, and depthwise kernels that are made up of others."""

    def __init__(self) -> None:
        super().__init__()
        weight_norm, spectral_norm = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm
        self.norms = nn.ModuleList(
            [nn.LayerNorm([8, 6, 6]), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.RMSNorm([6, 6])]
        )
        self.deep = nn.ModuleList(
            [
                weight_norm(nn.Conv2d(8, 8, 3, padding=1, groups=8)),
                spectral_norm(nn.ConvTranspose2d(8, 8, 3, padding=1, groups=8)),
                nn.Conv2d(8, 16, 1, groups=8),
            ]
        )
        self.grouped = weight_norm(nn.Conv2d(16, 8, 1, groups=4))
        self.head = nn.Linear(8, 3)


def test_weight_decay_spares_norms_with_a_shape_and_depthwise_kernels_under_a_parametrization() -> None:
    model = Normalised()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    decayed, _ = make_optimizer(model, Recipe(weight_decay=0.5)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "grouped.parametrizations.weight.original0",
        "grouped.parametrizations.weight.original1",
        "head.weight",
    }
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()), "no iteration was made"


@pytest.mark.parametrize("stop_at", [None, 2])
def test_a_checkpoint_is_the_same_while_the_average_is_shown(stop_at: int | None) -> None:
    data = batches(8, 4)

    def start() -> tuple[nn.Module, Training]:
        model = net(norm=True)
        return model, Training(model, Recipe(epochs=2, lr=0.05, ema=0.8), 4, seed=1)

    model, training = start()
    training.run_epoch(data, plain_step(model, Recipe()), stop=lambda: training._current.steps + 1 == stop_at)
    expected = {name: tensor.clone() for name, tensor in training.state().items()}
    training.show_average(True)
    shown = {name: tensor.clone() for name, tensor in unshared(model).items()}
    assert same(training.state(), expected)
    assert same(unshared(model), shown), "what is shown stays"
    assert not same(shown, {name.removeprefix("model."): t for name, t in expected.items() if "model." in name}, 1e-9)

    other, resumed = start()
    resumed.run_epoch(data, plain_step(other, Recipe()))
    resumed.show_average(True)  # and is put aside by what is loaded
    resumed.load_state(expected, training.epoch, training.record())
    assert same(resumed.state(), expected)
    assert same(unshared(other), {name: expected[f"model.{name}"] for name in unshared(other)})


def test_an_epoch_trains_the_weights_though_the_average_is_shown() -> None:
    results = []
    for is_shown in (False, True):
        model = net(norm=True)
        training = Training(model, Recipe(epochs=2, lr=0.05, ema=0.8), 4)
        for _ in range(2):
            training.run_epoch(batches(8, 4), plain_step(model, Recipe()))
            training.show_average(is_shown)
        results.append(training.state())
    assert same(*results)


@pytest.mark.parametrize("place", ["loader", "sampler", "batch sampler", "sampler of batches"])
def test_an_epoch_goes_on_with_the_images_that_are_left_whoever_draws_their_order(place: str) -> None:
    numbers = torch.arange(20, dtype=torch.float64).view(-1, 1)
    data = torch.utils.data.TensorDataset(numbers, torch.zeros(20, dtype=torch.int64))

    class Drawn(torch.utils.data.Sampler[list[int]]):
        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(5)

        def __iter__(self) -> Iterator[list[int]]:
            yield from (each.tolist() for each in torch.randperm(20, generator=self.generator).split(5))

        def __len__(self) -> int:
            return 4

    own = torch.Generator().manual_seed(5)
    sampler = torch.utils.data.RandomSampler(data, generator=own)
    options: dict[str, Any] = {
        "loader": {"batch_size": 5, "shuffle": True, "generator": own},
        "sampler": {"batch_size": 5, "sampler": sampler},
        "batch sampler": {"batch_sampler": Drawn()},
        "sampler of batches": {"batch_sampler": torch.utils.data.BatchSampler(sampler, 5, drop_last=False)},
    }[place]
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(data, **options)
    model = nn.Linear(1, 2).double()
    training = Training(model, Recipe(epochs=2, lr=1e-6), len(loader))
    plain, seen = plain_step(model, Recipe()), list[list[int]]()

    def step(inputs: Tensor, *rest: Any) -> Mapping[str, float]:
        seen.append([int(number) for number in inputs])
        return plain(inputs, *rest)

    assert training.run_epoch(loader, step, stop=lambda: len(seen) == 2) is None
    assert training.run_epoch(loader, step) is not None
    assert sorted(number for batch in seen for number in batch) == list(range(20))
    first = [*seen]
    training.run_epoch(loader, step)
    assert seen[4:] != first, "each epoch has its own order"
