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

from autoslim.cost import readable
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


def results_table(results: Mapping[str, Any]) -> Table:
    """The results of a run, one line per budget, the full net first."""
    table = Table(title=f"{results['model']}: accuracy on test images")
    for name in ("net", "MACs", "params", "latency"):
        table.add_column(name, justify="left" if name == "net" else "right", no_wrap=True)
    for name in ("supernet\nwidest", "found", "retrained", "uniform,\nequal MACs"):
        table.add_column(name, justify="right")
    full = results["full"]
    table.add_row("full", *_sizes(full, full), _percent(full.get("accuracy")), "", "", "")
    for subnet in results["subnets"]:
        accuracies = [_percent(subnet["accuracy"][kind]) for kind in ("supernet", "found", "retrained", "uniform")]
        table.add_row(subnet["budget"], *_sizes(subnet, full), *accuracies)
    return table


def taken_lines(nets: Sequence[Mapping[str, Any]], run: Run) -> Iterator[str]:
    """The nets taken from the path of a search, one line each."""
    for net in nets:
        where = f"{net['steps']} steps along the search" if "steps" in net else "found before"
        held_out = net["accuracy"].get("held_out")
        accuracy = "" if held_out is None else f", {held_out:.1%} on held-out images"
        figures = f"{readable(net['macs'])} MACs, {readable(net['params'])} params"
        yield f"{net['budget']}: {figures}{accuracy}; {where}; {run.subnet(net['budget'])}"


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
    about = ", ".join(f"{key} {value}" for key, value in facts["table"].items() if key in ("versions", "machine"))
    console.print(f"table: {about or 'given'}", highlight=False, markup=False, soft_wrap=True)


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


def _sizes(net: Mapping[str, Any], full: Mapping[str, Any]) -> tuple[str, str, str]:
    latency, predicted = net.get("latency_ms"), net.get("latency_predicted_ms")
    beside = "" if predicted is None else f" ({predicted:.2f} predicted)"
    return (
        f"{readable(net['macs'])} ({net['macs'] / full['macs']:.0%})",
        f"{readable(net['params'])} ({net['params'] / full['params']:.0%})",
        f"-{beside}" if latency is None else f"{latency:.2f} ms{beside}",
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
