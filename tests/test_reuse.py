"""Judges that compute less give the same answers: reuse exactly, racing within its stated error."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import nets
from autoslim import Judge, MacCost, RacingJudge, ReuseJudge, Supernet, Widths, greedy_slim, trace
from autoslim.calibrate import batch_statistics, recalibrate_batchnorm
from autoslim.errors import ConfigError
from autoslim.judge import evaluate
from autoslim.precision import lowered, rounding_of
from autoslim.reuse import Diverged, Reuse, _Look
from autoslim.scores import count_of, negative_loss
from autoslim.slicing import run_subnet
from autoslim.space import ChannelSpace
from autoslim.tracing import split_input, tensors_in
from test_laws import EVERY, make

# torch runs other operators for weights that are views, and to flatten what has a single channel left
DIFFERENT_PATHS = {"weight_norm", "deviations_of_groups"}


# the rest of torchvision has no operator that these have not
SLOW = {f"torchvision:{name}" for name in ("vgg11_bn", "resnext50_32x4d", "efficientnet_b0", "mnasnet1_0")}
NETS = [name for name in EVERY if name not in SLOW]


@pytest.fixture
def blank_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody should read is no number; else memory that was free may still hold the right ones."""
    blank = _Look.blank

    def filled(self: _Look, shape: Sequence[int]) -> Tensor:
        tensor = blank(self, shape)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(_Look, "blank", filled)


@pytest.mark.usefixtures("blank_is_nan")
@pytest.mark.parametrize("name", NETS)
def test_a_pass_that_reuses_what_was_kept_gives_what_a_whole_pass_gives(name: str) -> None:
    net, x = make(name)
    space = trace(net, x).with_choices(bins=4, divisor=1)
    rng = random.Random(0)
    compared = 0
    with torch.no_grad(), batch_statistics(net):
        before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
        reuse = Reuse(net, space, x)
        some = rng.sample([*space.groups], min(6, len(space.groups)))
        groups = [group for group in some if reuse.plan(group) is not None]
        for _ in range(2):
            widths = space.sample(rng)
            candidates = {g: c for g in groups if (c := space.narrowed(widths, g)) is not None}
            try:
                output, kept = reuse.keep(widths, x, candidates)
            except Diverged:
                assert name in DIFFERENT_PATHS
                continue
            _assert_same(output, _whole(net, space, widths, x))
            for group, candidate in candidates.items():
                _assert_same(reuse.run(kept, group, candidate, x), _whole(net, space, candidate, x))
                compared += 1
            # other inputs, by the operators written down above
            y = tree_map(_others, x)
            _, kept = reuse.keep(widths, y, candidates)
            for group, candidate in candidates.items():
                _assert_same(reuse.run(kept, group, candidate, y), _whole(net, space, candidate, y))
        assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert compared or not groups


HARD_CODED = {"written_in_place", "hard_coded_view", "lists_and_keywords"}  # the number of samples, or no batches


@pytest.mark.parametrize("name", [*sorted({*nets.MENAGERIE} - HARD_CODED), "autoslim:shufflenet_v1"])
def test_plans_hold_for_any_number_of_samples(name: str) -> None:
    """More than they were found with, also where samples and channels are one axis."""
    net, few = make(name)
    x = tree_map(_seven, few)
    space = trace(net, x).with_choices(**({} if ":" in name else {"bins": 4, "divisor": 1}))
    with torch.no_grad(), batch_statistics(net):
        reuse = Reuse(net, space, x)
        groups = [group for group in space.groups if reuse.plan(group) is not None]
        for widths in (space.full(), space.sample(random.Random(0))):
            candidates = {g: c for g in groups if (c := space.narrowed(widths, g)) is not None}
            try:
                _, kept = reuse.keep(widths, x, candidates)
            except Diverged:
                assert name in DIFFERENT_PATHS
                continue
            for group, candidate in candidates.items():
                for _ in range(2):  # by its code, and as it was written down
                    _assert_same(reuse.run(kept, group, candidate, x), _whole(net, space, candidate, x))


