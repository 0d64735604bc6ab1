"""What users give the search, its judges and costs, and exports: it is taken, or named in one line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoslim
from autoslim import (
    JointCost,
    Judge,
    LatencyCost,
    LatencyTable,
    MacCost,
    MemoryCost,
    ParamCost,
    PeakMemoryCost,
    RacingJudge,
    ReuseJudge,
    Supernet,
    Widths,
    evaluate,
    exchange_bins,
    extract,
    greedy_slim,
    load_subnet,
    measure_latency,
    measure_latency_table,
    promising,
    recalibrate_batchnorm,
    resolve_budget,
    save_subnet,
    trace,
    uniform_like,
    widths_within,
)
from autoslim.batching import fit_batches
from autoslim.errors import AutoSlimError, BudgetError, ConfigError, DataError, ExportError, LatencyError, SpaceError
from autoslim.export import export_onnx, export_program, verify_onnx
from autoslim.report import render_report
from autoslim.scores import negative_loss
from autoslim.sorting import first_order, sort_channels

NAN = math.nan


def net(channels: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()),
        *(nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * channels), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, 4)),
    )


LABELS = torch.arange(48) % 4
IMAGES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + LABELS.view(-1, 1, 1, 1) * 0.5
X, Y = IMAGES[:16], LABELS[:16]
BATCHES = list(zip(IMAGES.split(8), LABELS.split(8), strict=True))
MODEL = net()
SPACE = trace(MODEL, X[:1]).with_choices(bins=4, divisor=2, min_ratio=0.25)
SUPERNET = Supernet(MODEL, SPACE)
COST = MacCost(SPACE)
FULL, HALF = SPACE.full(), SPACE.uniform(0.5)
JUDGE = Judge(SUPERNET, BATCHES)
CANDIDATES = {group: SPACE.narrowed(FULL, group) for group in SPACE.groups}


def search(judge: Any, **options: Any) -> list[Any]:
    return [*greedy_slim(SPACE, judge, options.pop("cost", COST), options.pop("budgets", "50%"), **options)]


# --- judges ------------------------------------------------------------------------------------------------------


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)


def double_past_autograd(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(-2)


@pytest.mark.parametrize("change", [randomize, double_past_autograd])
def test_a_judge_forgets_what_it_learned_from_other_weights(change: Callable[[nn.Module], None]) -> None:
    for seed in range(4):
        supernet = Supernet(net(), SPACE)
        judge = RacingJudge(supernet, BATCHES)
        search(judge, budgets="30%")
        assert judge.learned(), "something to forget"
        torch.manual_seed(seed)
        change(supernet.model)
        assert search(judge, budgets="30%") == search(RacingJudge(supernet, BATCHES), budgets="30%")


def test_a_judge_keeps_what_it_learned_from_the_same_weights() -> None:
    judge, other = (RacingJudge(SUPERNET, BATCHES) for _ in range(2))
    first = next(greedy_slim(SPACE, judge, COST, "50%"))
    learned = judge.learned()
    other.learn(learned)
    MODEL(X)  # a pass in evaluation mode, or reading, changes nothing
    one, two = (next(greedy_slim(SPACE, each, COST, "30%", start=first.widths)) for each in (judge, other))
    assert one == two
    assert judge._gained.keys() == {*SPACE.groups}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (
            Y[:, None],
            r"labels of shape \(16,\), whole numbers, or shares of shape \(16, 4\); got int64 of shape \(16, 1\)",
        ),
        (Y[:1], r"got int64 of shape \(1,\)"),
        (Y[:5], r"got int64 of shape \(5,\)"),
        (Y.float(), r"got float32 of shape \(16,\)"),
        (Y.float()[:, None], r"got float32 of shape \(16, 1\)"),
        (Y + 3, "there is a label 4, and the model tells 4 classes apart"),
        (Y - 1, "there is a label -1"),
        (Y.tolist(), "must be a tensor, .* got a list"),
        (Y.numpy(), "got a ndarray"),
        (None, "got a NoneType"),
    ],
)
def test_labels_that_do_not_fit_are_never_broadcast(targets: Any, expected: str) -> None:
    for score in ("loss", "accuracy", autoslim.judge.accuracy):
        with pytest.raises(DataError, match=expected):
            evaluate(MODEL, [(X, targets)], score)
    for kind in (Judge, RacingJudge):
        with pytest.raises(DataError, match=expected):
            search(kind(SUPERNET, [(X, targets)]))


def test_labels_of_any_integer_type_are_the_same() -> None:
    expected = search(RacingJudge(SUPERNET, [(X, Y)]))
    for kind in (torch.int32, torch.uint8, torch.int16):
        assert search(RacingJudge(SUPERNET, [(X, Y.to(kind))])) == expected
    loss = nn.functional.cross_entropy(MODEL.eval()(X).detach(), Y)
    assert -evaluate(MODEL, [(X, Y.int())], "loss") == pytest.approx(float(loss), rel=1e-6)
    assert evaluate(MODEL, [(X, Y)], "accuracy") == evaluate(MODEL, [(X, Y)])


def test_an_output_that_is_no_logits_of_classes_has_no_accuracy() -> None:
    one = nn.Sequential(*list(net().children())[:-1], nn.Linear(16, 1))
    with pytest.raises(DataError, match=r"the model gives shape \(16, 1\); give a score of your own"):
        evaluate(one, [(X, Y.float()[:, None])])


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([X, X], "pairs .* number 0 is a Tensor"),
        ((X, Y), "number 0 is a Tensor"),
        ([(X, Y), (X, Y, Y)], "number 1 is a tuple of 3"),
        ([(X.numpy(), Y)], "inputs of batch 0 are a NumPy array"),
        (None, "got a NoneType"),
        ([None], "number 0 is a NoneType"),
        ("images", "number 0 is a str"),
        ([(X[:0], Y[:0])], "images"),
        ([], "images"),
    ],
)
def test_batches_that_are_none_are_named(batches: Any, expected: str) -> None:
    for given_to in (Judge, RacingJudge):
        with pytest.raises(DataError, match=expected):
            given_to(SUPERNET, batches)
    with pytest.raises(DataError, match=expected):
        evaluate(MODEL, batches)


def test_an_empty_batch_counts_for_nothing() -> None:
    assert evaluate(MODEL, [(X, Y), (X[:0], Y[:0])]) == evaluate(MODEL, [(X, Y)])


def test_a_batch_without_statistics_is_named() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    space = trace(model, X[:1])
    for kind in (Judge, RacingJudge):
        judge = kind(Supernet(model, space), [(X, Y), (X[:1], Y[:1])])
        with pytest.raises(DataError, match="a batch of one sample has no statistics"):
            list(greedy_slim(space, judge, MacCost(space), "50%"))


@pytest.mark.parametrize("rule", ["score", "score-per-cost"])
def test_scores_that_are_no_numbers_end_the_search(rule: str) -> None:
    for value in (None, "a", "1", 1j, [1.0, 2.0]):
        with pytest.raises(ConfigError, match="a judge must give a number for widths; this one gave"):
            search(lambda widths, value=value: value, rule=rule)
    for value in (NAN, torch.tensor(NAN)):
        with pytest.raises(
            ConfigError, match="no candidate of this step has a score that is a number: of '0' at width 6"
        ):
            search(lambda widths, value=value: value, rule=rule)
    assert {type(step.score) for step in search(lambda widths: torch.tensor(1.0), rule=rule)} == {float}


def test_a_search_on_weights_that_are_no_numbers_is_refused() -> None:
    model = net()
    nn.init.constant_(model[0].weight, NAN)
    for kind in (Judge, ReuseJudge, RacingJudge):
        with pytest.raises(ConfigError, match="it is nan; look for such values in the weights and the images"):
            search(kind(Supernet(model, SPACE), BATCHES))


def test_a_candidate_that_overflows_is_the_worst() -> None:
    for worst in (NAN, -math.inf):
        steps = greedy_slim(SPACE, lambda widths, worst=worst: worst if widths["0"] < 8 else 0.0, COST, "50%")
        assert next(steps).group == "3"


# --- statistics --------------------------------------------------------------------------------------------------


class Picks(nn.Module):
    """Its second input is whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.known = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Embedding(5, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor, number: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(image) + self.known(number)[:, :, None, None]).mean((2, 3)))


