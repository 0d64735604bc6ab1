"""What a recipe refuses, however it is made, and what its keys do in the loops of Python."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoslim
from autoslim.config import make_config
from autoslim.errors import AutoSlimError, ConfigError, TrainError
from autoslim.losses import alpha_divergence, soft_cross_entropy
from autoslim.recipe import Recipe, RetrainRecipe, SupernetRecipe
from autoslim.train import Training, retrain, sandwich_step, switch_step, train_supernet
from test_training_options import kept, same


def net() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def supernet() -> autoslim.Supernet:
    model = net()
    return autoslim.Supernet(model, autoslim.trace(model, torch.zeros(1, 3, 8, 8)).with_choices(4, 2, 0.25))


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(60) % 4
    images = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + labels.view(-1, 1, 1, 1) * 0.5
    return list(zip(images.to(dtype).split(20), labels.split(20), strict=True))


def refusal(run: Callable[[], object], kind: type[AutoSlimError] = TrainError) -> str:
    with pytest.raises(kind) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def losses_of(logs: Iterator[autoslim.train.EpochLog]) -> list[dict[str, float]]:
    return [log.losses for log in logs]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"autocast": "bf61"}, "autocast: Input should be 'none', 'bf16' or 'fp16', got 'bf61'; did you mean 'bf16'?"),
        ({"autocast": torch.bfloat16}, "autocast: Input should be 'none', 'bf16' or 'fp16', got torch.bfloat16"),
        ({"clip_value": -1}, "clip_value: Input should be greater than 0, got -1"),
        ({"clip_norm": -1.0}, "clip_norm: Input should be greater than 0, got -1.0"),
        ({"momentum": 2.0}, "momentum: Input should be less than 1, got 2.0"),
        ({"weight_decay": -1}, "weight_decay: Input should be greater than or equal to 0, got -1"),
        ({"label_smoothing": 2.0}, "label_smoothing: Input should be less than 1"),
        ({"warmup_epochs": -1}, "warmup_epochs: Input should be greater than or equal to 0"),
        ({"lr": True}, "lr: a number is wanted here, got True"),
        ({"lr": np.array([[0.1], [0.2]])}, "lr: Input should be a valid number, got array([[0.1], [0.2]])"),
        ({"lr": math.nan}, "lr: Input should be less than inf, got nan"),
        ({"epochs": 0}, "epochs: Input should be greater than or equal to 1, got 0"),
        ({"epochs": 1.5}, "epochs: Input should be a valid integer, got a number with a fractional part, got 1.5"),
        ({"epochs": "three"}, "epochs: Input should be a valid integer"),
        ({"checkpointing": "x"}, "checkpointing: Input should be a valid boolean"),
        ({"on_nan": "Skip"}, "on_nan: Input should be 'stop' or 'skip', got 'Skip'; did you mean 'skip'?"),
        ({"accumulate": 0}, "accumulate: Input should be greater than or equal to 1"),
        ({"ema": 5.0}, "ema: Input should be less than 1"),
        ({"optimizer": None}, "optimizer: Input should be a valid string, got None"),
        ({"schedule": None}, "schedule: Input should be a valid string, got None"),
        ({"optimizer_args": [0.9]}, "optimizer_args: Input should be a valid dictionary, got [0.9]"),
        ({"sort": "zz"}, "sort: Input should be 'none', 'l1', 'gamma' or 'first-order', got 'zz'"),
        ({"num_random": -1}, "num_random: Input should be greater than or equal to 0"),
        (
            {"distill": "alfa"},
            "distill: Input should be a valid boolean, unable to interpret input, or 'auto' or 'alpha', got 'alfa'; "
            "did you mean 'alpha'?",
        ),
        ({"distill": 0.5}, "distill: Input should be a valid boolean"),
    ],
)
def test_a_recipe_refuses_from_python_what_a_configuration_does(options: dict[str, Any], expected: str) -> None:
    text = refusal(lambda: SupernetRecipe(**options), ConfigError)
    assert text.startswith(f"SupernetRecipe: {expected}")
    assert refusal(lambda: dataclasses.replace(SupernetRecipe(), **options), ConfigError) == text
    said = refusal(lambda: make_config({"model": "a:b", "train": options}), ConfigError)
    assert said == text.replace("SupernetRecipe: ", "configuration: train.")
    assert refusal(lambda: autoslim.Config(model="a:b", train=options), ConfigError) == said.split(": ", 1)[1]  # type: ignore[arg-type]


def test_a_configuration_from_python_names_its_keys() -> None:
    assert autoslim.Config(model="a:b", train={"lr": "0.5"}).train.lr == 0.5  # type: ignore[arg-type]
    assert "'model' is missing" in refusal(lambda: autoslim.Config(), ConfigError)  # type: ignore[call-arg]
    unknown = refusal(lambda: autoslim.Config(model="a:b", trian={}), ConfigError)  # type: ignore[call-arg]
    assert unknown == "no key 'trian'; did you mean 'train'?"
    assert "1: Keys should be strings" in refusal(lambda: make_config({"model": "a:b", 1: 2}), ConfigError)  # type: ignore[dict-item]


def test_a_recipe_reads_numbers_as_a_configuration_does() -> None:
    recipe = Recipe(epochs="3", lr="1e-3", momentum=0)  # type: ignore[arg-type]
    assert recipe == Recipe(epochs=3, lr=0.001, momentum=0.0)
    assert (type(recipe.epochs), type(recipe.lr)) == (int, float)
    assert list(retrain(net(), batches(), recipe))[-1].epoch == 3

    @dataclasses.dataclass(frozen=True)
    class Mine(SupernetRecipe):
        weights: Tensor | None = None

    assert Mine(epochs=2, weights=torch.ones(2)).epochs == 2
    assert "Mine: lr: " in refusal(lambda: Mine(lr=-1), ConfigError)


def test_distillation_is_what_was_asked_for() -> None:
    def trained(recipe: SupernetRecipe, **options: Any) -> list[dict[str, float]]:
        return losses_of(train_supernet(supernet(), batches(), recipe, **options))

    recipe = SupernetRecipe(epochs=1, lr=0.05)
    soft, none, alpha = (trained(recipe, distill=each) for each in (soft_cross_entropy, False, alpha_divergence))
    assert soft != none != alpha != soft
    assert trained(recipe) == trained(recipe, distill=True) == trained(recipe, distill="auto") == soft
    assert trained(recipe, distill="alpha") == trained(dataclasses.replace(recipe, distill="alpha")) == alpha
    assert trained(dataclasses.replace(recipe, distill=False)) == none
    assert trained(dataclasses.replace(recipe, distill=False), distill=True) == soft
    for wrong in ("alfa", 0.5, 1):
        assert f"got {wrong!r}" in refusal(lambda wrong=wrong: trained(recipe, distill=wrong))  # type: ignore[misc]


def test_keys_that_only_a_run_can_follow_are_refused_elsewhere() -> None:
    shared, data = supernet(), batches()
    text = refusal(lambda: list(train_supernet(shared, data, SupernetRecipe(plain_epochs=1))))
    assert "plain_epochs=1" in text
    assert "retrain(supernet.model" in text
    assert "sort_channels" in refusal(lambda: list(train_supernet(shared, data, SupernetRecipe(sort="l1"))))
    assert "SwitchableNet" in refusal(lambda: list(retrain(net(), data, RetrainRecipe(jointly=True))))
    assert "SupernetRecipe" in refusal(lambda: list(train_supernet(shared, data, Recipe())))  # type: ignore[arg-type]


def test_channels_last_is_the_layout_of_weights_and_batches() -> None:
    seen: list[bool] = []
    shared, plain = supernet(), net()
    for model in (shared.model, plain):
        layer = model.get_submodule("3")
        layer.register_forward_pre_hook(lambda module, args: seen.append(_is_last(args[0])))
    list(train_supernet(shared, batches(), SupernetRecipe(epochs=1, channels_last=True)))
    list(retrain(plain, batches(), Recipe(epochs=1, channels_last=True)))
    assert len(seen) == 3 * 4 + 3
    assert all(seen)
    assert _is_last(shared.model.get_parameter("3.weight"))
    assert _is_last(plain.get_parameter("3.weight"))
    one, other = net().double(), net().double()
    for model, is_last in ((one, False), (other, True)):
        list(retrain(model, batches(torch.float64), Recipe(epochs=2, channels_last=is_last)))
    assert same(one.state_dict(), other.state_dict(), 1e-9)


def _is_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def test_a_teacher_and_its_share_of_the_loss_go_together() -> None:
    data, teacher = batches(), net()

    def trained(recipe: Recipe, **options: Any) -> list[dict[str, float]]:
        return losses_of(retrain(net(), data, recipe, **options))

    plain, taught = Recipe(epochs=1, lr=0.05), RetrainRecipe(epochs=1, lr=0.05, distill=0.9)
    expected = trained(plain, teacher=teacher, distill=0.9)
    assert trained(taught, teacher=teacher) == expected
    assert trained(taught, teacher=teacher, distill=0.2) == trained(plain, teacher=teacher, distill=0.2) != expected
    assert trained(plain, teacher=teacher, distill=0.0) == trained(plain)  # one of a series of weights
    assert "needs a teacher" in refusal(lambda: trained(taught))
    assert "needs a teacher" in refusal(lambda: trained(plain, distill=0.9))
    assert "share of the loss" in refusal(lambda: trained(plain, teacher=teacher))
    for wrong in (5, -1, math.nan, True, "0.5"):
        text = refusal(lambda wrong=wrong: trained(plain, teacher=teacher, distill=wrong))  # type: ignore[misc]
        assert text.startswith(f"distill must be a number from 0 to 1, the teacher's share of the loss; got {wrong!r}")


@pytest.mark.parametrize("kind", ["module", "supernet"])
def test_a_teacher_runs_in_evaluation_mode_and_stays_as_it_was(kind: str) -> None:
    teacher = net() if kind == "module" else supernet()
    teacher.train()
    teacher.get_submodule("1").eval()
    root = teacher.model if isinstance(teacher, autoslim.Supernet) else teacher
    modes = [module.training for module in root.modules()]
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    recipe = Recipe(epochs=1, lr=0.05)
    logs = losses_of(retrain(net(), batches(), recipe, teacher=teacher, distill=1.0))
    assert same(teacher.state_dict(), before)
    assert [module.training for module in root.modules()] == modes
    assert logs == losses_of(retrain(net(), batches(), recipe, teacher=teacher.eval(), distill=1.0))


def deep() -> nn.Module:
    """A flat sequence of 24 layers."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1)]
    for _ in range(6):
        layers += [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def test_shared_weights_of_a_plain_sequence_can_be_checkpointed() -> None:
    """It was refused for a supernet, and an S-Net kept everything, as all of the sequence was one block."""
    space = autoslim.trace(deep(), torch.zeros(1, 3, 8, 8)).with_choices(4, 2, 0.25)
    data = batches(torch.float64)
    images = data[0][0]
    found: list[tuple[list[Any], dict[str, Tensor], list[int]]] = []
    for kind in ("supernet", "s-net"):
        for checkpointing in (False, True):
            recipe = SupernetRecipe(epochs=2, lr=0.05, checkpointing=checkpointing)
            shared = autoslim.Supernet(deep().double(), space)
            switchable = autoslim.SwitchableNet(deep().double(), space, [1.0, 0.75, 0.5, 0.25])
            trained: nn.Module = shared if kind == "supernet" else switchable
            step = sandwich_step(shared, recipe) if kind == "supernet" else switch_step(switchable, recipe)
            nets = (None, space.smallest()) if kind == "supernet" else (1.0, 0.25)
            training = Training(trained, recipe, len(data))
            logs = [training.run_epoch(data, step)]
            state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
            memory: list[int] = []

            def weighed(*given: Any, net: nn.Module = trained, nets: Any = nets, memory: Any = memory) -> Any:
                memory.extend(kept(lambda which=which: net(images, which)) for which in nets)  # type: ignore[misc]
                return {"loss": 0.0}

            training.run_epoch(data[:1], weighed)
            found.append(([log.losses for log in logs if log is not None], state, memory))
    for whole, little in (found[:2], found[2:]):
        assert little[0] == whole[0]
        assert same(little[1], whole[1])  # to the bit
        assert all(one < 0.6 * other for one, other in zip(little[2], whole[2], strict=True))


def test_a_loss_for_each_sample_is_answered() -> None:
    def each(output: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, targets, reduction="none")

    shared, data = supernet(), batches()
    switchable = autoslim.SwitchableNet(net(), shared.space, [1.0, 0.5])
    images, targets = data[0]
    for run in (
        lambda: autoslim.sandwich_backward(shared, images, targets, loss=each, rng=random.Random(0)),
        lambda: autoslim.switch_backward(switchable, images, targets, loss=each),
        lambda: list(retrain(net(), data, Recipe(epochs=1), loss=each)),
        lambda: list(retrain(net(), data, Recipe(epochs=1, accumulate=2), loss=each)),
        lambda: list(train_supernet(shared, data, SupernetRecipe(epochs=1), distill=each_of)),
    ):
        text = refusal(run)
        assert "got a tensor of shape (20,)" in text
        assert "mean" in text


def each_of(output: Tensor, teacher: Tensor) -> Tensor:
    return (output - teacher).square().mean(dim=1)


def test_batches_that_can_be_gone_through_once_are_refused() -> None:
    class Stream(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(batches())

    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    for given, name in (((each for each in batches()), "generator"), (loader, "Stream")):
        for run in (
            lambda given=given: list(retrain(net(), given, Recipe(epochs=2))),
            lambda given=given: list(train_supernet(supernet(), given, SupernetRecipe(epochs=2))),
        ):
            text = refusal(run)
            assert f"'{name}' has no len()" in text
            assert "a list of batches, or a DataLoader" in text
