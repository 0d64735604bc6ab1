"""What people see: bars with the time left on a terminal, a line now and then in a log, tables at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from autoslim.cost import LATENCY, named_metrics, readable
from autoslim.errors import counted
from autoslim.progress import Advance, Progress
from autoslim.published import PublishedNet
from autoslim.run import Run

_LOG_SECONDS = 10.0  # without a terminal: at most one line per bar in this time


class TerminalProgress(Progress):
    """Bars on a terminal, occasional lines elsewhere; everything goes to the console given (standard error)."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Advance]:
        """See `Progress.bar`."""
        started = time.monotonic()
        with self._live(title, total) if self.console.is_terminal else self._lines(title, total) as advance:
            yield advance
        seconds = time.monotonic() - started
        if seconds >= 1:
            self.say(f"{title}: done in {seconds:.0f} s")

    def say(self, text: str) -> None:
        """See `Progress.say`."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def _live(self, title: str, total: float) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}", markup=False),
        )
        with RichProgress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(title, total=total, remark="")
            yield lambda done, remark: bars.update(task, completed=done, remark=remark)

    @contextmanager
    def _lines(self, title: str, total: float) -> Iterator[Advance]:
        started = last = time.monotonic()
        first: float | None = None

        def advance(done: float, remark: str) -> None:
            nonlocal last, first
            now = time.monotonic()
            first = done if first is None else first  # a resumed stage does not begin at 0
            if now - last < _LOG_SECONDS or done <= first:
                return
            last = now
            left = (now - started) / (done - first) * (total - done)
            self.say(f"{title}: {done / total:.0%}, about {left:.0f} s left, {remark}")

        yield advance


def print_results(results: Mapping[str, Any], console: Console) -> None:
    """Print the results of a run so that no figure is cut: in narrow columns, or in lines that the terminal breaks."""
    for is_narrow in (False, True):
        table = results_table(results, is_narrow=is_narrow)
        least = Console(width=1000).measure(table).minimum
        if least <= console.width:
            break
    (console if least <= console.width else Console(width=least, file=console.file)).print(table)


def results_table(results: Mapping[str, Any], *, is_narrow: bool = False) -> Table:
    """The results of a run, one line per budget, the full net first; `memory` and the like if a budget is on them."""
    full, subnets = results["full"], results["subnets"]
    more = [metric for metric in named_metrics(net["budget"] for net in subnets) if metric in _MORE]
    is_predicted = any("latency_predicted_ms" in net for net in (full, *subnets))
    table = Table(title=f"{results['model']}: accuracy on test images", padding=(0, 0 if is_narrow else 1))
    table.add_column("net", overflow="fold", min_width=_NAME_WIDTH)  # the only one that gives way
    uniform = "uniform,\nequal MACs".replace(" ", "\n" if is_narrow else " ")
    latency = "latency\n(predicted)" if is_predicted else "latency"
    costs = ("MACs", "params", *(_MORE[metric] for metric in more), latency)
    for name in (*costs, "supernet\nwidest", "found", "retrained", uniform):
        table.add_column(name, justify="right", no_wrap=True)
    break_ = "\n" if more or is_narrow else " "
    table.add_row("full", *_sizes(full, full, more, break_), _percent(full.get("accuracy")), "", "", "")
    for net in subnets:
        accuracies = [_percent(net["accuracy"][kind]) for kind in ("supernet", "found", "retrained", "uniform")]
        table.add_row(net["budget"].replace(", ", ",\n"), *_sizes(net, full, more, break_), *accuracies)
    return table


_MORE = {"memory": "memory", "peak_memory": "peak\nmemory"}  # metrics with a column if a budget is on them
_NAME_WIDTH = 10


def taken_lines(nets: Sequence[Mapping[str, Any]], run: Run) -> Iterator[str]:
    """The nets taken from the path of a search, one line each."""
    for net in nets:
        where = f"{counted(net['steps'], 'step')} along the search" if "steps" in net else "found before"
        held_out = net["accuracy"].get("held_out")
        accuracy = "" if held_out is None else f", {held_out:.1%} on held-out images"
        figures = [f"{readable(net['macs'])} MACs", f"{readable(net['params'])} params"]
        named = named_metrics([net["budget"]])
        figures += [f"{readable(net[name])} {said}" for name, said in _TAKEN.items() if name in named and name in net]
        if LATENCY in named and "latency_predicted_ms" in net:
            figures.append(f"{net['latency_predicted_ms']:.2f} ms predicted")
        yield f"{net['budget']}: {', '.join(figures)}{accuracy}; {where}; {run.subnet(net['budget'])}"


_TAKEN = {"memory": "elements of memory", "peak_memory": "bytes of peak memory"}


def published_table(nets: Sequence[PublishedNet]) -> Table:
    """The published nets: what they cost as computed, and in brackets as the authors say; accuracies are theirs."""
    table = Table(title="published nets (ImageNet, 224 pixels): computed (claimed), top-1 claimed")
    table.add_column("name", no_wrap=True)
    for name in ("MACs", "params", "memory", "top-1"):
        table.add_column(name, justify="right", no_wrap=True)
    for net in nets:
        figures = (
            f"{net.million_macs:.1f}M ({readable(1e6 * net.claimed_million_macs)})",
            f"{net.million_params:.2f}M ({net.claimed_params})",
            f"{net.million_memory:.2f}M ({net.claimed_memory})",
            f"{net.claimed_top1:.1%}",
        )
        table.add_row(net.name, *figures)
    return table


def inspect_report(facts: Mapping[str, Any], console: Console) -> None:
    """What `autoslim inspect` found, for people."""
    table = Table(title="channel groups")
    table.add_column("group", overflow="fold")
    table.add_column("channels", justify="right")
    table.add_column("choices", overflow="fold")
    for group in facts["groups"]:
        table.add_row(group["name"], str(group["size"]), ", ".join(map(str, group["choices"])))
    console.print(table)
    if facts["frozen"]:
        console.print(_frozen_table(facts["frozen"]))
    for remark in facts["remarks"]:
        console.print(f"note: {remark}", markup=False, soft_wrap=True)
    if facts["mixing"]:
        more = f", and {len(facts['mixing']) - 1} more" if len(facts["mixing"]) > 1 else ""
        text = f"cutting channels is not the same as setting them to zero: {facts['mixing'][0]}{more}"
        console.print(f"note: {text}", markup=False, soft_wrap=True)
    for name in facts["smallest"]:
        most, least = facts[name], facts["smallest"][name]
        console.print(f"{name}: {readable(most)} in full, {readable(least)} ({least / most:.1%}) at the smallest")
    console.print(f"{facts['slimmable_macs']:.1%} of the MACs are in layers whose output channels can be cut")
    for budget in facts["budgets"]:
        verdict = "can be reached" if budget["reachable"] else budget["reason"]
        for limit in budget.get("slack", ()):
            verdict += f"; {limit} is already met by the full net"
        console.print(f"budget {budget['budget']}: {verdict}", markup=False, soft_wrap=True)


def latency_report(facts: Mapping[str, Any], console: Console, top: int) -> None:
    """The hot operators of a net, and the whole of it as predicted and as measured."""
    shown, rest = facts["operators"][:top], facts["operators"][top:]
    threads = f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    table = Table(title=f"{facts['model']}, {facts['net']}: {facts['runtime']}, {threads}")
    for name in ("layer", "operator"):
        table.add_column(name, overflow="fold")
    for name in ("widths", "ms", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for fact in shown:
        widths = " ".join(map(str, fact["widths"]))
        table.add_row(fact["layer"], fact["operator"], widths, f"{fact['ms']:.3f}", f"{fact['share']:.1%}")
    if rest:
        ms, share = sum(fact["ms"] for fact in rest), sum(fact["share"] for fact in rest)
        table.add_row(f"{len(rest)} others", "", "", f"{ms:.3f}", f"{share:.1%}")
    console.print(table)
    console.print(
        f"predicted {facts['predicted_ms']:.2f} ms, measured {facts['measured_ms']:.2f} ms end to end "
        f"(interquartile range {facts['spread_ms']:.2f} ms)",
        highlight=False,
    )
    table = facts["table"]
    about = ", ".join(f"{key} {table[key]}" for key in _TABLE_NOTES if key in table) or "given"
    if (table.get("runtime"), table.get("threads")) != (facts["runtime"], str(facts["threads"])):
        about += f"; measured end to end: runtime {facts['runtime']}, threads {facts['threads']}"
    console.print(f"table: {about}", highlight=False, markup=False, soft_wrap=True)


_TABLE_NOTES = ("runtime", "threads", "versions", "machine")  # of what is known of a latency table


def _frozen_table(notes: Sequence[Mapping[str, str]]) -> Table:
    """Layers frozen for the same reason on one line, with the line of code and what would help."""
    table = Table(title="frozen")
    for name in ("layer", "why"):
        table.add_column(name, overflow="fold")
    alike: dict[tuple[str, str, str], list[str]] = {}
    for note in notes:
        alike.setdefault((note["reason"], note["line"], note["remedy"]), []).append(note["name"])
    for (reason, line, remedy), names in alike.items():
        lines = [reason, f"at {line}" if line else "", f"to slim it: {remedy}" if remedy else ""]
        table.add_row("\n".join(names), "\n".join(filter(None, lines)))
    return table


def _sizes(net: Mapping[str, Any], full: Mapping[str, Any], more: Sequence[str], break_: str) -> list[str]:
    """What a net costs, each with its share of the full net after `break_`; latency with the prediction below it."""
    shown = []
    for metric in ("macs", "params", *more):
        value, whole = net.get(metric), full.get(metric)
        share = f"{break_}({value / whole:.0%})" if value is not None and whole else ""
        shown.append("-" if value is None else f"{readable(value)}{share}")
    latency, predicted = net.get("latency_ms"), net.get("latency_predicted_ms")
    beside = "" if predicted is None else f"\n({predicted:.2f})"
    return [*shown, f"-{beside}" if latency is None else f"{latency:.2f} ms{beside}"]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
