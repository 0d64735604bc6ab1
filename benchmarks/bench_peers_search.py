"""The search beside others: ModelOpt's FastNAS and plain Torch-Pruning loops, one net, one budget, the same images.

    python3 -m venv peers && peers/bin/pip install -r benchmarks/requirements-peers.txt
    peers/bin/python benchmarks/bench_peers_search.py            # some 15 minutes on one thread; resumes
    peers/bin/python benchmarks/bench_peers_search.py --draw     # only the page again

ResNet-20 0.5x on CIFAR-10, trained once as a plain net and once as a supernet, briefly. Each tool brings it to half
of its MACs, with no layer below a quarter of its channels and multiples of 2, and may look at the same held-out images,
which nobody was trained on, and at the same training images for BatchNorm statistics. Timed is what comes after
training: converting, tracing, scoring, pruning. Then the accuracy on the whole test set before any fine-tuning, as the
tool leaves the net and with BatchNorm statistics of the same training images. Every row is computed once and kept in
benchmarks/results/peers_search.json; peers_search.md is written from that.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")  # before torch: a supernet has thousands of shapes

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autoslim import (
    ChannelSpace,
    MacCost,
    RacingJudge,
    Recipe,
    Supernet,
    SupernetRecipe,
    evaluate,
    extract,
    greedy_slim,
    recalibrate_batchnorm,
    retrain,
    sort_channels,
    trace,
    train_supernet,
    zoo,
)
from autoslim.data import Batches, ImageData, ImageSet, load_data
from autoslim.export import load_tensors, save_tensors
from autoslim.files import read_json, write_json, write_whole
from autoslim.latency import processor
from autoslim.run import provenance
from autoslim.train import load_unshared, unshared

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "peers_search.json"
DATA = Path("~/.cache/autoslim-data/cifar10.npz").expanduser()
BUDGET = 0.5
DIVISOR, LEAST, BINS = 2, 0.25, 12
SEEN = 1000  # training images for BatchNorm statistics


@dataclass
class Task:
    """What every tool is given."""

    data: ImageData
    options: argparse.Namespace

    def batches(self, images: ImageSet, size: int, **options: Any) -> Batches:
        """Images, normalised."""
        return Batches(images, size, mean=self.data.mean, std=self.data.std, **options)

    @cached_property
    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        """The images that a search may look at."""
        return list(self.batches(self.data.holdout.subset(range(self.options.images)), 250))

    @cached_property
    def seen(self) -> list[tuple[Tensor, Tensor]]:
        """Training images for BatchNorm statistics."""
        return list(self.batches(self.data.train.subset(range(SEEN)), 250))

    @property
    def example(self) -> Tensor:
        """The input that MACs are counted for."""
        return torch.zeros(1, 3, 32, 32)

    def fresh(self) -> nn.Module:
        """The net with its initial weights."""
        torch.manual_seed(0)
        return zoo.resnet20(0.5, num_classes=10)

    def space_of(self, model: nn.Module) -> ChannelSpace:
        """The widths that AutoSlim may choose."""
        return trace(model, self.example).with_choices(BINS, DIVISOR, LEAST)

    def trained(self, kind: str) -> tuple[nn.Module, dict[str, Any]]:
        """The plain net or the supernet, trained now or before, and the record of that."""
        path = self.options.runs / f"{kind}.safetensors"
        net = self.fresh()
        if not path.exists():
            shared: dict[str, Any] = {"batch_size": 64, "lr": 0.1, "warmup_epochs": 0.5}
            options: dict[str, Any] = {"augment": "flip,crop", "shuffle": True, "drop_last": True}
            images = self.data.train.subset(range(self.options.training_images))
            batches = self.batches(images, 64, **options)
            if kind == "plain":
                logs = retrain(net, batches, Recipe(epochs=self.options.epochs, **shared))
            else:
                supernet = Supernet(net, self.space_of(net))
                logs = train_supernet(
                    supernet, batches, SupernetRecipe(epochs=self.options.supernet_epochs, distill=False, **shared)
                )
            epochs, started = [], time.process_time()
            for log in logs:
                epochs.append(round(log.seconds, 1))
                say(f"{kind}: epoch {log.epoch}, {log.losses}, {log.seconds:.0f} s")
            seconds = time.process_time() - started
            recalibrate_batchnorm(net, [images for images, _ in self.seen])
            record = {"epochs": len(epochs), "images": len(images), "seconds": round(sum(epochs), 1)}
            record |= {"cpu_seconds": round(seconds, 1), "accuracy": self.accuracy(net)}
            self.options.runs.mkdir(parents=True, exist_ok=True)
            save_tensors(path, unshared(net), {kind: record})
        tensors, about = load_tensors(path)
        load_unshared(net, tensors)
        return net.eval(), about[kind]

    def accuracy(self, net: nn.Module) -> float:
        """On the whole test set."""
        return evaluate(net, self.batches(self.data.test, 500))

    def macs(self, net: nn.Module) -> int:
        """Multiply-accumulates by torch's own counter."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net.eval()(self.example)
        return int(counter.get_total_flops()) // 2


