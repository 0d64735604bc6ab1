"""MixUp and CutMix, and labels as shares of classes everywhere that labels go."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from autoslim import Recipe, Supernet, SupernetRecipe, SwitchableNet, sandwich_backward, switch_backward, trace
from autoslim.data import Batches, ImageSet, parse_mix
from autoslim.errors import ConfigError, DataError
from autoslim.judge import Judge, evaluate
from autoslim.losses import soft_cross_entropy
from autoslim.train import hard_loss, plain_step, retrain, sandwich_step, train_supernet

CLASSES = 5
PLAIN = {"mean": [0.0], "std": [1 / 255]}


def brightness_set(count: int = 40) -> ImageSet:
    """Images of a single colour each, which is 10 times the label."""
    labels = torch.arange(count) % CLASSES
    return ImageSet((10 * labels).to(torch.uint8).view(-1, 1, 1, 1).expand(count, 1, 8, 12).contiguous(), labels)


def mixed(mix: str, epoch: int = 0, **options: object) -> tuple[Tensor, Tensor]:
    found = Batches(brightness_set(), 8, **PLAIN, mix=mix, num_classes=CLASSES, shuffle=True, **options)
    found.set_epoch(epoch)
    images, shares = zip(*found, strict=True)
    return torch.cat(images), torch.cat(shares)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


@pytest.mark.parametrize("mix", ["mixup", "cutmix", "mixup:0.8,cutmix:0.5"])
def test_labels_have_the_shares_of_the_pixels(mix):
    images, shares = mixed(mix)
    assert shares.shape == (40, CLASSES)
    assert shares.dtype == torch.float32
    torch.testing.assert_close(shares.sum(1), torch.ones(40))
    assert ((shares > 0).sum(1) <= 2).all()
    # with colours that are 10 times the label, the mean colour is what the shares say
    torch.testing.assert_close(images.mean((1, 2, 3)), shares @ (10 * torch.arange(CLASSES).float()))
    assert ((shares > 0).sum(1) == 2).any()


def test_mixup_blends_and_cutmix_pastes():
    images, _ = mixed("mixup:1")
    assert images.flatten(1).std(1).max() < 1e-4
    images, shares = mixed("cutmix:1")
    assert set(images.unique().round().tolist()) <= {0.0, 10.0, 20.0, 30.0, 40.0}
    of_two_colours = (shares > 0).sum(1) == 2
    assert (images.flatten(1).std(1)[of_two_colours] > 1).all()


def test_each_batch_takes_one_of_those_named():
    kinds = set()
    for epoch in range(4):
        images, shares = mixed("mixup:1,cutmix:1", epoch)
        for batch, share in zip(images.split(8), shares.split(8), strict=True):
            if ((share > 0).sum(1) == 2).any():
                kinds.add("mixup" if batch.flatten(1).std(1).max() < 1e-4 else "cutmix")
    assert kinds == {"mixup", "cutmix"}


def test_seed_epoch_and_batch_decide_and_the_global_generator_stays():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = mixed("mixup,cutmix", 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    for here, there in zip(first, mixed("mixup,cutmix", 3), strict=True):
        assert torch.equal(here, there)
    assert not torch.equal(first[0], mixed("mixup,cutmix", 4)[0])
    assert not torch.equal(first[0], mixed("mixup,cutmix", 3, seed=1)[0])
    shares = [share.max(1).values[0].item() for share in mixed("mixup:1")[1].split(8)]
    assert len(set(shares)) > 1  # not the same for every batch


def test_mixed_batches_keep_their_layout():
    data = ImageSet(torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8), torch.arange(16) % 2)
    for mix in ("mixup", "cutmix"):
        found = Batches(data, 8, mean=[0.0] * 3, std=[1.0] * 3, mix=mix, num_classes=2, channels_last=True)
        assert next(iter(found))[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        ("mixp", "did you mean 'mixup'?"),
        ("mixup:0", "write mixup:ALPHA with a number above 0, such as 0.2"),
        ("cutmix:x", "write cutmix:ALPHA"),
        ("mixup:inf", "write mixup:ALPHA"),
        ("mixup,mixup:1", "names one twice"),
        ("none,mixup", "no mixing 'none'"),
        ("", "known: cutmix, mixup, none"),
    ],
)
def test_mixings_that_cannot_be_read(mix, reason):
    with pytest.raises(ConfigError) as caught:
        parse_mix(mix)
    assert reason in str(caught.value)


def test_mixing_needs_the_number_of_classes():
    for classes in (None, 3):
        with pytest.raises(DataError, match=f"mixing needs the number of classes, got {classes}"):
            Batches(brightness_set(), 8, **PLAIN, mix="mixup", num_classes=classes)


# ---- losses and scores


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_shares_is_the_mixture_of_the_losses(smoothing):
    output, a, b = torch.randn(6, CLASSES), torch.randint(CLASSES, (6,)), torch.randint(CLASSES, (6,))
    loss = hard_loss(Recipe(label_smoothing=smoothing))
    shares = nn.functional.one_hot(a, CLASSES) * 0.3 + nn.functional.one_hot(b, CLASSES) * 0.7
    for dtype in (torch.float32, torch.float64):
        logits = output.to(dtype)
        expected = 0.3 * loss(logits, a) + 0.7 * loss(logits, b)
        torch.testing.assert_close(loss(logits, shares), expected)
    torch.testing.assert_close(loss(output, nn.functional.one_hot(a, CLASSES).float()), loss(output, a))


def test_accuracy_of_shares_is_that_of_the_largest():
    net = small_net()
    images, labels = torch.randn(30, 1, 8, 12), torch.randint(CLASSES, (30,))
    shares = nn.functional.one_hot(labels, CLASSES) * 0.6 + 0.4 / CLASSES
    assert evaluate(net, [(images, shares)]) == evaluate(net, [(images, labels)])
    supernet = Supernet(net, trace(net, images[:1]))
    for score in ("accuracy", "loss"):
        hard = nn.functional.one_hot(labels, CLASSES).float()
        scores = [Judge(supernet, [(images, targets)], score)(supernet.space.smallest()) for targets in (labels, hard)]
        assert scores[0] == pytest.approx(scores[1])


# ---- the sandwich


def mixed_batch(mix: str) -> tuple[Tensor, Tensor]:
    images, shares = mixed(mix)
    return images[:8].double() / 40, shares[:8]


@pytest.mark.parametrize("mix", ["mixup:1", "cutmix:1"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_widest_net_learns_as_in_a_plain_step(mix, smoothing):
    """In the sandwich its gradient is that of an ordinary step on the same mixed batch; the others add theirs after."""
    images, shares = mixed_batch(mix)
    net, plain = small_net().double(), small_net().double()
    supernet = Supernet(net, trace(net, images[:1]))
    recipe = SupernetRecipe(label_smoothing=smoothing)
    gradients: dict[str, Tensor] = {}
    lessons: list[Tensor] = []

    def imitate(student: Tensor, teacher: Tensor) -> Tensor:
        if not gradients:  # the widest net is done, the narrower ones have not begun
            gradients.update({name: p.grad.clone() for name, p in net.named_parameters()})
        lessons.append(teacher)
        return soft_cross_entropy(student, teacher)

    losses = sandwich_backward(
        supernet, images, shares, loss=hard_loss(recipe), rng=random.Random(0), num_random=2, distill=imitate
    )
    expected = plain_step(plain, recipe)(images, shares, random.Random(0))
    assert losses["widest"] == expected["loss"]
    for name, parameter in plain.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name
    # the narrower ones learn from its logits on the mixed images, not from shares, and those carry no gradient
    assert len(lessons) == 3
    assert all(lesson is lessons[0] and not lesson.requires_grad for lesson in lessons)
    for name, parameter in net.named_parameters():
        assert not torch.equal(gradients[name], parameter.grad), name


@pytest.mark.parametrize("distill", [True, False, "alpha"])
def test_every_sandwich_takes_shares(distill):
    """Shares of one class each give the gradient of these classes; mixed ones give another."""
    images, shares = mixed_batch("mixup:1")

    def gradient(targets: Tensor) -> Tensor:
        net = small_net().double()
        supernet = Supernet(net, trace(net, images[:1]))
        sandwich_step(supernet, SupernetRecipe(distill=distill))(images, targets, random.Random(1))
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    classes = shares.argmax(1)
    hard, one_hot = gradient(classes), gradient(nn.functional.one_hot(classes, CLASSES).float())
    torch.testing.assert_close(hard, one_hot)
    assert not torch.allclose(gradient(shares), hard)


def test_switches_learn_from_shares():
    images, shares = mixed_batch("cutmix:1")
    net = small_net().double()
    switchable = SwitchableNet(net, trace(net, images[:1]), [1.0, 0.5]).double()
    losses = switch_backward(switchable, images, shares, loss=hard_loss(Recipe()))
    assert set(losses) == {"1", "0.5"}
    assert all(p.grad is not None for p in switchable.norms.parameters())


def test_training_and_retraining_on_mixed_batches():
    found = Batches(
        brightness_set(),
        8,
        **PLAIN,
        mix="mixup,cutmix",
        num_classes=CLASSES,
        shuffle=True,
        drop_last=True,
        augment="flip",
    )
    net = small_net()
    supernet = Supernet(net, trace(net, torch.zeros(1, 1, 8, 12)))
    logs = list(train_supernet(supernet, found, SupernetRecipe(epochs=2, batch_size=8, autocast="bf16")))
    assert set(logs[-1].losses) == {"widest", "narrowest", "random_1", "random_2"}
    plain = small_net()
    recipe = Recipe(epochs=6, batch_size=8, lr=0.05, label_smoothing=0.1)
    losses = [log.losses["loss"] for log in retrain(plain, found, recipe, teacher=net.eval(), distill=0.5)]
    assert losses[-1] < losses[0]
