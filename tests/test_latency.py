"""Latency: tables and their CSV, costs made of them, measurements that are kept and go on, runtimes."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import nets
from autoslim import (
    ChannelSpace,
    LatencyCost,
    LatencyTable,
    extract,
    greedy_slim,
    latency,
    measure_latency,
    measure_latency_table,
    resolve_budget,
    runtimes,
    trace,
)
from autoslim.errors import BudgetError, LatencyError
from autoslim.latency import spread
from autoslim.progress import Progress
from autoslim.runtimes import OnnxNets, Prepared
from autoslim.tables import LatencyRow, hot_operators, latency_operators

SAMPLE = ["plain", "residual", "depthwise", "concatenated", "grouped", "flattened", "squeeze_excite", "attention"]


def invented(space: ChannelSpace, count: int = 6) -> LatencyTable:
    """A table in which an operator takes as long as the product of its widths, and a bit."""
    rng, rows = random.Random(0), {}
    for widths in (space.full(), space.smallest(), *(space.sample(rng) for _ in range(count))):
        for operator in latency_operators(space):
            sizes = operator.widths(widths)
            rows[operator.signature, sizes] = 0.01 + torch.tensor(sizes).prod().item() * 1e-3
    return LatencyTable(tuple(LatencyRow(*key, ms) for key, ms in rows.items()), {"runtime": "invented"})


@pytest.mark.parametrize("name", SAMPLE)
def test_operators_are_in_the_space_and_come_back_from_json(name: str) -> None:
    space = trace(*nets.build(name))
    operators = latency_operators(space)
    assert operators == latency_operators(ChannelSpace.from_json(space.to_json()))
    assert all(operator.signature for operator in operators)
    macs = sum(op.scale * torch.tensor([axis.size for axis in op.factors]).prod().item() for op in space.operations)
    assert macs > 0
    cost = LatencyCost(space, invented(space))
    rng = random.Random(1)
    for _ in range(5):
        assert cost(space.sample(rng)) > 0


def test_a_signature_says_all_but_the_widths() -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU6()),
        *(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)),
    )
    operators = latency_operators(trace(net, torch.zeros(1, 3, 8, 8)))
    assert [operator.signature for operator in operators] == [
        "conv 3x3/2 to 4x4 x432>16 native_batch_norm relu",
        "conv 3x3 depthwise to 4x4 x144>16 hardtanh",
        "conv 1x1 to 4x4 x16>16 relu",
        "conv 1x1 to 4x4 x16>16 relu mean",
        "linear x1>1",
    ]
    assert [len(operator.axes) for operator in operators] == [1, 1, 2, 2, 2]


def test_a_table_is_exact_where_it_was_measured_and_interpolates_between() -> None:
    def row(*widths: int) -> LatencyRow:
        a, b = widths
        return LatencyRow("conv", widths, 0.1 + 0.01 * a + 0.02 * b + 0.003 * a * b)

    table = LatencyTable(tuple(row(a, b) for a in (8, 16, 32) for b in (8, 24, 64)))
    for a, b in ((8, 8), (16, 64), (12, 40), (31, 9)):  # a bilinear time is found again everywhere
        assert table.predict("conv", (a, b)) == pytest.approx(row(a, b).ms, rel=1e-6)
    bumpy = LatencyTable((*table.rows[1:], LatencyRow("conv", (8, 8), 2.0)))
    assert bumpy.predict("conv", (8, 8)) == pytest.approx(2.0, rel=1e-6)
    assert LatencyTable((LatencyRow("fixed", (), 0.7),)).predict("fixed", ()) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("operator", "widths", "expected"),
    [
        ("conv", (40, 8), "lacks 'conv' at widths 40 8: it was measured at 8-32 x 8-64"),
        ("conv", (8, 4), "nothing is guessed outside; add rows"),
        ("conv", (8,), "lacks 'conv'"),
        ("con", (8, 8), "no operator 'con'; did you mean 'conv'"),
    ],
)
def test_a_table_refuses_what_lies_outside(operator: str, widths: tuple[int, ...], expected: str) -> None:
    table = LatencyTable(tuple(LatencyRow("conv", (a, b), 1.0) for a in (8, 32) for b in (8, 64)))
    with pytest.raises(LatencyError, match=expected):
        table.predict(operator, widths)


def test_a_table_that_lacks_a_width_of_the_space_is_refused_at_once() -> None:
    space = trace(*nets.build("residual"))
    table = invented(space)
    first = latency_operators(space)[0].signature
    with pytest.raises(LatencyError, match="no operator"):
        LatencyCost(space, LatencyTable(tuple(row for row in table.rows if row.operator != first)))
    narrow = [
        row
        for row in table.rows
        if row.operator != first or row.widths == max(r.widths for r in table.rows if r.operator == first)
    ]
    with pytest.raises(LatencyError, match="lacks"):
        LatencyCost(space, LatencyTable(tuple(narrow)))


def test_csv_round_trip_and_what_a_phone_may_send(tmp_path: Path) -> None:
    space = trace(*nets.build("depthwise"))
    table = invented(space)
    path = tmp_path / "table.csv"
    table.save(path)
    again = LatencyTable.load(path)
    assert again.about == {"runtime": "invented"}
    cost, same = LatencyCost(space, table), LatencyCost(space, again)
    for seed in range(5):
        widths = space.sample(random.Random(seed))
        assert same(widths) == pytest.approx(cost(widths), rel=1e-4)
    assert again.to_csv() == table.to_csv()
    bare = LatencyTable.from_csv("widths,ms,operator\n16 8,0.25,conv 1x1\n,1.5,fixed\n")
    assert bare.rows == (LatencyRow("conv 1x1", (16, 8), 0.25), LatencyRow("fixed", (), 1.5))
    spreadsheet = "\ufeff# device: a phone\r\nOperator, Widths, Ms\r\nconv 1x1, 16 8, 0.25\r\nfixed,,1.5\r\n,,\r\n"
    assert LatencyTable.from_csv(spreadsheet) == LatencyTable(bare.rows, {"device": "a phone"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must name the columns operator,widths,ms"),
        ("operator,widths\n", "must name the columns"),
        ("operator,widths,ms\n", "has no rows"),
        ("operator,widths,ms\nconv,8 8,0\nconv,4 8,0.0\n", "all times are 0"),
        ("operator,widths,ms\nconv,8 8,fast\n", "line 2: expected operator,widths,ms"),
        ("# a\n\noperator,widths,ms\nconv,8 8,1\nconv,8x8,1\n", "line 5: expected"),
        ("operator,widths,ms\nconv,8 8\n", "line 2: expected"),
        ("operator,widths,ms\nconv,8 0,1\n", "line 2: an operator needs"),
        ("operator,widths,ms\nconv,8 8,nan\n", "line 2: an operator needs"),
        ("operator,widths,ms\nconv,8 8,-1\n", "line 2: an operator needs"),
        ("operator;widths;ms\nconv;8 8;1\n", "columns are separated by commas"),
        ("operator,widths,ms\nconv,8 8,0,21\n", "line 2: 4 cells for 3 columns"),
    ],
)
def test_a_csv_that_cannot_be_read_names_the_line(text: str, expected: str) -> None:
    with pytest.raises(LatencyError, match=expected):
        LatencyTable.from_csv(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(LatencyError, match=r"nowhere\.csv cannot be read"):
        LatencyTable.load(tmp_path / "nowhere.csv")
    (tmp_path / "t.csv").write_text("operator,widths,ms\nconv,8 8,1\nconv,8,1\n")
    with pytest.raises(LatencyError, match="different numbers of widths"):
        LatencyTable.load(tmp_path / "t.csv").predict("conv", (8, 8))


def test_latency_is_a_cost_like_any_other() -> None:
    space = trace(*nets.build("residual"))
    cost = LatencyCost(space, invented(space))
    assert cost.unit == "ms"
    most = cost(space.full())
    _, limit = resolve_budget(f"latency_ms<={0.6 * most:.4f}", space, {"latency_ms": cost})
    steps = list(greedy_slim(space, lambda widths: float(sum(widths.values())), cost, [limit]))
    assert cost(steps[-1].widths) <= limit < cost(steps[-2].widths)
    with pytest.raises(
        BudgetError, match=r"cannot be reached: the smallest net of this space has .*ms|cannot be reached"
    ):
        resolve_budget("latency_ms<=0.0001", space, {"latency_ms": cost})
    hot = hot_operators(cost, space.full())
    assert sum(fact["share"] for fact in hot) == pytest.approx(1.0)  # type: ignore[misc]
    assert [fact["ms"] for fact in hot] == sorted((fact["ms"] for fact in hot), reverse=True)  # type: ignore[type-var]


# --- measuring ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLE)
def test_the_operators_of_eager_torch_add_up_to_the_net(name: str, tmp_path: Path) -> None:
    net, inputs = nets.build(name)
    space = trace(net, inputs)
    table = measure_latency_table(net, space, inputs, nets=4, repeats=3, cache=tmp_path)
    assert table.about["runtime"] == "torch"
    assert table.about["threads"] == str(torch.get_num_threads())
    cost = LatencyCost(space, table)
    assert cost(space.full()) > 0
    assert {row.operator for row in table.rows} == {operator.signature for operator in latency_operators(space)}


def test_layers_are_timed_where_they_run() -> None:
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 5), nn.ReLU(), nn.Conv2d(64, 4, 1))
    image = torch.zeros(1, 3, 40, 40)
    operators = latency_operators(trace(net, image))
    samples = Prepared("torch", net, image, 1).operators(operators, 5)
    assert len(samples) == 5
    middle = sorted(times[1] / sum(times) for times in samples)
    assert middle[2] > 0.6  # 94% of the multiply-accumulates


def test_a_table_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = nets.build("residual")
    space = trace(net, inputs)
    first = measure_latency_table(net, space, inputs, nets=4, repeats=3, cache=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(latency, "extract", None)  # nothing is built again
        again = measure_latency_table(net, space, inputs, nets=4, repeats=3, cache=tmp_path)
    assert again.to_csv() == first.to_csv()
    assert not list(tmp_path.rglob("*.jsonl"))
    measure_latency_table(net, space, inputs, nets=4, repeats=3, cache=tmp_path, threads=2)
    measure_latency_table(net, space.with_choices(2, 2, 0.5), inputs, nets=4, repeats=3, cache=tmp_path)
    assert len(list(tmp_path.rglob("*.csv"))) == 3  # threads and choices are told apart
    monkeypatch.setenv("AUTOSLIM_CACHE", str(tmp_path / "elsewhere"))
    assert latency.cache_directory() == tmp_path / "elsewhere"


def test_a_measurement_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = nets.build("residual")
    space = trace(net, inputs)
    real, built = latency.extract, 0

    def killed(*arguments: object) -> nn.Module:
        nonlocal built
        built += 1
        if built == 4:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(latency, "extract", killed)
        with pytest.raises(KeyboardInterrupt):
            measure_latency_table(net, space, inputs, nets=6, repeats=3, cache=tmp_path)
    (log,) = tmp_path.rglob("*.jsonl")
    kept = log.read_bytes()
    assert kept.count(b"\n") == 3
    log.write_bytes(kept + b'{"widths": {"stem')  # what a kill within a write leaves
    built = -100
    with monkeypatch.context() as patched:
        patched.setattr(latency, "extract", killed)
        measure_latency_table(net, space, inputs, nets=6, repeats=3, cache=tmp_path)
    assert built == -91  # the nine that were missing: each net is measured in two rounds
    assert list(tmp_path.rglob("*.csv"))


def test_latency_is_measured_in_any_runtime_and_modes_are_kept() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).train()
    net[1].eval()
    threads = torch.get_num_threads()
    assert measure_latency(net, torch.zeros(1, 3, 16, 16), repeats=5, threads=2) > 0
    assert (net.training, net[1].training, torch.get_num_threads()) == (True, False, threads)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert spread([1.0]) == 0.0


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [("tensorflow", "no runtime 'tensorflow'"), ("onnxruntim", "did you mean 'onnxruntime'")],
)
def test_a_runtime_that_does_not_exist_is_named(runtime: str, expected: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.raises(LatencyError, match=expected):
        measure_latency(net, torch.zeros(1, 3, 8, 8), runtime=runtime)


def test_a_runtime_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    for runtime, extra in (("openvino", "openvino"), ("onnxruntime", "onnx")):
        with pytest.raises(LatencyError, match=rf"pip install 'autoslim\[{extra}\]'"):
            measure_latency(nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8), runtime=runtime)


def test_a_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(net: nn.Module) -> object:
        def call(*_: object) -> None:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nSet TORCHDYNAMO_VERBOSE=1")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(
        LatencyError, match=r"\(InvalidCxxCompiler: No working C\+\+ compiler found\); it needs a C\+\+"
    ):
        measure_latency(nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8), runtime="torch.compile")


@pytest.mark.slow
def test_a_table_measured_with_torch_compile_is_a_cost(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    net, inputs = nets.build("plain")
    net, image = net.float(), torch.randn(1, *inputs.shape[1:])
    space = trace(net, image)
    table = measure_latency_table(net, space, image, runtime="torch.compile", nets=4, repeats=3, cache=tmp_path)
    assert table.about["runtime"] == "torch.compile"
    assert {row.operator for row in table.rows} == {operator.signature for operator in latency_operators(space)}
    cost = LatencyCost(space, table)  # no budget: on a busy machine so small a net may be the slower one
    assert cost(space.smallest()) > 0
    assert cost(space.full()) > 0


@pytest.mark.slow
def test_onnxruntime_tells_the_time_of_operators_and_subnets_are_cut_in_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from autoslim import zoo

    torch.manual_seed(0)
    net = zoo.mobilenet_v2(0.25, num_classes=10)
    nets.randomise(net)
    image = torch.randn(1, 3, 32, 32)
    space = trace(net, image).with_choices(4, 4, 0.25)
    subnets = OnnxNets(net, space, image)
    started = time.process_time()  # of one thread; what else the machine does is not its time
    for seed in range(3):
        widths = space.sample(random.Random(seed))
        subnet = extract(net, space, widths).eval()
        prepared = Prepared("onnxruntime", subnet, image, 1, subnets.at(widths, subnet))
        samples = prepared.operators(latency_operators(space), 3)
        assert [len(times) for times in samples] == [len(latency_operators(space))] * 3
        assert min(map(min, samples)) >= 0
    assert subnets.can_cut
    assert time.process_time() - started < 10
    table = measure_latency_table(net, space, image, runtime="onnxruntime", nets=4, repeats=3, cache=tmp_path)
    assert "onnxruntime" in table.about["versions"]
    assert LatencyCost(space, table)(space.full()) > 0


class _Said(Progress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)


def test_a_table_that_was_disturbed_says_so_whenever_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, inputs = nets.build("residual")
    space = trace(net, inputs)
    monkeypatch.setattr(latency, "spread", lambda samples: 0.4 * sorted(samples)[len(samples) // 2])
    first, again = _Said(), _Said()
    table = measure_latency_table(net, space, inputs, nets=4, repeats=3, cache=tmp_path, progress=first)
    assert table.about["scatter"].endswith("%")
    measure_latency_table(net, space, inputs, nets=4, repeats=3, cache=tmp_path, progress=again)
    for said in (first, again):
        assert said.texts == [next(text for text in said.texts if "scatter by 40%" in text)]
        assert "autoslim latency MODEL_OR_CONFIG --fresh" in said.texts[0]
    monkeypatch.setattr(latency, "spread", lambda samples: 0.0)
    calm = _Said()
    measure_latency_table(net, space, inputs, nets=4, repeats=3, cache=tmp_path, fresh=True, progress=calm)
    measure_latency_table(net, space, inputs, nets=4, repeats=3, cache=tmp_path, progress=calm)
    latency.say_if_disturbed(LatencyTable(table.rows, {"scatter": "a word of theirs"}), calm)
    assert calm.texts == []


class Writes(nn.Module):
    """Normalises its input in place, and says what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.seen = nn.Conv2d(3, 4, 3), list[float]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(float(x.sum()))
        y: torch.Tensor = self.conv(x.mul_(2))
        return y


@pytest.mark.parametrize("inference", [False, True])
def test_a_net_that_writes_into_its_input_is_given_the_same_each_time(inference: bool) -> None:
    net = Writes()
    with torch.inference_mode(inference):
        x = torch.rand(2, 3, 8, 8)
        before = x.clone()
        assert measure_latency(net, x, repeats=5) > 0
        prepared = Prepared("torch", net, x, 1)
        prepared.passes(4, warmup=1)
        prepared.operators([], 3)
    assert torch.equal(x, before)
    assert len(net.seen) > 12
    assert len(set(net.seen)) == 1


def test_a_net_that_does_not_write_runs_on_one_tensor() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.seen = nn.Conv2d(3, 4, 3), list[int]()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(x.data_ptr())
            y: torch.Tensor = self.conv(x)
            return y

    net = Reads()
    Prepared("torch", net, torch.rand(1, 3, 8, 8), 1).passes(6, warmup=2)
    assert len(net.seen) == 8
    assert len(set(net.seen[1:])) == 1, "no copies but the one that shows that it does not write"