# --- the tools: each gives the net, before anything is fine-tuned -------------------------------------------------


def by_fastnas(task: Task, net: nn.Module, note: dict[str, Any]) -> nn.Module:
    """Scores each width of each layer by itself, then a binary search for the threshold that meets the budget."""
    import modelopt.torch.prune as prune
    from modelopt.torch.prune.fastnas import FastNASConfig

    settings = FastNASConfig().model_dump()

    def choices(node: Any) -> None:
        for key, value in node.items():
            if key in ("channels_ratio", "features_ratio"):
                node[key] = tuple(i / BINS for i in range(round(LEAST * BINS), BINS + 1))
            elif key in ("channel_divisor", "feature_divisor"):
                node[key] = DIVISOR
            elif isinstance(value, dict):
                choices(value)

    choices(settings)
    scored = 0

    def score(model: nn.Module) -> float:
        nonlocal scored
        scored += 1
        return 100 * evaluate(model, task.held_out)

    config = {"data_loader": task.seen, "collect_func": lambda batch: batch[0], "score_func": score, "verbose": False}
    found, _ = prune.prune(net, [("fastnas", settings)], {"flops": f"{BUDGET:.0%}"}, task.example, config)
    note["nets_scored"] = scored
    assert isinstance(found, nn.Module)
    return found


def by_torch_pruning(task: Task, net: nn.Module, note: dict[str, Any], *, taylor: bool) -> nn.Module:
    """The loop of its README: the least important channels of the whole net go, a little at a time, until it fits."""
    import torch_pruning

    kinds = torch_pruning.importance
    most = BUDGET * task.macs(net)
    pruner = torch_pruning.pruner.BasePruner(
        net,
        task.example,
        importance=kinds.TaylorImportance() if taylor else kinds.MagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1 - LEAST,
        max_pruning_ratio=1 - LEAST,
        iterative_steps=100,
        round_to=DIVISOR,
        ignored_layers=[module for module in net.modules() if isinstance(module, nn.Linear)],
    )
    for step in range(1, 101):
        if taylor:
            net.zero_grad()
            for images, targets in task.held_out:
                nn.functional.cross_entropy(net(images), targets).backward()
        pruner.step()
        note["steps"] = step
        if task.macs(net) <= most:
            break
    net.zero_grad()
    return net


def by_autoslim(task: Task, net: nn.Module, note: dict[str, Any], *, sort: bool) -> nn.Module:
    """Greedy steps judged by racing; a plain net is first sorted, the most important channels of each layer to the front."""
    if sort:
        sort_channels(net, trace(net, task.example), "gamma")
    space = task.space_of(net)
    judge = RacingJudge(Supernet(net, space), task.held_out)
    *_, last = steps = list(greedy_slim(space, judge, MacCost(space), [f"{BUDGET:.0%}"]))
    note["steps"] = len(steps)
    return extract(net, space, last.widths)


def by_uniform_widths(task: Task, net: nn.Module, note: dict[str, Any]) -> nn.Module:
    """No search: the uniform width ratio with half of the MACs, of channels in the order of their importance."""
    every = trace(net, task.example)
    sort_channels(net, every, "gamma")
    cost = MacCost(every)
    most = BUDGET * cost(every.full())
    note["ratio"] = next(i / 200 for i in range(200, 0, -1) if cost(every.uniform(i / 200)) <= most)
    return extract(net, every, every.uniform(note["ratio"]))


@dataclass(frozen=True)
class Tool:
    """A row of the table."""

    name: str
    search: Callable[..., nn.Module]
    starts_from: str  # "plain" or "supernet"
    package: str = "autoslim"
    needs: str = "a trained net"
    looks_at: str = ""
    options: tuple[tuple[str, Any], ...] = ()