class MayPick(Picks):
    def forward(self, image: Tensor, number: Tensor | None = None) -> Tensor:
        return super().forward(image, torch.zeros(len(image), dtype=torch.long) if number is None else number)


def test_a_second_input_of_whole_numbers_is_one_where_the_model_needs_it() -> None:
    picks = Picks()
    recalibrate_batchnorm(picks, [(X, Y)])
    expected = (picks.conv(X) + picks.known(Y)[:, :, None, None]).mean((0, 2, 3))
    torch.testing.assert_close(picks.norm.running_mean, expected.detach())
    may = MayPick()
    may.load_state_dict(picks.state_dict())
    recalibrate_batchnorm(may, [(X, Y)])  # labels, as from a loader
    none = may.norm.running_mean.clone()
    recalibrate_batchnorm(may, [X])
    assert torch.equal(may.norm.running_mean, none)
    recalibrate_batchnorm(may, [{"image": X, "number": Y}])
    torch.testing.assert_close(may.norm.running_mean, expected.detach())
    space = trace(picks, (X, Y))
    recalibrate_batchnorm(Supernet(picks, space), [(X[:8], Y[:8]), (X[8:], Y[8:])])
    torch.testing.assert_close(picks.norm.running_mean, expected.detach())


def test_statistics_stay_finite() -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DataError, match="what reaches BatchNorm layer '1' has no finite mean"):
        recalibrate_batchnorm(model, [torch.full((4, 3, 8, 8), NAN)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for batches in (X, None):
        with pytest.raises(DataError, match="needs a list or loader of batches"):
            recalibrate_batchnorm(model, batches)


# --- widths and numbers ------------------------------------------------------------------------------------------


def table() -> LatencyTable:
    from autoslim.tables import LatencyRow, latency_operators

    operators = latency_operators(SPACE)
    rows = [LatencyRow(op.signature, op.widths(at), 1.0) for op in operators for at in (FULL, SPACE.smallest())]
    return LatencyTable(tuple(rows))


@pytest.mark.parametrize(
    "kind", [MacCost, ParamCost, MemoryCost, PeakMemoryCost, lambda space: LatencyCost(space, table())]
)
def test_every_cost_looks_at_its_widths(kind: Callable[..., Any]) -> None:
    cost = kind(SPACE)
    for width in (99, 0, -3, None, 1.5):
        with pytest.raises(SpaceError, match=f"group '0' cannot have width {width}"):
            cost({**FULL, "0": width})
    for widths, expected in (({}, "'0' is missing"), (None, "got None"), ({**FULL, "x": 3}, "no channel group 'x'")):
        with pytest.raises(SpaceError, match=expected):
            cost(widths)
    assert cost({**FULL, "0": 7}) > 0, "any width, be it a choice or not"
    assert cost(dict(FULL)) == cost(FULL)


def test_plain_dicts_are_widths() -> None:
    judge = RacingJudge(SUPERNET, BATCHES, also="accuracy")
    assert judge(dict(HALF)) == judge(HALF)
    assert judge.also_of(dict(HALF)) == judge.also_of(HALF)
    assert SPACE.narrowed(dict(FULL), "0") == FULL.replaced("0", 6)
    assert SPACE.widened(dict(HALF), "0") == HALF.replaced("0", 6)
    moves = [list(exchange_bins(SPACE, JUDGE, COST, kind(HALF), COST(HALF))) for kind in (dict, Widths)]
    assert moves[0] == moves[1]


def test_budgets_as_text_are_limits_everywhere() -> None:
    steps, limit = search(JUDGE, budgets="40%"), 0.5 * COST(FULL)
    assert widths_within(SPACE, steps, COST, "50%") == widths_within(SPACE, steps, COST, limit) is not None
    assert widths_within(SPACE, steps, COST, "100%") == FULL
    assert uniform_like(SPACE, COST, "50%") == uniform_like(SPACE, COST, limit)
    assert [*exchange_bins(SPACE, JUDGE, COST, HALF, "50%")] == [*exchange_bins(SPACE, JUDGE, COST, HALF, limit)]
    for limit in (NAN, None, [5]):
        for ask in (
            lambda given: widths_within(SPACE, steps, COST, given),
            lambda given: uniform_like(SPACE, COST, given),
            lambda given: exchange_bins(SPACE, JUDGE, COST, HALF, given),
        ):
            with pytest.raises(BudgetError, match="is no number; give a number in the unit of the cost, or text"):
                ask(limit)


def test_a_cost_that_changes_its_mind_is_named() -> None:
    calls = itertools.count()

    def cost(widths: Mapping[str, int]) -> float:
        return 1.0 if next(calls) == 1 else 100.0  # the smallest net, when the budget is checked

    with pytest.raises(BudgetError, match="100 now and was at most 50 before: a cost must give the same number"):
        search(JUDGE, cost=cost, budgets=50.0)


WRONG: list[tuple[Callable[[], object], type[AutoSlimError], str]] = [
    # numbers
    (lambda: JointCost([(COST, NAN)]), BudgetError, r"needs \(cost, limit\) pairs with limits above 0"),
    (lambda: JointCost([(COST, "x")]), BudgetError, "limits above 0"),
    (lambda: JointCost(5), BudgetError, "limits above 0, got 5"),  # type: ignore[arg-type]
    (lambda: JointCost([5]), BudgetError, "limits above 0, got 5"),  # type: ignore[list-item]
    (lambda: JointCost([(None, 5)]), ConfigError, "cost None cannot be asked"),  # type: ignore[list-item]
    (lambda: JointCost([]), BudgetError, "at least one limit"),
    *(
        (lambda given=given: PeakMemoryCost(SPACE, given), ConfigError, "element_bytes must be a whole number")
        for given in (0, -1, "x", None, NAN)
    ),
    *(
        (lambda given=given: exchange_bins(SPACE, JUDGE, COST, HALF, 1e9, tried=given), ConfigError, "tried must be")
        for given in (-1, 0, "x", None, 1.5)
    ),
    *(
        (
            lambda given=given: promising(SUPERNET, FULL, CANDIDATES, BATCHES[0], "loss", given),
            ConfigError,
            "count must",
        )
        for given in (-1, 0, "x", None, 1.5)
    ),
    *(
        (lambda given=given: RacingJudge(SUPERNET, BATCHES, screen=given), ConfigError, "screen must be a whole number")
        for given in (True, 0, "x", 1.5)
    ),
    *(
        (lambda given=given: RacingJudge(SUPERNET, BATCHES, keep_bytes=given), ConfigError, "is no number of bytes")
        for given in (-1, None, "x", NAN)
    ),
    *(
        (
            lambda given=given: fit_batches(SPACE, 1e9, batch_size=given),
            ConfigError,
            "batch_size must be a whole number",
        )
        for given in (2.5, "x", None, True)
    ),
    *(
        (lambda given=given: fit_batches(SPACE, given), ConfigError, "is no limit in bytes; give one such as 2e9")
        for given in ("2GB", None)
    ),
    (lambda: SPACE.with_steps(lambda widths: NAN), SpaceError, "the cost of '0' at width 2 is no number"),
    (lambda: SPACE.with_steps(5), SpaceError, "needs a cost"),  # type: ignore[arg-type]
    (lambda: SPACE.with_choices(bins=[4]), SpaceError, "bins must be a number"),  # type: ignore[arg-type]
    # something else in the place of a space, a supernet, a judge, a score, a cost
    *(
        (lambda kind=kind: kind(MODEL), SpaceError, "expected a ChannelSpace")
        for kind in (MacCost, ParamCost, MemoryCost)
    ),
    (lambda: PeakMemoryCost(MODEL), SpaceError, "expected a ChannelSpace"),  # type: ignore[arg-type]
    (lambda: LatencyCost(MODEL, table()), SpaceError, "expected a ChannelSpace"),  # type: ignore[arg-type]
    (lambda: fit_batches(MODEL, 1e9), SpaceError, "expected a ChannelSpace"),  # type: ignore[arg-type]
    (lambda: greedy_slim(MODEL, JUDGE, COST, "50%"), SpaceError, "expected a ChannelSpace"),  # type: ignore[arg-type]
    (lambda: uniform_like(MODEL, COST, 5), SpaceError, "expected a ChannelSpace"),  # type: ignore[arg-type]
    (lambda: resolve_budget(SPACE, "50%", {}), SpaceError, "expected a ChannelSpace"),  # type: ignore[arg-type]
    (lambda: resolve_budget("50%", SPACE, COST), BudgetError, "costs go by their metric"),  # type: ignore[arg-type]
    *((lambda kind=kind: kind(MODEL, BATCHES), SpaceError, "expected a Supernet") for kind in (Judge, RacingJudge)),
    (lambda: promising(MODEL, FULL, CANDIDATES, BATCHES[0], "loss", 1), SpaceError, "expected a Supernet"),
    (lambda: Judge(SUPERNET, BATCHES, None), ConfigError, "score None cannot be asked"),  # type: ignore[arg-type]
    (lambda: evaluate(MODEL, BATCHES, "acuracy"), ConfigError, "did you mean 'accuracy'"),
    (lambda: search(JUDGE, cost=MacCost), ConfigError, "cost <class .* cannot be asked"),
    (lambda: search(RacingJudge), ConfigError, "judge <class .* cannot be asked"),
    (lambda: exchange_bins(SPACE, "racing", COST, HALF, 1e9), ConfigError, "judge 'racing' cannot be asked"),
    (lambda: search(JUDGE, rule=None), BudgetError, "no rule None"),
    (lambda: search(JUDGE, start="x"), SpaceError, "as Widths or a dict; got 'x'"),
    (lambda: search(JUDGE, start=search(JUDGE)[0]), SpaceError, "got a SlimStep; give its widths: step.widths"),
    (lambda: SPACE.narrowed(FULL, "zero"), SpaceError, "no channel group 'zero'"),
    (lambda: JUDGE({**HALF, "0": 99}), SpaceError, "group '0' cannot have width 99; choices: 2, 4, 6, 8"),
    # orders
    (lambda: sort_channels(MODEL, SPACE, {"nope": torch.ones(3)}), SpaceError, "'nope': there is no such group"),
    (lambda: sort_channels(MODEL, SPACE, {"0": [NAN] * 8}), SpaceError, "'0': there is a score that is not a number"),
    (lambda: sort_channels(MODEL, SPACE, {"0": object()}), SpaceError, "'0': expected 8 numbers"),
    (lambda: sort_channels(MODEL, SPACE, None), SpaceError, "got a NoneType"),  # type: ignore[arg-type]
    (lambda: sort_channels(MODEL, MODEL), SpaceError, "expected a ChannelSpace"),  # type: ignore[arg-type]
    (
        lambda: first_order(MODEL, SPACE, lambda m: m(X)),
        ConfigError,
        "left no gradients; let it end with loss.backward",
    ),
    # latency
    (lambda: LatencyCost(SPACE, None), LatencyError, "latency table None cannot be read"),  # type: ignore[arg-type]
    (lambda: LatencyTable.load("no.csv"), LatencyError, "latency table no.csv cannot be read"),
    (lambda: measure_latency(MODEL, X, repeats=0), LatencyError, "repeats must be a whole number of at least 1"),
    (lambda: measure_latency(MODEL, X[:1, :2]), LatencyError, "does not run on the example input: RuntimeError: Given"),
    (lambda: measure_latency("resnet", X), LatencyError, "an nn.Module; got a str"),  # type: ignore[arg-type]
    (lambda: measure_latency_table(MODEL, SPACE, X, nets=0), LatencyError, "nets must be a whole number"),
    # files
    (lambda: render_report("runs/mine"), ExportError, "takes what sums a run up"),  # type: ignore[arg-type]
    (lambda: export_onnx(Picks(), X, "no.onnx"), ExportError, "does not take the example input: .*'number'"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_cannot_be_is_named(number: int) -> None:
    call, kind, expected = WRONG[number]
    with pytest.raises(kind, match=expected) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_scores_by_group_may_be_lists() -> None:
    one, other = net(), net()
    scores = [float(number) for number in range(8)]
    assert (
        sort_channels(one, SPACE, {"0": scores}) == sort_channels(other, SPACE, {"0": torch.tensor(scores)}) == ("0",)
    )
    assert torch.equal(one[0].weight, other[0].weight)


def test_a_score_may_be_named_wherever_there_is_one() -> None:
    named = promising(SUPERNET, FULL, CANDIDATES, BATCHES[0], "loss", 1)
    assert named == promising(SUPERNET, FULL, CANDIDATES, BATCHES[0], negative_loss, 1)


# --- files -------------------------------------------------------------------------------------------------------


def test_paths_may_be_text(tmp_path: Path) -> None:
    measured = measure_latency_table(MODEL, SPACE, X[:1], nets=2, repeats=1, cache=str(tmp_path))
    path = str(tmp_path / "table.csv")
    measured.save(path)
    assert LatencyTable.load(path) == LatencyTable.load(Path(path))
    assert LatencyCost(SPACE, path)(FULL) == LatencyCost(SPACE, LatencyTable.load(path))(FULL)


def test_a_file_that_could_never_be_read_is_not_written(tmp_path: Path) -> None:
    subnet = extract(MODEL, SPACE, HALF)
    for model, widths in ((MODEL, HALF), (subnet, SPACE.smallest()), (nn.Sequential(subnet, nn.Linear(4, 4)), HALF)):
        with pytest.raises(ExportError, match="save_subnet: '"):
            save_subnet(tmp_path / "not", model, SPACE, widths)
    with pytest.raises(SpaceError, match="expected a ChannelSpace"):
        save_subnet(tmp_path / "not", subnet, MODEL, HALF)  # type: ignore[arg-type]
    assert not (tmp_path / "not").exists()
    save_subnet(tmp_path, subnet, SPACE, dict(HALF))
    assert torch.equal(load_subnet(tmp_path, net)(X), subnet.eval()(X))
    name = f"{Path(__file__).parent / 'small_net.py'}:net"
    for model, kind, expected in (
        (lambda: None, ExportError, "needs the original network or a function that builds it, got None"),
        (5, ExportError, "got 5"),
        ("my:net", ConfigError, "no module 'my'"),
        (name, SpaceError, "the space belongs to another model"),
    ):
        with pytest.raises(kind, match=expected):
            load_subnet(tmp_path, model)  # type: ignore[arg-type]


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.numbers, self.head = nn.Conv2d(3, 8, 3), nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        return self.head(self.image(image).mean((2, 3)) + self.numbers(numbers))


class Any2(Both):
    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(*inputs)


class ByName(Both):
    def forward(self, image: Tensor, *, numbers: Tensor) -> Tensor:
        return super().forward(image, numbers)


class InOne(Both):
    def forward(self, both: list[Tensor]) -> Tensor:
        return super().forward(*both)


@pytest.mark.parametrize(
    ("kind", "given", "names"),
    [
        (Both, lambda image, numbers: (image, numbers), ["image", "numbers"]),
        (Any2, lambda image, numbers: (image, numbers), ["inputs_0", "inputs_1"]),
        (ByName, lambda image, numbers: {"numbers": numbers, "image": image}, ["image", "numbers"]),
        (InOne, lambda image, numbers: [image, numbers], ["both_0", "both_1"]),
    ],
)
def test_nets_of_several_inputs_are_exported(
    kind: type[Both], given: Callable[[Tensor, Tensor], Any], names: list[str], tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, one, three = kind(), given(X[:1], torch.randn(1, 5)), given(X[:3], torch.randn(3, 5))
    export_onnx(model, one, tmp_path / "net.onnx")
    assert [each.name for each in onnxruntime.InferenceSession(tmp_path / "net.onnx").get_inputs()] == names
    assert verify_onnx(tmp_path / "net.onnx", model, three) < 1e-5
    export_program(model, three, tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    args, kwargs = autoslim.tracing.split_input(three)
    torch.testing.assert_close(program(*args, **kwargs), model(*args, **kwargs))