def _seven(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or leaf.ndim == 0:
        return leaf
    return torch.cat([_others(leaf) if number % 2 else leaf for number in range(7)])[:7]


class _Folded(nn.Module):
    """Makes samples and channels one axis in the middle, in one way or another."""

    def __init__(self, fold: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.fold = fold
        self.one, self.two, self.three = nets.conv(3, 8), nets.conv(8, 8), nets.conv(8, 8)
        self.norm, self.scales = nn.InstanceNorm2d(8, affine=True), nn.Parameter(torch.rand(8))
        self.kernels = nn.Linear(8, 8 * 9)
        self.register_buffer("blur", torch.ones(1, 1, 3, 3) / 9)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.three(self.two(self.fold(self.one(x), self)) + 1).mean((2, 3)))


def _blurred(x: Tensor, net: Any) -> Tensor:
    n, c, h, w = x.shape
    return F.conv2d(x.reshape(n * c, 1, h, w), net.blur, padding=1).view(n, c, h, w)


def _by_its_own_kernels(x: Tensor, net: Any) -> Tensor:
    n, c, h, w = x.shape
    kernels = net.kernels(x.mean((2, 3))).view(n * c, 1, 3, 3)
    return F.conv2d(x.reshape(1, n * c, h, w), kernels, padding=1, groups=n * c).view(n, c, h, w)


FOLDS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "instance norm": lambda x, net: net.norm(x),
    "batch norm of one": lambda x, net: F.batch_norm(x.reshape(1, -1, 8, 8), None, None, training=True).view_as(x),
    "images of channels": _blurred,
    "repeated scales": lambda x, net: x * net.scales.repeat(len(x)).view(len(x), -1, 1, 1),
    "samples within channels": lambda x, net: (
        F.relu(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, len(x))).transpose(0, 1)
    ),
    "kernels of each sample": _by_its_own_kernels,
}


@pytest.mark.parametrize("fold", FOLDS)
def test_judges_agree_where_samples_are_folded_into_channels(fold: str) -> None:
    torch.manual_seed(0)
    net = _Folded(FOLDS[fold])
    batches = [(torch.randn(size, 3, 8, 8), torch.randint(0, 5, (size,))) for size in (20, 20, 13)]
    supernet = Supernet(net, trace(net, batches[0][0]).with_choices(bins=4, divisor=2, min_ratio=0.25))
    _assert_judges_agree(supernet, batches)


def _assert_judges_agree(supernet: Supernet, batches: Sequence[tuple[Any, Any]], score: Any = "loss") -> None:
    """On all candidates of each step of a whole walk; with plans for every group that has one."""
    space, exact = supernet.space, Judge(supernet, batches, score)
    quick = [ReuseJudge(supernet, batches, score), RacingJudge(supernet, batches, score, confidence=1)]
    widths, rng = space.full(), random.Random(0)
    while candidates := {g: c for g in space.groups if (c := space.narrowed(widths, g)) is not None}:
        expected = {group: exact(candidate) for group, candidate in candidates.items()}
        for judge in quick:
            found = {group: each for group, (each, _) in judge.compare(widths, candidates).items()}
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)
        widths = candidates[rng.choice([*candidates])]


