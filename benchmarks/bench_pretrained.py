"""From ImageNet weights to small CIFAR-10 nets: EfficientNet-Lite0 at 64 pixels, 50 % and 25 % of its MACs.

    PYTHON=.venv/bin/python bash ../shared/data/fetch.sh       # or any folder with cifar10.npz and efficientnet-lite0.pth: --data
    python benchmarks/bench_pretrained.py --train-images 16000 --supernet-epochs 3 --epochs 3 --search-images 500 --bins 6 --fresh
                                                               # results/pretrained.{json,md}: three hours of one idle core, resumes without --fresh
    python benchmarks/bench_pretrained.py --fresh              # the default setting: 25 minutes, and too short to say much (benchmarks/LOG.md)
    python benchmarks/bench_pretrained.py --quick              # pretrained-quick.{json,md}: a few minutes
    python benchmarks/bench_pretrained.py --estimate           # how long it would take here
    python benchmarks/bench_pretrained.py --only look          # nets cut right after loading, before any training

Everything starts from the same weights with a new class head, and everything but the nets from scratch gets the same number of epochs:
first the whole network (as a supernet, or, for Torch-Pruning, as it is), then the cut net. Equal epochs are not equal work: in those
of the whole network Torch-Pruning trains one net a step, a sandwich step four, and ours has the search besides. Nets from scratch get the sum
of both epochs; there are such nets for the widths found with sorted channels only. All class heads are drawn small (`load_pretrained`
says why), in nets from scratch too. "mixed" is the same with `train.plain_epochs: 1`: the first of its epochs trains the
whole network alone, which is sorted by first-order importance then, and the others are a supernet's; "plain" is our search on the network
fine-tuned as it is, sorted by that importance.
Torch-Pruning cuts the fine-tuned network in 60 small steps until the MACs are met, by group magnitude (each layer alike) or first-order
Taylor importance (globally); like ours its widths are multiples of 8 and no layer falls below a quarter. "Before" is the cut net with
its BatchNorm recalibrated, "after" is when it was fine-tuned. l1: channels sorted by that (`sort_channels`); none: as they come. Unsorted
channels are compared at uniform widths, and searched too where the setting says so. Accuracies are on all test images it names.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# a supernet meets a kernel per combination of widths; the default cache of oneDNN is too small (benchmarks/LOG.md)
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import autoslim
from autoslim.data import Batches, ImageSet, load_data
from autoslim.export import load_tensors, save_tensors
from autoslim.files import read_json, write_json, write_whole
from autoslim.recipe import Recipe, SupernetRecipe
from autoslim.run import provenance
from autoslim.space import SlimStep, Widths
from autoslim.train import Step, Training, load_unshared, plain_step, sandwich_step, unshared

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "examples"))
from convert_efficientnet_lite0 import timm_names  # noqa: E402

MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # as EfficientNet-Lite0 was trained
BUDGETS = (0.5, 0.25)
SORTS = ("l1", "none", "mixed")
PLAIN_EPOCHS = 1  # of "mixed"
LEAST = 0.25  # of the channels of a layer


@dataclass(frozen=True)
class Setting:
    train_images: int = 2500
    search_images: int = 200
    test_images: int = 10_000
    calibration_images: int = 500
    size: int = 64
    batch_size: int = 64
    supernet_epochs: int = 2  # and those of the whole network for Torch-Pruning
    epochs: int = 2  # of a cut net
    bins: int = 4
    lr: float = 0.03
    scratch_lr: float = 0.05
    unsorted_is_searched: bool = False  # else it is compared at uniform widths alone


QUICK = Setting(2000, 125, 1000, 125, 64, 50, 1, 1, 3, unsorted_is_searched=False)


class Resized:
    """Batches of images enlarged to `size` pixels after augmentation."""

    def __init__(self, batches: Batches, size: int) -> None:
        self.batches, self.size = batches, size

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            yield F.interpolate(images, size=self.size, mode="bilinear", align_corners=False), labels


class Bench:
    def __init__(self, setting: Setting, options: argparse.Namespace) -> None:
        self.setting, self.options = setting, options
        name = "pretrained-quick" if options.quick else "pretrained"
        self.path = options.results / f"{name}.json"
        self.runs = options.runs / name / f"seed{options.seed}"
        described = asdict(setting)
        if options.fresh:
            shutil.rmtree(self.runs, ignore_errors=True)
        known = (
            read_json(self.path) if self.path.exists() and not options.fresh else {"setting": described, "records": {}}
        )
        if known["setting"] != described:
            sys.exit(f"{self.path} is of another setting ({known['setting']}); give --fresh or --results FOLDER")
        self.known = known
        torch.set_num_threads(options.threads)

    # --- what is given ---

    @cached_property
    def parts(self) -> dict[str, ImageSet]:
        setting, data = self.setting, load_data(self.options.data / "cifar10.npz", holdout=0.1)
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
        return {
            "train": data.train.subset(order[: setting.train_images]),
            "calibration": data.train.subset(order[: setting.calibration_images]),
            "search": data.holdout.subset(torch.arange(setting.search_images)),
            "test": data.test.subset(torch.arange(setting.test_images)),
        }

    def batches(self, part: str, size: int = 125) -> Resized:
        batches = Batches(self.parts[part], size, mean=MEAN, std=STD, channels_last=True)
        return Resized(batches, self.setting.size)

    def training_batches(self) -> Resized:
        options: dict[str, Any] = {"augment": "flip,crop", "shuffle": True, "drop_last": True}
        options["seed"] = self.options.seed
        options["channels_last"] = True
        batches = Batches(self.parts["train"], self.setting.batch_size, mean=MEAN, std=STD, **options)
        return Resized(batches, self.setting.size)

    @property
    def example(self) -> Tensor:
        return torch.zeros(1, 3, self.setting.size, self.setting.size)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        tensors = torch.load(self.options.data / "efficientnet-lite0.pth", map_location="cpu", weights_only=True)
        return timm_names(tensors, timm.create_model("tf_efficientnet_lite0"))

    def fresh(self, pretrained: bool = True, classes: int = 10) -> nn.Module:
        """The whole network, with a class head drawn by the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            model: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=classes)
        if pretrained:
            autoslim.load_pretrained(model, self.weights)  # scales timm's large class head down
        else:
            head = model.get_submodule("classifier")
            nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(self.options.seed))
        return model.eval().to(memory_format=torch.channels_last)

    @cached_property
    def every(self) -> autoslim.ChannelSpace:
        return autoslim.trace(self.fresh(), self.example)

    @cached_property
    def space(self) -> autoslim.ChannelSpace:
        return self.every.with_choices(self.setting.bins, 8, LEAST)

    @cached_property
    def eights(self) -> autoslim.ChannelSpace:
        """Every multiple of 8, for uniform nets."""
        return self.every.with_choices("size:8", 8, LEAST)

    # --- what is kept ---

    def record(self, key: str) -> dict[str, Any] | None:
        return self.known["records"].get(f"seed{self.options.seed}/{key}")

    def keep(self, key: str, **facts: Any) -> None:
        self.known["records"][f"seed{self.options.seed}/{key}"] = facts
        self.known["provenance"] = provenance() | {"threads": self.options.threads}
        write_json(self.path, self.known)
        write_whole(self.path.with_suffix(".md"), page(self.known))
        print(f"{time.strftime('%H:%M:%S')} {key}: {facts}", flush=True)

    def train(self, key: str, net: nn.Module, recipe: Recipe, step: Step) -> nn.Module:
        """Train a net, or read it if that was done; a checkpoint after each epoch."""
        batches = self.training_batches()
        done, checkpoint = self.runs / f"{key}.safetensors", self.runs / f"{key}.checkpoint"
        if done.exists():
            load_unshared(net, load_tensors(done)[0])
            return net
        training = Training(net, recipe, len(batches), seed=self.options.seed)
        if checkpoint.exists():
            tensors, about = load_tensors(checkpoint)
            training.load_state(tensors, about["epoch"])
        while not training.is_done:
            log = training.run_epoch(batches, step)
            save_tensors(checkpoint, training.state(), {"epoch": training.epoch})
            print(f"  {key} epoch {log.epoch}: {log.losses} {log.seconds:.0f} s", flush=True)
        save_tensors(done, unshared(net), {})
        checkpoint.unlink(missing_ok=True)
        return net

    def recipe(self, epochs: int, lr: float | None = None) -> dict[str, Any]:
        lr = self.setting.lr if lr is None else lr
        size = self.setting.batch_size
        return {"epochs": epochs, "batch_size": size, "lr": lr, "weight_decay": 4e-5, "warmup_epochs": 0.5}

    def accuracy(self, net: nn.Module) -> float:
        return autoslim.evaluate(net, self.batches("test"))

    def calibrated(self, net: nn.Module) -> nn.Module:
        autoslim.recalibrate_batchnorm(net, [images for images, _ in self.batches("calibration")])
        return net

    # --- how long it takes ---

    def estimate(self) -> dict[str, float]:
        """CPU seconds of each part here, from a few steps and the MACs; a search is assumed to look at a third."""
        setting, supernet = self.setting, autoslim.Supernet(self.fresh(), self.space)
        images, labels = next(iter(self.training_batches()))
        step, plain = (
            sandwich_step(supernet, SupernetRecipe()),
            plain_step(supernet.model, Recipe()),
        )
        rng = random.Random(0)

        def seconds(run: Callable[[], object], times: int) -> float:
            run()
            started = time.process_time()
            for _ in range(times):
                run()
            return (time.process_time() - started) / times / len(images)

        each = {
            "sandwich": seconds(lambda: step(images, labels, rng), 4),
            "plain": seconds(lambda: plain(images, labels, rng), 2),
        }
        supernet.eval()
        with torch.no_grad():
            each["forward"] = seconds(lambda: supernet.model(images), 4)
        sorts = 3 if setting.unsorted_is_searched else 2
        cost = autoslim.MacCost(self.space)
        steps = [*autoslim.greedy_slim(self.space, lambda widths: 0.0, cost, [min(BUDGETS) * cost(self.space.full())])]
        tried = sum(sum(len(g.choices) > 1 for g in self.space.groups.values()) for _ in steps) * 0.6 / 3
        images_seen = setting.supernet_epochs * setting.train_images
        cut = sum(BUDGETS) * 1.4 * each["plain"] * setting.train_images  # narrow nets use a CPU less well
        tests = setting.test_images * each["forward"]
        return {
            "look": 9 * 0.6 * (tests + setting.search_images * each["forward"]),
            "supernets": 3 * (images_seen * each["sandwich"] + tests),
            "search": sorts * tried * setting.search_images * each["forward"] * 1.4,
            "cut nets": (4 + 2 * sorts) * setting.epochs * cut / 2 + (4 + 2 * sorts) * 1.1 * tests,
            "from scratch": (setting.supernet_epochs + setting.epochs) * cut + tests,
            "plain": tried * setting.search_images * each["forward"] * 1.4 + setting.epochs * cut + 4 * tests,
            "torch-pruning": images_seen * each["plain"] + 2 * setting.epochs * cut + 5 * tests + 120 * 1.2,
        }

    # --- what is measured ---

    def look(self) -> None:
        """Uniform cuts before any training: how much of what the whole network sees is left?

        A linear classifier (ridge) on the features before the class head, fitted on training images and measured on
        test images, for each net anew.
        """
        for key, sort, ratio in [("look/full", "none", 1.0)] + [
            (f"look/{sort} {ratio:.0%}", sort, ratio)
            for sort in ("none", "l1", "gamma", "first-order")
            for ratio in (0.75, 0.5)
        ]:
            if self.record(key) is None:
                net = autoslim.extract(self.sorted(sort), self.eights, self.eights.uniform(ratio))
                net = net if ratio == 1 else self.calibrated(net)
                self.keep(key, accuracy=self.probe(net), macs=macs_of(net, self.example))

    def sorted(self, sort: str, model: nn.Module | None = None) -> nn.Module:
        """The pretrained network, or another such one, with its channels in an order."""
        model = self.fresh() if model is None else model
        importance: Any = sort
        if sort == "none":
            return model
        if sort == "first-order":
            importance = {}
            for images, labels in self.batches("calibration", 25):
                scores = autoslim.first_order(
                    model, self.every, lambda m, x=images, y=labels: F.cross_entropy(m(x), y).backward()
                )
                importance = {group: score + importance.get(group, 0) for group, score in scores.items()}
        autoslim.sort_channels(model, self.every, importance)
        return model

    @torch.no_grad()
    def probe(self, net: nn.Module, ridge: float = 1.0) -> float:
        def features(part: str) -> tuple[Tensor, Tensor]:
            found = [(net.forward_head(net.forward_features(x), pre_logits=True), y) for x, y in self.batches(part)]
            return torch.cat([x for x, _ in found]).double(), torch.cat([y for _, y in found])

        (x, y), (tx, ty) = features("search"), features("test")
        mean, scale = x.mean(0), x.std(0) + 1e-6
        x, tx = (x - mean) / scale, (tx - mean) / scale
        gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        solved = torch.linalg.solve(gram, x.T @ (F.one_hot(y, 10).double() - 0.1))
        return float(((tx @ solved).argmax(1) == ty).double().mean())

    def alone(self, key: str, epochs: int) -> nn.Module:
        """The network, trained as it is for some epochs."""
        recipe, whole = Recipe(**self.recipe(epochs)), self.fresh()
        return self.train(key, whole, recipe, plain_step(whole, recipe))

    def supernet(self, sort: str) -> nn.Module:
        epochs = self.setting.supernet_epochs
        if sort == "mixed":
            model = self.sorted("first-order", self.alone("supernet-mixed-plain", PLAIN_EPOCHS).eval())
            epochs -= PLAIN_EPOCHS
        else:
            model = self.sorted(sort)
        cost, rng = autoslim.MacCost(self.space), random.Random(0)
        sampled = statistics.mean(cost(self.space.sample(rng)) for _ in range(200))
        whole = cost(self.space.full())
        self.known["macs of a sandwich"] = (whole + cost(self.space.smallest()) + 2 * sampled) / whole
        recipe = SupernetRecipe(**self.recipe(epochs))
        supernet = autoslim.Supernet(model, self.space)
        self.train(f"supernet-{sort}", supernet, recipe, sandwich_step(supernet, recipe))
        if self.record(f"supernet/{sort}") is None:
            self.keep(f"supernet/{sort}", accuracy=self.accuracy(model), macs=macs_of(model, self.example))
        return model

    def found(self, sort: str, model: nn.Module, budget: float) -> Widths:
        """The widths the search gives for a budget; its steps are kept one by one, so the next one goes on."""
        steps: list[SlimStep] = []
        cost = autoslim.MacCost(self.space)
        key = f"seed{self.options.seed}/{sort}"
        path = self.known.setdefault("paths", {}).setdefault(key, [])
        for group, width, score in path:
            before = steps[-1].widths if steps else self.space.full()
            widths = before.replaced(group, width)
            steps.append(SlimStep(group, widths, cost(widths), score))
        start = steps[-1].widths if steps else self.space.full()
        limit = budget * cost(self.space.full())
        if cost(start) > limit:
            judge = autoslim.RacingJudge(autoslim.Supernet(model, self.space), self.batches("search"))
            for step in autoslim.greedy_slim(self.space, judge, cost, [limit], start=start):
                steps.append(step)
                path.append([step.group, step.widths[step.group], step.score])
                write_json(self.path, self.known)
        found = autoslim.widths_within(self.space, steps, cost, limit)
        assert found is not None, "the search ended below the budget"
        return found

    def cut_net(self, key: str, net: nn.Module, epochs: int, *, scratch: bool = False) -> None:
        """Before and after fine-tuning; of a net from scratch there is no before."""
        if self.record(key) is not None:
            return
        before = None if scratch else self.accuracy(self.calibrated(net))
        recipe = Recipe(**self.recipe(epochs, self.setting.scratch_lr if scratch else None))
        self.train(key.replace("/", "-").replace(" ", "-"), net, recipe, plain_step(net, recipe))
        params = sum(p.numel() for p in net.parameters())
        self.keep(key, before=before, accuracy=self.accuracy(net), macs=macs_of(net, self.example), params=params)

    def slim(self, sort: str) -> None:
        setting, model = self.setting, self.supernet(sort)
        cost = autoslim.MacCost(self.eights)
        for budget in BUDGETS:
            _, uniform = autoslim.uniform_like(self.eights, cost, budget * cost(self.eights.full()))
            self.cut_net(f"uniform {sort}/{budget:.0%}", autoslim.extract(model, self.eights, uniform), setting.epochs)
        if sort == "none" and not setting.unsorted_is_searched:
            return
        for budget in BUDGETS:
            widths = self.found(sort, model, budget)
            self.cut_net(f"found {sort}/{budget:.0%}", autoslim.extract(model, self.space, widths), setting.epochs)
            if sort == "l1":
                scratch = autoslim.extract(self.fresh(pretrained=False), self.space, widths)
                epochs = setting.supernet_epochs + setting.epochs
                self.cut_net(f"found from scratch/{budget:.0%}", scratch, epochs, scratch=True)

    def whole(self) -> nn.Module:
        """The network fine-tuned as it is, and how good it is."""
        whole = self.alone("whole", self.setting.supernet_epochs)
        if self.record("whole") is None:
            self.keep("whole", accuracy=self.accuracy(whole), macs=macs_of(whole, self.example))
        return whole

    def plain(self) -> None:
        """Our search on the network fine-tuned as it is, sorted by first-order importance: no supernet is trained."""
        model = self.sorted("first-order", self.whole().eval())
        for budget in BUDGETS:
            widths = self.found("plain", model, budget)
            self.cut_net(f"found plain/{budget:.0%}", autoslim.extract(model, self.space, widths), self.setting.epochs)

    def torch_pruning(self) -> None:
        self.whole()
        for kind in ("magnitude", "taylor"):
            for budget in BUDGETS:
                key = f"torch-pruning {kind}/{budget:.0%}"
                if self.record(key) is None:
                    self.cut_net(key, self.pruned(kind, budget), self.setting.epochs)

    def pruned(self, kind: str, budget: float) -> nn.Module:
        import torch_pruning

        net = self.fresh()
        load_unshared(net, load_tensors(self.runs / "whole.safetensors")[0])
        importance = torch_pruning.importance
        pruner = torch_pruning.pruner.BasePruner(
            net.eval(),
            self.example,
            importance=importance.GroupTaylorImportance()
            if kind == "taylor"
            else importance.GroupMagnitudeImportance(p=2),
            global_pruning=kind == "taylor",
            pruning_ratio=1 - LEAST,
            max_pruning_ratio=1 - LEAST,
            iterative_steps=60,
            ignored_layers=[net.get_submodule("classifier")],
            round_to=8,
        )
        limit = budget * macs_of(net, self.example)
        for _ in range(60):
            if macs_of(net, self.example) <= limit:
                break
            net.zero_grad()
            for images, labels in self.batches("calibration") if kind == "taylor" else ():
                F.cross_entropy(net(images), labels).backward()
            pruner.step()
        net.zero_grad()
        if macs_of(net, self.example) > limit:
            raise SystemExit(f"torch-pruning ({kind}) did not reach {budget:.0%} of the MACs")
        return net


