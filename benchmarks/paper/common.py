"""What the figures share: data, networks, and nets that are trained once and remembered.

Every script here is `python benchmarks/paper/X_name.py`: it trains what is missing below `runs/paper/` (one record and
one file of tensors per net, so that a killed run goes on where it was), writes its raw numbers to
`benchmarks/results/paper/X.json`, a picture to `docs/figures/X.svg`, and its table between the markers in
`docs/paper.md`. `--draw` only redraws from the raw numbers; `--tiny` is a rehearsal on a few made-up images.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

# a supernet meets a kernel per combination of widths; the default cache of oneDNN is too small (benchmarks/LOG.md)
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")

import torch
from torch import Tensor, nn

from autoslim import (
    ChannelSpace,
    Judge,
    MacCost,
    ParamCost,
    RacingJudge,
    Supernet,
    SwitchableNet,
    Widths,
    batch_statistics,
    evaluate,
    extract,
    recalibrate_batchnorm,
    trace,
)
from autoslim.data import Batches, ImageData, ImageSet, load_data
from autoslim.export import load_tensors, save_tensors
from autoslim.files import read_json, write_json, write_whole
from autoslim.recipe import SupernetRecipe
from autoslim.run import provenance
from autoslim.train import Step, Training, load_unshared, plain_step, sandwich_step, switch_step, unshared
from autoslim.zoo.layers import Classifier, conv_bn, relu

ROOT = Path(__file__).parent.parent.parent
DATA = Path("~/.cache/autoslim-data").expanduser()
SWITCHES = (0.25, 0.5, 0.75, 1.0)
CALIBRATION = 1000  # images, as US-Net recommends


@dataclass(frozen=True)
class Setting:
    """A data set, the network trained on it, and its recipe: everything that the nets of a figure have in common."""

    data: str  # name of an .npz file in the data folder
    channels: tuple[int, ...]  # of 3x3 convolutions, each with BatchNorm and ReLU
    strides: tuple[int, ...]
    augment: str
    epochs: int
    supernet_epochs: int
    bins: int
    divisor: int
    min_ratio: float
    search_images: int = 2000
    holdout: float | int = 0.1  # of the training images, or how many
    autocast: str = "bf16"
    training_images: int | None = None  # the first so many of a shuffle; all, if None

    def build(self, incoming: int, num_classes: int) -> nn.Module:
        """The network at full width."""
        layers = []
        for outgoing, stride in zip(self.channels, self.strides, strict=True):
            layers.append(conv_bn(incoming, outgoing, 3, stride, activation=relu))
            incoming = outgoing
        return Classifier(nn.Sequential(*layers), incoming, num_classes)


# figures a to g: eight US-Nets and six other nets are trained
SMALL = Setting(
    "fashion-mnist", (16, 16, 32, 32, 64, 64), (2, 1, 2, 1, 2, 1), "crop", 4, 4, 16, 1, 0.05, training_images=24_000
)
# figures h to j: every layer has the same width, so that there is something to find out; not every processor has bf16
EQUAL = Setting(
    "cifar10", (32,) * 6, (2, 1, 2, 1, 2, 1), "flip,crop", 5, 4, 12, 2, 0.25, 10_000, holdout=10_000, autocast="none"
)


class Lab:
    """A setting with its data in memory, and what was trained in it."""

    def __init__(self, setting: Setting, options: argparse.Namespace) -> None:
        if options.tiny:
            small = {"channels": tuple(min(8, c) for c in setting.channels), "epochs": 1, "supernet_epochs": 1}
            setting = replace(setting, **small, divisor=1, search_images=20)
        self.setting, self.options = setting, options
        self.batch_size = 16 if options.tiny else 128
        self.place = Path(options.runs) / setting.data
        torch.set_num_threads(options.threads)

    @cached_property
    def data(self) -> ImageData:
        """The whole data set; a part of the training images is held out, the same for every seed."""
        path = Path(self.options.data) / f"{self.setting.data}.npz"
        if self.options.tiny:
            path = _made_up(Path(self.options.root) / path.name, 3 if "cifar" in self.setting.data else 1)
        if not path.exists():
            sys.exit(f"{path} is missing: `python benchmarks/paper/fetch.py` brings it, or give --data FOLDER")
        data = load_data(path, holdout=0.1 if self.options.tiny else self.setting.holdout)
        if self.setting.training_images is None or self.options.tiny:
            return data
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
        return replace(data, train=data.train.subset(order[: self.setting.training_images]))

    def fresh(self, seed: int) -> nn.Module:
        """The network at full width with the weights a seed gives."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.setting.build(self.data.image_shape[0], self.data.num_classes)

    @cached_property
    def every(self) -> ChannelSpace:
        """All widths the network allows."""
        return trace(self.fresh(0), torch.zeros(1, *self.data.image_shape))

    @cached_property
    def space(self) -> ChannelSpace:
        """The widths that are trained together and searched."""
        return self.every.with_choices(self.setting.bins, self.setting.divisor, self.setting.min_ratio)

    @cached_property
    def macs(self) -> MacCost:
        """MACs of widths."""
        return MacCost(self.every)

    @cached_property
    def params(self) -> ParamCost:
        """Parameters of widths."""
        return ParamCost(self.every)

    def recipe(self, epochs: int | None = None, **changes: Any) -> SupernetRecipe:
        """How everything in this setting is trained; only epochs differ, and what a figure is about."""
        shared = {"batch_size": self.batch_size, "lr": 0.1, "warmup_epochs": 0.5, "channels_last": True}
        epochs = 1 if self.options.tiny else epochs or self.setting.epochs
        return SupernetRecipe(epochs=epochs, autocast=self.setting.autocast, **shared, **changes)

    def batches(self, images: ImageSet, size: int = 1000, **options: Any) -> Batches:
        """Images, normalised."""
        return Batches(images, size, mean=self.data.mean, std=self.data.std, channels_last=True, **options)

    @cached_property
    def test(self) -> list[tuple[Tensor, Tensor]]:
        """All test images."""
        return list(self.batches(self.data.test))

    @cached_property
    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        """Images of the search: cut from the training images, never trained on, no test images."""
        order = torch.randperm(len(self.data.holdout), generator=torch.Generator().manual_seed(0))
        chosen = self.data.holdout.subset(order[: self.setting.search_images])
        return list(self.batches(chosen, min(1000, self.setting.search_images)))

    def seen(self, count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Training images without augmentation."""
        order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(seed))
        return list(self.batches(self.data.train.subset(order[:count]), 500))

    def trained(
        self,
        name: str,
        net: nn.Module,
        make_step: Callable[[nn.Module, SupernetRecipe], Step],
        recipe: SupernetRecipe,
        seed: int,
        after_epoch: Callable[[], Mapping[str, Any]] = dict,
    ) -> dict[str, Any]:
        """Train `net` in place, or load what was trained under this name; returns the record of it."""
        path, tensors = (self.place / f"{name}{suffix}" for suffix in (".json", ".safetensors"))
        setting = {key: _plain(value) for key, value in asdict(self.setting).items() if key != "search_images"}
        wanted = {"setting": setting, "recipe": asdict(recipe), "seed": seed}
        if path.exists():
            record = read_json(path)
            recipes = [
                asdict(SupernetRecipe()) | each for each in (record["recipe"], wanted["recipe"])
            ]  # options since
            if _differ(record["setting"], setting) or recipes[0] != recipes[1] or record["seed"] != seed:
                sys.exit(f"{path} was trained otherwise; remove it, or choose another --runs folder")
            load_unshared(net, load_tensors(tensors)[0])
            return dict(record)
        net.to(memory_format=torch.channels_last)
        options = {"augment": self.setting.augment, "shuffle": True, "drop_last": True, "seed": seed}
        batches = self.batches(self.data.train, recipe.batch_size, **options)
        training, step, epochs = Training(net, recipe, len(batches), seed=seed), make_step(net, recipe), []
        while not training.is_done:
            log = training.run_epoch(batches, step)
            epochs.append(asdict(log) | dict(after_epoch()))
            say(f"{self.setting.data} {name}: epoch {log.epoch}/{recipe.epochs}, {log.losses}, {log.seconds:.0f} s")
        seconds = round(sum(epoch["seconds"] for epoch in epochs), 1)
        record = {"name": name, **wanted, "epochs": epochs, "seconds": seconds, **self.origin()}
        save_tensors(tensors, unshared(net), {"name": name})
        write_json(path, record)
        return record

    def is_trained(self, name: str) -> bool:
        """Is there a record of this name?"""
        return (self.place / f"{name}.json").exists()

    def plain(self, name: str, widths: Widths, seed: int, epochs: int | None = None) -> tuple[nn.Module, float]:
        """A net of these widths trained by itself from scratch, and its accuracy on the test images."""
        net = extract(self.fresh(seed), self.every, widths)
        self.trained(name, net, plain_step, self.recipe(epochs), seed)
        return net, evaluate(net, self.test)

    def supernet(
        self,
        name: str,
        seed: int,
        ratios: tuple[float, float] | None = None,
        epochs: int | None = None,
        **changes: Any,
    ) -> tuple[Supernet, dict[str, Any]]:
        """A supernet of independent widths, or within `ratios` a US-Net, and the record of its training."""
        supernet = Supernet(self.fresh(seed), self.space)

        def step(net: nn.Module, recipe: SupernetRecipe) -> Step:
            return sandwich_step(supernet, recipe, ratios=ratios)

        recipe = self.recipe(epochs or self.setting.supernet_epochs, **changes)
        return supernet, self.trained(name, supernet, step, recipe, seed)

    def i_net(self, ratio: float, seed: int) -> tuple[nn.Module, float]:
        """A plain net at a width ratio, and its accuracy on the test images."""
        return self.plain(f"i-net-{ratio:g}-{seed}", self.space.uniform(ratio), seed)

    def us_net(
        self, low: float, seed: int, n: int = 4, distill: bool = True, times: int = 1
    ) -> tuple[Supernet, dict[str, Any]]:
        """A US-Net for ratios from `low` to 1, trained by the sandwich rule of `n` nets, so many times as long."""
        name, epochs = us_net_name(low, seed, n, distill, times), times * self.setting.supernet_epochs
        return self.supernet(name, seed, (low, 1.0), epochs, num_random=n - 2, distill=distill)

    def s_net(self, seed: int, *, private: bool = True) -> tuple[SwitchableNet, dict[str, Any]]:
        """An S-Net, or the same with shared BatchNorm, with both errors of its switches after each epoch."""
        net = SwitchableNet(self.fresh(seed), self.space, SWITCHES, private=private)
        seen = self.seen(5000)

        def errors() -> dict[str, Any]:
            test = {name: 1 - evaluate(net.subnet(name), self.test) for name in net.switches}
            train = {name: 1 - accuracy_as_in_training(net.subnet(name), seen) for name in net.switches}
            return {"train_error": train, "test_error": test}

        def step(_: nn.Module, recipe: SupernetRecipe) -> Step:
            return switch_step(net, recipe)

        name = f"{'s-net' if private else 'shared-bn'}-{seed}"
        return net, self.trained(name, net, step, self.recipe(), seed, errors)

    def calibrated(self, supernet: Supernet, widths: Widths, images: int = CALIBRATION) -> nn.Module:
        """The net of these widths with the weights it shares and BatchNorm statistics of its own."""
        net = extract(supernet.model, self.every, widths)
        if images:
            recalibrate_batchnorm(net, self.seen(images))
        return net

    def accuracy(self, supernet: Supernet, widths: Widths) -> float:
        """Accuracy on the test images with the shared weights, recalibrated."""
        return evaluate(self.calibrated(supernet, widths), self.test)

    def judge(self, supernet: Supernet, score: str = "loss") -> Judge:
        """The default judge of a run on the held-out images, a thousand at a time."""
        return RacingJudge(supernet, self.held_out, score)

    def origin(self) -> dict[str, Any]:
        """Where numbers come from."""
        command = shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
        return {"provenance": provenance() | {"command": command, "threads": torch.get_num_threads()}}

    def about(self) -> dict[str, Any]:
        """What the numbers of a figure were measured on."""
        setting = {key: _plain(value) for key, value in asdict(self.setting).items()}
        parts = {"train": len(self.data.train), "holdout": len(self.data.holdout), "test": len(self.data.test)}
        return {"setting": setting, "images": parts, "seeds": self.options.seeds, **self.origin()}

    def remembered(self, name: str, compute: Callable[[], Any]) -> Any:
        """A JSON value that is computed once."""
        path = self.place / f"{name}.json"
        if not path.exists():
            write_json(path, compute())
        return read_json(path)


def us_net_name(low: float, seed: int, n: int, distill: bool, times: int = 1) -> str:
    """What a US-Net is remembered by."""
    return f"us-net-{low:g}-n{n}{'' if distill else '-hard'}{f'-{times}x' if times > 1 else ''}-{seed}"


def accuracy_as_in_training(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Accuracy where BatchNorm normalises with the statistics of each batch, as it does while training."""
    right = count = 0
    with torch.no_grad(), batch_statistics(net):  # the running statistics it spoils are those of a copy
        for images, labels in batches:
            right += int((net(images).argmax(1) == labels).sum())
            count += len(labels)
    return right / count


def main(
    letter: str,
    doc: str | None,
    measure: Callable[..., dict[str, Any]],
    draw: Callable[..., str],
    arguments: Sequence[str] | None = None,
) -> None:
    """Run a figure: `measure(options)` gives its raw numbers, `draw(record, plot)` its table."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of cifar10.npz and fashion-mnist.npz")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "paper", help="where trained nets are kept")
    parser.add_argument("--root", type=Path, default=ROOT, help="below it results, figures and the page are written")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="as many as given are averaged")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draw", action="store_true", help="only draw again what was measured")
    parser.add_argument("--finished", action="store_true", help="e, h, j: only what was trained so far")
    parser.add_argument("--shares", nargs="+", type=float, help="h: train at these shares of the MACs only")
    parser.add_argument("--kinds", nargs="+", help="h: train these kinds of nets only")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on made-up images; wants --root and --runs")
    options = parser.parse_args(arguments)
    path = options.root / "benchmarks" / "results" / "paper" / f"{letter}.json"
    if not options.draw:
        started = time.perf_counter()
        write_json(path, measure(options))
        say(f"figure {letter}: {time.perf_counter() - started:.0f} s")
    table = draw(read_json(path), picture(options.root / "docs" / "figures" / f"{letter}.svg"))
    publish(options.root / "docs" / "paper.md", letter, table)
    print(table)


def publish(page: Path, letter: str, table: str) -> None:
    """Put a table between its markers on the page; a page without them is left alone."""
    begin, end = f"<!-- table {letter} -->\n", "<!-- end -->"
    text = page.read_text() if page.exists() else ""
    if begin in text:
        before, rest = text.split(begin)
        write_whole(page, f"{before}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}")


def picture(path: Path) -> Callable[..., Any]:
    """A function that draws axes with `plot(axes)` and writes the file; without matplotlib there is no picture."""

    def draw(plot: Callable[[Any], None], *, panels: int = 1) -> None:
        try:
            import matplotlib
        except ImportError:
            say(f"no {path.name}: matplotlib is not installed (pip install 'autoslim[figures]')")
            return
        matplotlib.use("agg")
        # text stays text, and the same numbers give the same file
        style = {"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.size": 9, "axes.grid": True}
        style |= {"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
        with matplotlib.rc_context(style):
            from matplotlib import pyplot

            figure, axes = pyplot.subplots(1, panels, figsize=(4.2 * panels if panels > 1 else 5.6, 3.4))
            plot(axes)
            figure.tight_layout()
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")
            pyplot.close(figure)

    return draw


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds of accuracies, in per cent."""
    mean = 100 * sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    deviation = (sum((100 * value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.1f} ± {deviation:.1f}"


def difference(values: Sequence[float]) -> str:
    """Differences of accuracies, in points, one by one."""
    return ", ".join(f"{100 * value:+.1f}" for value in values)


def say(text: str) -> None:
    """Progress, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Do settings differ in more than options that were not known yet?"""
    return any(one.get(key) != other.get(key) for key in {**one, **other})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _made_up(path: Path, channels: int) -> Path:
    """A few images of 16x16 whose class is their brightness."""
    import numpy as np

    if not path.exists():
        rng, labels = np.random.default_rng(0), np.arange(120) % 4
        images = rng.integers(0, 60, (120, 16, 16, channels)) + 60 * labels[:, None, None, None]
        images = images.astype(np.uint8)[..., 0] if channels == 1 else images.astype(np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, x_train=images[:80], y_train=labels[:80], x_test=images[80:], y_test=labels[80:])
    return path