class _TwoHeads(nn.Module):
    """A group of one head leaves the output of the other as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.one, self.two = (
            nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 1, 1)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        return {"one": self.one(x), "two": self.two(x), "features": x}


@pytest.mark.usefixtures("blank_is_nan")
def test_outputs_that_do_not_differ_are_those_that_were_kept() -> None:
    torch.manual_seed(0)
    net = _TwoHeads()
    supernet = Supernet(net, trace(net, torch.zeros(1, 3, 8, 8)).with_choices(4, 1, 0.2))
    batches = [(torch.randn(8, 3, 8, 8), torch.zeros(8)) for _ in range(2)]
    assert Reuse(net, supernet.space, batches[0][0]).plan("one.0") is not None

    def score(output: dict[str, Tensor], targets: Tensor) -> Tensor:
        off = (output["one"] - 1).square() + (output["two"] + 1).square()
        return -off.mean((1, 2, 3)) - output["features"].mean((1, 2, 3))

    _assert_judges_agree(supernet, batches, score)


class _Scaled(nn.Module):
    """Its own code scales by a number that depends on a width, where nothing but that is computed anew."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two, self.three = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        width = self.two.out_channels if self.kind == "attribute" else x.shape[1]
        if self.kind == "tensor":
            x = x * torch.tensor(2.0 if width > 10 else 0.5, dtype=x.dtype)
        else:
            x = F.leaky_relu(x - 0.1, 0.5 if width > 10 else 0.1)
        return self.head(F.relu(self.three(F.relu(self.two(x)))).mean((2, 3)))


@pytest.mark.parametrize("kind", ["shape", "attribute", "tensor"])
def test_judges_agree_where_a_number_in_the_code_depends_on_a_width(kind: str) -> None:
    torch.manual_seed(0)
    net = _Scaled(kind)
    batches = [(torch.randn(12, 3, 8, 8), torch.randint(0, 5, (12,))) for _ in range(3)]
    supernet = Supernet(net, trace(net, batches[0][0]).with_choices(bins=6, divisor=2, min_ratio=0.25))
    _assert_judges_agree(supernet, batches)


class _Remembering(nn.Module):
    """Makes a constant for each number of channels once, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nets.conv(3, 12), nets.conv(12, 12), nn.Linear(12, 5)
        self.known: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        key = (x.shape[1], x.dtype, x.device)
        if key not in self.known:
            self.known[key] = torch.arange(x.shape[1], dtype=x.dtype, device=x.device).view(1, -1, 1, 1) / 10
        return self.head(self.two(x + self.known[key]).mean((2, 3)))


class _Writing(nn.Module):
    """Normalises its images in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nets.conv(3, 12), nets.conv(12, 12), *nets.head(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.sub_(0.2).mul_(0.8))