def macs_of(net: nn.Module, example: Tensor) -> int:
    """By torch's own counter, alike for all."""
    training = net.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(example)
    net.train(training)
    return int(counter.get_total_flops()) // 2


# --- the page ----------------------------------------------------------------------------------------------------


def page(known: dict[str, Any]) -> str:
    records: dict[str, dict[str, Any]] = known["records"]
    about = known["provenance"]
    lines = ["# From pretrained weights", "", *(__doc__ or "").strip().splitlines(), ""]
    lines += [f"{about['date'][:10]}, commit {about['commit']}, {about['machine']}, {about['threads']} threads."]
    lines += [f"Setting: {', '.join(f'{key} {value}' for key, value in known['setting'].items())}.", ""]
    seeds = sorted({key.partition("/")[0] for key in records})
    names = list(dict.fromkeys(key.partition("/")[2] for key in records))
    share = {name: [records[f"{seed}/{name}"] for seed in seeds if f"{seed}/{name}" in records] for name in names}
    full = next((found[0]["macs"] for name, found in share.items() if name in ("whole", "supernet/l1")), None)
    looked = [name for name in names if name.startswith("look/")]
    if "macs of a sandwich" in known:
        lines += [
            f"A sandwich step here has {known['macs of a sandwich']:.1f} times the MACs of the whole network's.",
            "",
        ]
    if looked:
        lines += ["Before any training, uniform widths (a linear classifier on the features):", ""]
        lines += ["| cut | accuracy |", "| --- | --- |"]
        lines += [f"| {name.removeprefix('look/')} | {shown(share[name], 'accuracy')} |" for name in looked] + [""]
    if len(looked) == len(names):
        return "\n".join([*lines, "No network has been trained yet."]) + "\n"
    lines += ["| net | MACs | before | after |", "| --- | --- | --- | --- |"]
    for name in sorted(set(names) - set(looked), key=lambda name: (name.rpartition("/")[2], names.index(name))):
        found = share[name]
        macs = f"{found[0]['macs'] / 1e6:.1f}M" + (f" ({found[0]['macs'] / full:.0%})" if full else "")
        lines.append(f"| {name.replace('/', ', ')} | {macs} | {shown(found, 'before')} | {shown(found, 'accuracy')} |")
    return "\n".join(lines) + "\n"