TOOLS = (
    Tool("uniform widths, sorted", by_uniform_widths, "plain", looks_at="weights"),
    Tool(
        "Torch-Pruning, magnitude",
        by_torch_pruning,
        "plain",
        "torch-pruning",
        looks_at="weights",
        options=(("taylor", False),),
    ),
    Tool(
        "Torch-Pruning, Taylor",
        by_torch_pruning,
        "plain",
        "torch-pruning",
        looks_at="gradients on the held-out images",
        options=(("taylor", True),),
    ),
    Tool(
        "ModelOpt FastNAS",
        by_fastnas,
        "plain",
        "nvidia-modelopt",
        "a trained net that torch.fx can trace",
        "accuracy on the held-out images, training images for BatchNorm",
    ),
    Tool(
        "AutoSlim, racing, no supernet",
        by_autoslim,
        "plain",
        looks_at="weights (order of channels), loss on the held-out images",
        options=(("sort", True),),
    ),
    Tool(
        "AutoSlim, racing",
        by_autoslim,
        "supernet",
        needs="a supernet, trained at all widths at once",
        looks_at="loss on the held-out images",
        options=(("sort", False),),
    ),
)


def measured(task: Task, tool: Tool) -> dict[str, Any]:
    """One row: the search timed, the net counted and tested."""
    net, training = task.trained(tool.starts_from)
    net = copy.deepcopy(net)
    full = task.macs(net)
    _, _ = task.held_out, task.seen  # decoded before the clock starts, for all alike
    note: dict[str, Any] = {}
    started, worked = time.perf_counter(), time.process_time()
    found = tool.search(task, net, note, **dict(tool.options)).eval()
    seconds, work = time.perf_counter() - started, time.process_time() - worked
    as_left = task.accuracy(found)
    recalibrate_batchnorm(found, [images for images, _ in task.seen])
    version = "" if tool.package == "autoslim" else f" {metadata.version(tool.package)}"
    return {
        "tool": f"{tool.name}{version and ','}{version}",
        "starts_from": tool.starts_from,
        "needs": tool.needs,
        "looks_at": tool.looks_at,
        "training": training,
        "search_seconds": round(seconds, 1),
        "search_cpu_seconds": round(work, 1),
        "macs": task.macs(found),
        "macs_share": round(task.macs(found) / full, 4),
        "parameters": sum(p.numel() for p in found.parameters()),
        "accuracy_as_left": as_left,
        "accuracy": task.accuracy(found),
        **note,
        "threads": torch.get_num_threads(),
        "provenance": provenance() | {"processor": processor()},
    }


# --- files -------------------------------------------------------------------------------------------------------


def page(records: dict[str, dict[str, Any]]) -> str:
    """The table, and what it was measured on."""
    rows = [records[tool.name] for tool in TOOLS if tool.name in records]
    about = rows[-1]["provenance"]
    lines = [
        "# The search beside other tools",
        "",
        *(__doc__ or "").strip().splitlines(),
        "",
        f"{about['date'][:10]}, commit {about['commit']}, {about['processor']}, {about['machine']}, {rows[-1]['threads']} "
        "thread. Times are seconds of processor time, for other work ran on the machine; wall times are in the record.",
        "",
        "| tool | needs beforehand | its training | looks at | search | MACs left | accuracy as left | accuracy, BatchNorm measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        training = row["training"]
        lines.append(
            f"| {row['tool']} | {row['needs']} | {training['cpu_seconds']:.0f} s, {training['epochs']} epochs, then "
            f"{training['accuracy']:.1%} | {row['looks_at']} | {row['search_cpu_seconds']:.1f} s | {row['macs_share']:.1%} | "
            f"{row['accuracy_as_left']:.1%} | {row['accuracy']:.1%} |"
        )
    lines += [
        "",
        "The accuracy beside the training is that of the full net on the test images. AutoSlim's supernet is trained "
        "instead of the plain net, not after it; its path serves all other budgets too, where the others search again. "
        "`no supernet` is the same search on the plain net with its channels sorted by the scales of BatchNorm.",
    ]
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    """Progress, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=[tool.name for tool in TOOLS], metavar="TOOL", help="some rows")
    parser.add_argument("--images", type=int, default=1000, help="held out, for the search")
    parser.add_argument("--epochs", type=int, default=4, help="of the plain net")
    parser.add_argument("--supernet-epochs", type=int, default=2)
    parser.add_argument("--training-images", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench_peers_search", help="where nets are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--train", action="store_true", help="only train")
    parser.add_argument("--draw", action="store_true", help="only write the page again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records: dict[str, dict[str, Any]] = read_json(options.out) if options.out.exists() else {}
    if not options.draw:
        task = Task(load_data(str(options.data), holdout=5000), options)
        for kind in ("plain", "supernet"):
            say(f"{kind}: {task.trained(kind)[1]}")
        for tool in () if options.train else TOOLS:
            if tool.name in records or tool.name not in (options.tools or [tool.name]):
                continue
            records[tool.name] = measured(task, tool)
            write_json(options.out, records)
            say(f"{tool.name}: {records[tool.name]}")
    if records:
        write_whole(options.out.with_suffix(".md"), page(records))
        print(page(records))


if __name__ == "__main__":
    main()