@pytest.mark.parametrize("kind", [_Remembering, _Writing])
def test_judges_agree_on_nets_that_keep_or_change_things(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = kind()
    batches = [(torch.randn(12, 3, 8, 8), torch.randint(0, 5, (12,))) for _ in range(3)]
    before = [images.clone() for images, _ in batches]
    supernet = Supernet(net, trace(net, torch.randn(2, 3, 8, 8)).with_choices(bins=4, divisor=2, min_ratio=0.25))
    _assert_judges_agree(supernet, batches)
    next(greedy_slim(supernet.space, ReuseJudge(supernet, batches, screen=1), MacCost(supernet.space), ["50%"]))
    rounding_of(supernet, lowered(supernet), batches, negative_loss)
    assert evaluate(net, batches) == evaluate(net, batches)
    recalibrate_batchnorm(net, [images for images, _ in batches])
    assert all(torch.equal(images, old) for (images, _), old in zip(batches, before, strict=True))


@pytest.mark.parametrize("form", [dict, tuple, list])
def test_targets_of_several_heads_weigh_batches_by_their_samples(form: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nets.conv(3, 12), nets.conv(12, 12), *nets.head(12))
    batches = [(torch.randn(size, 3, 8, 8), torch.randint(0, 5, (size,))) for size in (20, 20, 6)]

    def score(output: Tensor, targets: Any) -> Tensor:
        labels = targets["labels"] if isinstance(targets, dict) else targets[0]
        return negative_loss(output, labels)

    several = [(images, form({"labels": labels, "masks": labels}.items() if form is dict else [labels, labels]))
               for images, labels in batches]  # fmt: skip
    supernet = Supernet(net, trace(net, batches[0][0]).with_choices(bins=4, divisor=2, min_ratio=0.25))
    widths = supernet.space.smallest()
    assert Judge(supernet, several, score)(widths) == pytest.approx(Judge(supernet, batches)(widths), abs=1e-6)
    assert evaluate(net, several, score) == pytest.approx(evaluate(net, batches, negative_loss), abs=1e-6)
    path, expected = (
        [*greedy_slim(supernet.space, judge, MacCost(supernet.space), ["50%"])]
        for judge in (RacingJudge(supernet, several, score), RacingJudge(supernet, batches))
    )
    assert path == expected


@pytest.mark.parametrize(
    ("inputs", "targets", "count"),
    [
        (torch.zeros(7, 3, 4, 4), {"labels": torch.zeros(7), "boxes": torch.zeros(20, 4)}, 7),
        (torch.zeros(7, 3, 4, 4), torch.zeros(20, 5), 7),  # the boxes of all images
        ([torch.zeros(3, 4, 4), torch.zeros(3, 5, 5)], [{"boxes": torch.zeros(1, 4)}, {"boxes": torch.zeros(9, 4)}], 2),
        ([torch.zeros(7, 3, 4, 4), torch.zeros(7, 3, 2, 2)], torch.zeros(7), 7),  # one argument: two scales
        ((torch.zeros(7, 3, 4, 4), torch.zeros(())), (torch.zeros(7), torch.zeros(7)), 7),
        ({"scale": 2.0, "images": torch.zeros(7, 3, 4, 4)}, [torch.zeros(7), torch.zeros(7)], 7),
        (("a", "b", "c"), [0, 1, 2], 3),
    ],
)
def test_samples_of_a_batch_are_counted_whatever_it_is_made_of(inputs: Any, targets: Any, count: int) -> None:
    assert count_of(inputs, targets) == count


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda output, targets: output[:, :1], r"shape \(100,\), or their mean; got shape \(100, 1\); take the mean"),
        (lambda output, targets: output[:3, 0], r"shape \(100,\), or their mean; got shape \(3,\)$"),
        (lambda output, targets: float(output.mean()), "must be a tensor, .* got a float"),
    ],
)
@pytest.mark.parametrize("kind", [Judge, ReuseJudge, RacingJudge])
def test_scores_that_cannot_be(kind: type[Judge], score: Any, message: str) -> None:
    supernet, batches = _supernet()
    with pytest.raises(ConfigError, match=message):
        next(greedy_slim(supernet.space, kind(supernet, batches, score), MacCost(supernet.space), ["50%"]))
    with pytest.raises(ConfigError, match=message):
        evaluate(supernet.model, batches, score)


def _others(leaf: Any) -> Any:
    return leaf * 0.5 + 0.1 if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _whole(net: nn.Module, space: ChannelSpace, widths: Widths, x: object) -> object:
    args, kwargs = split_input(x)
    return run_subnet(net, space, widths, args, kwargs)


def _assert_same(one: object, other: object) -> None:
    for left, right in zip(tensors_in(one), tensors_in(other), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "torchvision:resnet50", "autoslim:mobilenet_v1"])
def test_every_group_is_reused_and_half_of_the_work_is_spared(name: str) -> None:
    net, x = make(name)
    space = trace(net, x)
    with torch.no_grad(), batch_statistics(net):
        reuse = Reuse(net, space, x)
        plans = [reuse.plan(group) for group in space.groups]
    assert all(plan is not None for plan in plans)
    assert sum(plan.share for plan in plans if plan is not None) / len(plans) < 0.6


def test_what_is_kept_stays_within_the_memory_given() -> None:
    supernet, batches = _supernet()
    judge = ReuseJudge(supernet, batches, keep_bytes=0)
    widths = supernet.space.full()
    candidates = {g: c for g in supernet.space.groups if (c := supernet.space.narrowed(widths, g)) is not None}
    assert judge._reused(widths, candidates, batches[0][0]) == set()
    exact = Judge(supernet, batches)
    for group, (score, worth) in judge.compare(widths, candidates).items():
        assert score == worth == pytest.approx(exact(candidates[group]), abs=1e-6)
    some = ReuseJudge(supernet, batches, keep_bytes=1_000_000)
    reused = some._reused(widths, candidates, batches[0][0])
    needed = {index for group in reused for index in some.reuse._known(group).needed}
    _, kept = some.reuse.keep(widths, batches[0][0], reused)
    kept_bytes = sum(leaf.nbytes for leaves in kept.results.values() for leaf in leaves if isinstance(leaf, Tensor))
    assert 0 < len(reused) < len(candidates)
    assert kept_bytes <= 1_000_000
    assert kept.results.keys() == needed