def shown(records: list[dict[str, Any]], key: str) -> str:
    values = [f"{record[key]:.1%}" for record in records if record.get(key) is not None]
    return ", ".join(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 training images, an epoch each")
    parser.add_argument("--fresh", action="store_true", help="forget what was trained and measured")
    parser.add_argument("--estimate", action="store_true", help="say how long it would take, and stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("look", *SORTS, "torch-pruning", "plain"), help="one part of it")
    parser.add_argument("--data", type=Path, default=Path("~/.cache/autoslim-data").expanduser())
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    for name, value in asdict(Setting()).items():
        if isinstance(value, int) and not isinstance(value, bool):
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="in place of what the setting has")
    options = parser.parse_args()
    for name in ("cifar10.npz", "efficientnet-lite0.pth"):
        if not (options.data / name).exists():
            sys.exit(f"{options.data / name} is missing: shared/data/fetch.sh brings it, or give --data FOLDER")
    setting = asdict(QUICK if options.quick else Setting())
    setting |= {name: getattr(options, name) for name in setting if getattr(options, name, None) is not None}
    bench = Bench(Setting(**setting), options)
    if options.only is None or options.estimate:
        found = bench.estimate()
        shown = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in found.items())
        print(f"estimate, minutes of this CPU: {shown}; all {sum(found.values()) / 60:.0f}", flush=True)
        if options.estimate:
            return
    parts = {
        "look": bench.look,
        **{sort: lambda sort=sort: bench.slim(sort) for sort in SORTS},
        "plain": bench.plain,
        "torch-pruning": bench.torch_pruning,  # the last: it ends the script where a budget is not reached
    }
    for name, part in parts.items():
        if options.only in (None, name):
            part()


if __name__ == "__main__":
    main()
