"""Latency as it is measured: whole passes of one net, and tables of a network's operators, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoslim.calibrate import evaluating
from autoslim.errors import LatencyError
from autoslim.files import append_record, read_records
from autoslim.lending import cloned
from autoslim.memory import is_out_of_memory
from autoslim.progress import Progress
from autoslim.runtimes import ON_CPU, OnnxNets, Prepared, Runtime, find_runtime, on_cpu, torch_threads
from autoslim.slicing import extract
from autoslim.space import ChannelGroup, ChannelSpace, Widths, a_space, check_whole
from autoslim.tables import LatencyOperator, LatencyRow, LatencyTable, latency_operators
from autoslim.tracing import split_input


def measure_latency(
    model: nn.Module,
    example_input: Any,
    *,
    runtime: str = "torch",
    threads: int | None = None,
    repeats: int = 30,
    warmup: int = 5,
) -> float:
    """Median milliseconds of one forward pass in evaluation mode, on the device the model is on.

    `runtime`: torch, torch.compile, onnxruntime or openvino; `threads` of the CPU, as torch has by default. The mode of
    the model is restored. Raises `LatencyError` for a runtime that is not there.
    """
    return statistics.median(latencies(model, example_input, runtime, threads, repeats, warmup))


def latencies(
    model: nn.Module, example_input: Any, runtime: str, threads: int | None, repeats: int = 30, warmup: int = 5
) -> list[float]:
    """Milliseconds of each of some forward passes; see `measure_latency`."""
    find_runtime(runtime)
    check_whole(LatencyError, repeats=repeats)
    check_whole(LatencyError, 0, warmup=warmup)
    _check_runs(model, example_input)
    with evaluating(model), torch_threads(threads) as count:
        return Prepared(runtime, model, example_input, count).passes(repeats, warmup, seconds=60.0)


def _check_runs(model: nn.Module, example_input: Any) -> None:
    """`LatencyError` for what is no network, or does not run on the example input."""
    if not isinstance(model, nn.Module):
        raise LatencyError(f"latency is measured of a network, an nn.Module; got a {type(model).__name__}")
    args, kwargs = split_input(cloned(example_input))
    try:
        with evaluating(model), torch.inference_mode():
            model(*args, **kwargs)
    except Exception as error:  # whatever a user's network may raise
        if is_out_of_memory(error):
            raise
        text = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        raise LatencyError(f"the network does not run on the example input: {text}") from error


def spread(samples: Sequence[float]) -> float:
    """Interquartile range."""
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return high - low


def measure_latency_table(
    model: nn.Module,
    space: ChannelSpace,
    example_input: Any,
    *,
    runtime: str = "torch",
    threads: int | None = None,
    nets: int = 40,
    repeats: int = 5,
    cache: str | Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure every operator of a network over the widths it can have, on this machine; for `LatencyCost`.

    `nets` subnets are drawn from the space, the widest and the narrowest among them; in each, operators are timed where
    they run (medians of `repeats`), and their times add up to that of the whole net. Each net is measured twice, a
    round over all of them apart, and the less disturbed of the two counts. Runtimes that do not tell the time of
    operators share the whole out as eager torch does. The table is kept under `cache` (by default `$AUTOSLIM_CACHE`,
    else `~/.cache/autoslim`) by machine, device, versions, threads and network, and is returned at once the next time
    unless `fresh`; a measurement that was killed goes on. Raises `LatencyError` for a runtime that is not there.
    """
    kind, progress = find_runtime(runtime), progress or Progress()
    check_whole(LatencyError, nets=nets, repeats=repeats)
    operators = latency_operators(a_space(space))
    with torch_threads(threads) as count:
        about = _about(kind, count, model, example_input)
    path = Path(cache or cache_directory()) / "latency" / f"{_key(about, space, operators, nets, repeats)}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # another process may be measuring the same
        log = path.with_suffix(".jsonl")
        if fresh:
            path.unlink(missing_ok=True)
            log.unlink(missing_ok=True)
        if path.exists():
            table = LatencyTable.load(path)
            say_if_disturbed(table, progress)
            return table
        _check_runs(model, example_input)
        drawn = list(_nets(space, nets))
        measure = _measure(model, space, example_input, runtime, count, operators, repeats)
        records = _rounds(drawn, measure, log, progress)
        scatter = statistics.median(record["spread"] / record["ms"] for record in records)
        less_disturbed = [min(both, key=lambda record: float(record["ms"])) for both in _by_net(records)]
        about |= {_SCATTER: f"{scatter:.1%}"}
        table = LatencyTable(tuple(_rows(operators, drawn, less_disturbed)), about)
        table.save(path)
        log.unlink(missing_ok=True)
    say_if_disturbed(table, progress)
    return table