@pytest.mark.parametrize("kind", [ReuseJudge, RacingJudge])
def test_a_lone_candidate_is_judged_on_all_images(kind: type[ReuseJudge]) -> None:
    supernet, batches = _supernet()
    space = supernet.space
    group = next(iter(space.groups))
    candidate = space.narrowed(space.full(), group)
    assert candidate is not None
    ((score, _),) = kind(supernet, batches).compare(space.full(), {group: candidate}).values()
    assert score == pytest.approx(Judge(supernet, batches)(candidate), abs=1e-6)


@pytest.mark.parametrize("rule", ["score", "score-per-cost"])
def test_the_search_takes_the_same_path_however_it_is_judged(rule: str) -> None:
    supernet, batches = _supernet()
    cost = MacCost(supernet.space)
    paths = {}
    for name, judge in {
        "exhaustive": Judge(supernet, batches),
        "reuse": ReuseJudge(supernet, batches),
        "race to the end": RacingJudge(supernet, batches, confidence=1),
    }.items():
        paths[name] = list(greedy_slim(supernet.space, judge, cost, ["30%"], rule=rule))
    for path in paths.values():
        assert [step.widths for step in path] == [step.widths for step in paths["exhaustive"]]
        for step, exact in zip(path, paths["exhaustive"], strict=True):
            assert step.score == pytest.approx(exact.score, abs=1e-5)


def test_a_race_looks_at_fewer_images_and_finds_the_same() -> None:
    supernet, batches = _supernet()
    seen: dict[str, int] = {}

    def counting(output: Tensor, targets: Tensor) -> Tensor:
        seen[current] = seen.get(current, 0) + len(targets)
        return negative_loss(output, targets)

    space, cost = supernet.space, MacCost(supernet.space)
    judges = {"all": ReuseJudge(supernet, batches, counting), "race": RacingJudge(supernet, batches, counting)}
    paths = {}
    for current, judge in judges.items():
        paths[current] = [step.group for step in greedy_slim(space, judge, cost, ["50%"])]
    same = sum(one == other for one, other in zip(paths["all"], paths["race"], strict=False))
    assert same >= 0.9 * len(paths["all"])
    assert seen["race"] < 0.7 * seen["all"]


def test_the_second_score_is_that_of_the_images_seen() -> None:
    supernet, batches = _supernet()
    judge = ReuseJudge(supernet, batches, "loss", also="accuracy")
    step = next(greedy_slim(supernet.space, judge, MacCost(supernet.space), ["50%"]))
    for widths in (step.widths, supernet.space.full()):
        accuracy, images = judge.also_of(widths)
        assert accuracy == pytest.approx(Judge(supernet, batches, "accuracy")(widths))
        assert images == 800
    race = RacingJudge(supernet, batches, "loss", also="accuracy")
    step = next(greedy_slim(supernet.space, race, MacCost(supernet.space), ["50%"]))
    accuracy, images = race.also_of(step.widths)
    part = [batch for number, batch in enumerate(batches) if number < images // 100]
    assert accuracy == pytest.approx(Judge(supernet, part, "accuracy")(step.widths))


class _SinglePrecision(nn.Module):
    """A net that does not run in double precision."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.float())  # type: ignore[no-any-return]


def test_a_net_that_cannot_be_tried_out_runs_as_a_whole() -> None:
    supernet, batches = _supernet()
    net = _SinglePrecision(supernet.model)
    space = trace(net, batches[0][0][:1]).with_choices(bins=3, divisor=2)
    judges = [kind(Supernet(net, space), batches) for kind in (Judge, ReuseJudge)]
    assert judges[1].reuse.whole() == [*space.groups]
    paths = [[step.widths for step in greedy_slim(space, judge, MacCost(space), ["60%"])] for judge in judges]
    assert paths[0] == paths[1]


class _Drawn(RacingJudge):
    """A race of nets whose scores are drawn, so that it is known which is the best on all samples."""

    def __init__(self, supernet: Supernet, drawn: Mapping[Widths, Tensor], batch: int, confidence: float) -> None:
        count = len(next(iter(drawn.values())))
        places = torch.arange(count).split(batch)
        super().__init__(supernet, [(p, p) for p in places], lambda output, targets: output, confidence=confidence)
        self.drawn = drawn

    def _outputs(self, widths, candidates, inputs):  # type: ignore[no-untyped-def]
        outputs = ((group, self.drawn[candidate][inputs]) for group, candidate in candidates.items())
        return lambda: self.drawn[widths][inputs], outputs


@pytest.mark.parametrize("spread", [0.0, 0.05])
@pytest.mark.parametrize("drift", [0.0, 0.2])
def test_the_best_is_dropped_no_more_often_than_stated(spread: float, drift: float) -> None:
    """Scores of nets that hardly differ, as with shuffled labels: much in common, and a little of their own.

    What they were worth some steps before resembles what they are worth now, or is another thing altogether.
    """
    supernet, _ = _supernet()
    space = supernet.space
    full = space.full()
    candidates = {g: c for g in space.groups if (c := space.narrowed(full, g)) is not None}
    wrong, runs, confidence, dropped = 0, 200, 0.9, 0
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(800, generator=generator)

    for _ in range(runs):
        common = -draw().exp()  # skewed, as losses are
        before = {g: -0.3 * draw() * common + spread * float(draw()[0]) for g in candidates}
        now = {g: before[g] + 0.1 * draw() * common + drift * float(draw()[0]) for g in candidates}
        scores = {full: common} | {candidates[g]: common + now[g] for g in candidates}
        judge = _Drawn(supernet, scores, 100, confidence)
        judge.learn({f"gained.{g}": before[g] for g in candidates})
        left = judge.compare(full, candidates)
        wrong += max(candidates, key=lambda g: float(now[g].mean())) not in left
        dropped += len(candidates) - len(left)
    assert wrong <= (1 - confidence) * runs
    assert dropped > 0


def test_a_search_goes_on_where_another_race_stopped() -> None:
    """Killed after any step: the same groups, widths and scores to the last digit."""
    supernet, batches = _supernet()
    space, cost = supernet.space, MacCost(supernet.space)
    judge, states = RacingJudge(supernet, batches), []
    steps = []
    for step in greedy_slim(space, judge, cost, ["50%"]):
        steps.append(step)
        states.append({name: tensor.clone() for name, tensor in judge.learned().items()})
    for killed in range(0, len(steps) - 1, 3):
        resumed = RacingJudge(supernet, batches)
        for state in states[: killed + 1]:
            resumed.learn(state)
        rest = [*greedy_slim(space, resumed, cost, ["50%"], start=steps[killed].widths)]
        assert rest == steps[killed + 1 :]


def test_a_race_needs_a_score_per_sample() -> None:
    supernet, batches = _supernet()
    judge = RacingJudge(supernet, batches, lambda output, targets: negative_loss(output, targets).mean())
    with pytest.raises(ConfigError, match="score per sample"):
        next(greedy_slim(supernet.space, judge, MacCost(supernet.space), ["50%"]))
    with pytest.raises(ConfigError, match="confidence"):
        RacingJudge(supernet, batches, confidence=95)


def _supernet() -> tuple[Supernet, list[tuple[Tensor, Tensor]]]:
    """A net in whose channels there is something to choose between, and images whose classes it has seen."""
    torch.manual_seed(0)
    layers = [nets.conv(incoming, outgoing) for incoming, outgoing in ((3, 12), (12, 16), (16, 16), (16, 12), (12, 8))]
    net = nn.Sequential(*layers, *nets.head(8))
    images = torch.randn(800, 3, 12, 12)
    space = trace(net, images[:1]).with_choices(bins=4, divisor=2)
    with torch.no_grad(), batch_statistics(net):
        targets = net(images).argmax(1)
    return Supernet(net, space), [(images[i : i + 100], targets[i : i + 100]) for i in range(0, 800, 100)]


def test_what_was_written_down_keeps_no_tensor_of_the_pass() -> None:
    supernet, batches = _supernet()
    space, inputs = supernet.space, batches[0][0]
    with torch.no_grad(), batch_statistics(supernet.model):
        reuse = Reuse(supernet.model, space, inputs)
        groups = [group for group in space.groups if reuse.plan(group) is not None]
        _, kept = reuse.keep(space.full(), inputs, groups)
        before = _bytes_of_activations(len(inputs))
        for group in groups:
            candidate = space.narrowed(space.full(), group)
            assert candidate is not None
            reuse.run(kept, group, candidate, inputs)
        assert _bytes_of_activations(len(inputs)) == before


def _bytes_of_activations(samples: int) -> int:
    """Of all tensors alive that have an axis of so many samples in front."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) is Tensor and each.shape[:1] == (samples,)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "torchvision:resnet18"])
def test_what_was_written_down_serves_at_other_widths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of depthwise convolutions, shapes of views: what follows the widths is that of the net kept."""
    net, x = make(name)
    space = trace(net, x).with_choices(bins=4, divisor=1)
    rng, passes = random.Random(1), list[Widths]()
    with torch.no_grad(), batch_statistics(net):
        reuse = Reuse(net, space, x)
        groups = [group for group in space.groups if reuse.plan(group) is not None][:8]
        run = reuse.pass_of
        monkeypatch.setattr(
            reuse, "pass_of", lambda model, widths, *rest: passes.append(widths) or run(model, widths, *rest)
        )
        for step in range(3):
            widths = Widths((g.name, rng.choice(g.choices[1:])) for g in space.groups.values())
            narrower = {group: space.narrowed(widths, group) for group in groups}
            candidates = {group: candidate for group, candidate in narrower.items() if candidate is not None}
            _, kept = reuse.keep(widths, x, candidates)
            for group, candidate in candidates.items():
                _assert_same(reuse.run(kept, group, candidate, x), _whole(net, space, candidate, x))
            assert step == 0 or passes == [widths], "only the net kept ran by its code"
            passes.clear()


class _ByWidth(nn.Module):
    """Multiplies by another number where a layer is narrow, by `look` at a tensor; both ways run the same operators."""

    def __init__(self, look: Callable[[Tensor], int]) -> None:
        super().__init__()
        self.look = look
        self.one, self.two, self.three = nets.conv(3, 8), nets.conv(8, 8), nets.conv(8, 8)
        self.head = nn.Linear(8, 5)
        self.small, self.large = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        is_narrow = self.look(x := self.one(x)) < 6
        x = self.three(self.two(x)) * (self.large if is_narrow else self.small)
        return self.head(x.mean((2, 3)))


LOOKS: dict[str, Callable[[Tensor], int]] = {
    "shape": lambda x: x.shape[1],
    "size": lambda x: x.size(1),
    "negative": lambda x: x.size()[-3],
    "unpacked": lambda x: (lambda n, c, h, w: c)(*x.shape),
    "numel": lambda x: x.numel() // (x.shape[0] * 64),
    "slice": lambda x: next(iter(x.shape[1:])),
    "compared": lambda x: 8 if x.shape == (len(x), 8, 8, 8) else 4,
}


@pytest.mark.parametrize("look", LOOKS)
def test_code_that_looks_at_sizes_is_run_at_every_width(look: str) -> None:
    torch.manual_seed(0)
    net, x = _ByWidth(LOOKS[look]).double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    space = trace(net, x).with_choices(bins=8, divisor=1)
    group = next(name for name in space.groups if name.startswith("two"))
    with torch.no_grad(), batch_statistics(net):
        reuse = Reuse(net, space, x)
        assert reuse.plan(group) is not None
        for width in (8, 7, 5, 4):
            widths = Widths({**space.full(), next(iter(space.groups)): width})
            candidate = space.narrowed(widths, group)
            assert candidate is not None
            _, kept = reuse.keep(widths, x, [group])
            _assert_same(reuse.run(kept, group, candidate, x), _whole(net, space, candidate, x))


def test_a_race_per_cost_keeps_who_gains_most_and_not_who_saves_least() -> None:
    """Two candidates better than the net of the step: as `greedy_slim` ranks them, by their gain."""
    supernet, _ = _supernet()
    space = supernet.space
    full = space.full()
    candidates = {g: c for g in space.groups if (c := space.narrowed(full, g)) is not None}
    more, less, *losers = candidates
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(800, generator=generator, dtype=torch.float64)
    gains = {more: 0.02, less: 0.01} | dict.fromkeys(losers, -0.05)
    drawn = {full: common}
    for group, gain in gains.items():
        drawn[candidates[group]] = common + gain + 0.01 * torch.randn(800, generator=generator, dtype=torch.float64)
    judge = _Drawn(supernet, drawn, 100, 0.95)
    judge.learn({f"gained.{group}": (drawn[candidates[group]] - common).float() for group in candidates})
    savings = dict.fromkeys(candidates, 100.0) | {less: 1.0}
    left = judge.compare(full, candidates, savings)
    assert more in left
    assert len(left) < len(candidates)


class _Largest(nn.Module):
    """Goes on with the largest of all channels, which is the same one for most images."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(1, 5)
        self.register_buffer("order", torch.arange(5.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x)).mean((2, 3))
        return self.last((x + 100 * self.order).amax(1, keepdim=True))


def _squeezing() -> nn.Module:
    """A few units behind ReLU on pooled numbers: some are off for any few images."""
    squeeze = torchvision.ops.SqueezeExcitation(8, 2)
    convs = [nn.Conv2d(inputs, 8, 3, padding=1) for inputs in (3, 8)]
    norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(8)]
    tail = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return nn.Sequential(convs[0], norms[0], nn.ReLU(), squeeze, convs[1], norms[1], nn.ReLU(), *tail)