def _rounds(
    drawn: Sequence[Widths], measure: Callable[[Widths], dict[str, Any]], log: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Two rounds of measurements over all nets, as far as the log does not have them."""
    records = read_records(log)[: 2 * len(drawn)]
    with progress.bar("latency", 2 * len(drawn)) as advance:
        for index, widths in enumerate([*drawn, *drawn]):
            if index >= len(records):
                records.append(measure(widths))
                append_record(log, records[-1])
                advance(index + 1, f"measurement {index + 1} of {2 * len(drawn)}, {records[-1]['ms']:.2f} ms")
    return records


def _by_net(records: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    half = len(records) // 2
    return zip(records[:half], records[half:], strict=True)


def say_if_disturbed(table: LatencyTable, progress: Progress | None) -> None:
    """Warn of a table whose repeats scatter, when it is measured and whenever it is read."""
    try:
        scatter = float(table.about.get(_SCATTER, "0").rstrip("%")) / 100
    except ValueError:  # a table from elsewhere may use the word for anything
        return
    if scatter > _BUSY and progress is not None:
        progress.say(
            f"latency: repeats of this table scatter by {scatter:.0%}; measure anew while the machine does nothing "
            "else: autoslim latency MODEL_OR_CONFIG --fresh"
        )


_SCATTER = "scatter"  # what a table calls the interquartile range of whole passes, as a share of the median
_BUSY = 0.15


def cache_directory() -> Path:
    """Where measurements are kept: `$AUTOSLIM_CACHE`, else `autoslim` under `$XDG_CACHE_HOME` or `~/.cache`."""
    given = os.environ.get("AUTOSLIM_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoslim"


def _measure(
    model: nn.Module,
    space: ChannelSpace,
    example_input: Any,
    runtime: str,
    threads: int,
    operators: Sequence[LatencyOperator],
    repeats: int,
) -> Callable[[Widths], dict[str, Any]]:
    """How one net is measured: the median of whole passes, and the medians of its operators scaled to add up to it."""
    onnx: OnnxNets | None = None

    def measure(widths: Widths) -> dict[str, Any]:
        nonlocal onnx
        net = extract(model, space, widths).eval()
        if runtime in ON_CPU:
            net = on_cpu(net)
            onnx = onnx or OnnxNets(on_cpu(model), space, on_cpu(_only_tensor(example_input)))
        prepared = Prepared(runtime, net, example_input, threads, onnx.at(widths, net) if onnx else None)
        whole, parts = prepared.passes(3 * repeats, warmup=3), prepared.operators(operators, repeats)
        if not parts and runtime != "torch":
            given = on_cpu(example_input) if runtime in ON_CPU else example_input
            parts = Prepared("torch", net, given, threads).operators(operators, repeats)
        if not parts:  # layers are not called by themselves: shared out by multiply-accumulates
            parts = [[float(_macs(operator, widths)) for operator in operators]]
        return _record(widths, parts, whole)

    return measure


def _record(widths: Widths, parts: Sequence[Sequence[float]], whole: Sequence[float]) -> dict[str, Any]:
    total = statistics.median(whole)
    medians = [statistics.median(samples) for samples in zip(*parts, strict=True)]
    scale = total / max(sum(medians), 1e-12)
    spreads = [scale * spread(samples) for samples in zip(*parts, strict=True)]
    times = [scale * median for median in medians]
    return {"widths": dict(widths), "ms": total, "spread": spread(whole), "times": times, "spreads": spreads}


def _macs(operator: LatencyOperator, widths: Widths) -> int:
    product = operator.scale
    for size in operator.widths(widths):
        product *= size
    return product


def _only_tensor(example_input: Any) -> Tensor:
    args, kwargs = split_input(example_input)
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        raise LatencyError("ONNX runtimes are measured for networks of one tensor")
    return args[0]


def _nets(space: ChannelSpace, count: int) -> Iterator[Widths]:
    """The widest, the narrowest, and others in turn drawn at random throughout and around a ratio."""
    rng = random.Random(0)
    yield space.full()
    yield space.smallest()
    for index in range(2, max(count, 4)):
        if index % 2:
            yield space.sample(rng)
        else:
            yield sample_around(space, rng, rng.uniform(0.1, 1.0))


def sample_around(space: ChannelSpace, rng: random.Random, ratio: float) -> Widths:
    """Widths that differ from layer to layer, around a ratio of the full ones."""
    return Widths((name, _near(group, ratio * rng.uniform(0.6, 1.4))) for name, group in space.groups.items())


def _near(group: ChannelGroup, ratio: float) -> int:
    return min(group.choices, key=lambda choice: abs(choice - ratio * group.size))


def _rows(
    operators: Sequence[LatencyOperator], drawn: Sequence[Widths], records: Sequence[dict[str, Any]]
) -> Iterator[LatencyRow]:
    """One row for each operator and widths; several measurements of the same give their median."""
    found: dict[tuple[str, tuple[int, ...]], list[tuple[float, float]]] = {}
    for widths, record in zip(drawn, records, strict=True):
        for operator, ms, iqr in zip(operators, record["times"], record["spreads"], strict=True):
            found.setdefault((operator.signature, operator.widths(widths)), []).append((ms, iqr))
    for (signature, sizes), samples in sorted(found.items()):
        ms, iqr = (statistics.median(column) for column in zip(*samples, strict=True))
        yield LatencyRow(signature, sizes, ms, iqr)


def _about(runtime: Runtime, threads: int, model: nn.Module, example_input: Any) -> dict[str, str]:
    first = next(model.parameters())
    shapes = [str(tuple(leaf.shape)) for leaf in tree_leaves(split_input(example_input)) if isinstance(leaf, Tensor)]
    layout = any(p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters())
    strided = any(p.ndim == 4 and not p.is_contiguous() for p in model.parameters())
    return {
        "runtime": runtime.name,
        "versions": runtime.version(),
        "threads": str(threads),
        "machine": f"{platform.node()}, {processor()}",
        "device": torch.cuda.get_device_name(first.device) if first.is_cuda and runtime.name not in ON_CPU else "cpu",
        "input": f"{' '.join(shapes)} {first.dtype}{' channels_last' if layout and strided else ''}",
    }


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _key(
    about: dict[str, str], space: ChannelSpace, operators: Sequence[LatencyOperator], nets: int, repeats: int
) -> str:
    facts = [about, [operator.signature for operator in operators], nets, repeats]
    facts.append([[group.name, *group.choices] for group in space.groups.values()])
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return f"{about['runtime']}-{about['threads']}-{digest}"