@pytest.mark.parametrize(("kind", "bins"), [(_squeezing, 4), (_Largest, 16)])
def test_what_makes_no_difference_to_a_few_random_images_is_not_taken_for_free(
    kind: Callable[[], nn.Module], bins: int
) -> None:
    torch.manual_seed(0)
    net = kind().double()
    x, y = torch.randn(16, 3, 8, 8).double(), torch.randint(5, (16,))
    space = trace(net, x[:1]).with_choices(bins=bins, divisor=1, min_ratio=1 / bins)
    supernet, batches = Supernet(net, space), [(x[:8], y[:8]), (x[8:], y[8:])]
    judge, reuse = Judge(supernet, batches), ReuseJudge(supernet, batches)
    widths = space.full()
    while candidates := {group: c for group in space.groups if (c := space.narrowed(widths, group)) is not None}:
        for group, (score, _) in reuse.compare(widths, candidates).items():
            assert score == pytest.approx(judge(candidates[group]), abs=1e-9), group
        widths = next(iter(candidates.values()))


def test_plans_do_not_depend_on_the_default_device() -> None:
    supernet, batches = _supernet()
    space, images = supernet.space, batches[0][0]
    plain = Reuse(supernet.model, space, images)
    with torch.device("meta"):
        other = Reuse(supernet.model, space, images)
        plans = {group: other.plan(group) for group in space.groups}
    assert plans == {group: plain.plan(group) for group in space.groups}
    assert any(plan is not None for plan in plans.values())
