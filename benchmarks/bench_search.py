"""How long a search takes: racing and reuse against judging every candidate on all images, and against recalibration.

    python benchmarks/bench_search.py            # both nets, 2,000 and 10,000 images; hours on two cores
    python benchmarks/bench_search.py --quick    # one net, 2,000 images, fewer steps compared: minutes

One process, the same supernet and images. The search walks down to a quarter of the MACs by racing; at every
`--every`-th step the same step is also judged exhaustively (all candidates, all images, statistics of each batch) and
by the common practice (BatchNorm recalibrated on 2,000 images for each candidate, then evaluation), in turn. The last
is timed on some of the candidates and scaled to all. `--paths` compares whole paths as well: the nets that both find.
Supernets are trained once, briefly, on CIFAR-10 and kept in runs/bench_search. Writes benchmarks/results/search.json;
the last line is one JSON object with the worst of all nets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoslim import (
    Judge,
    MacCost,
    RacingJudge,
    Supernet,
    SupernetRecipe,
    Widths,
    evaluate,
    extract,
    greedy_slim,
    recalibrate_batchnorm,
    trace,
    train_supernet,
    zoo,
)
from autoslim.calibrate import batch_statistics
from autoslim.data import Batches, ImageData, ImageSet, load_data
from autoslim.export import load_tensors, save_tensors
from autoslim.run import provenance
from autoslim.train import load_unshared, unshared

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "search.json"
DATA = Path("~/.cache/autoslim-data/fashion-mnist.npz").expanduser()
NETS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2": lambda: zoo.mobilenet_v2(0.5, num_classes=10, in_channels=1),
    "resnet50": lambda: zoo.resnet50(0.25, num_classes=10, in_channels=1),
}
RECALIBRATION = 2000


Images = list[tuple[Tensor, Tensor]]


class Bench:
    """One network with its supernet, and the images it is searched on."""

    def __init__(self, name: str, data: ImageData, options: argparse.Namespace) -> None:
        self.name, self.data, self.options = name, data, options
        torch.manual_seed(0)
        model = NETS[name]()
        space = trace(model, torch.zeros(1, 1, 32, 32)).with_choices(bins=4, divisor=4, min_ratio=1 / 4)
        self.supernet = Supernet(model.to(memory_format=torch.channels_last), space)
        self._train()

    def _train(self) -> None:
        path = self.options.runs / f"{self.name}.safetensors"
        if not path.exists():
            shared = {
                "channels_last": True,
                "distill": False,
            }  # labels alone: few epochs are enough (benchmarks/LOG.md)
            recipe = SupernetRecipe(epochs=self.options.epochs, batch_size=64, lr=0.05, warmup_epochs=0.5, **shared)
            images = self.data.train.subset(range(min(self.options.training_images, len(self.data.train))))
            batches = self._batches(images, 64, augment="crop", shuffle=True, drop_last=True)
            for log in train_supernet(self.supernet, batches, recipe):
                print(f"{self.name}: supernet, epoch {log.epoch}, {log.losses}, {log.seconds:.0f} s", flush=True)
            save_tensors(path, unshared(self.supernet.model), {})
        load_unshared(self.supernet.model, load_tensors(path)[0])

    def _batches(self, images: ImageSet, size: int, **options: Any) -> Batches:
        return Batches(images, size, mean=self.data.mean, std=self.data.std, channels_last=True, **options)

    def held_out(self, count: int) -> Images:
        return list(self._batches(self.data.holdout.subset(range(count)), self.options.batch_size))

    def test_accuracy(self, widths: Widths) -> float:
        net = extract(self.supernet.model, self.supernet.space, widths)
        recalibrate_batchnorm(net, self._calibration()[:4])
        return evaluate(net, self._batches(self.data.test, 500))

    def _calibration(self) -> list[Tensor]:
        return [images for images, _ in self._batches(self.data.train.subset(range(RECALIBRATION)), 250)]

    def recalibrated(self, widths: Widths, images: Images) -> float:
        """The common practice: statistics of 2,000 images in training mode, then the accuracy in evaluation mode."""
        net = extract(self.supernet.model, self.supernet.space, widths)
        with torch.no_grad(), batch_statistics(net):
            for batch in self._calibration():
                net(batch)
        return evaluate(net, images)

    def run(self, count: int) -> dict[str, Any]:
        """Walk down by racing; at some steps judge the same step in the other ways too."""
        space, images = self.supernet.space, self.held_out(count)
        cost = MacCost(space)
        racing = RacingJudge(self.supernet, images)
        started = time.perf_counter()
        for group in space.groups:
            racing.reuse.plan(group)
        preparation = time.perf_counter() - started
        exact = Judge(self.supernet, images)
        widths, steps, seconds, path = space.full(), [], 0.0, []
        limit = 0.25 * cost(space.full())
        while cost(widths) > limit and len(path) < self.options.steps:
            started = time.perf_counter()
            step = next(greedy_slim(space, racing, cost, [limit], start=widths))
            seconds += time.perf_counter() - started
            raced = time.perf_counter() - started
            if len(path) % self.options.every == 0:
                steps.append(self._compare(widths, step.group, raced, exact, images))
                print(f"{self.name}, {count} images, step {len(path)}: {steps[-1]}", flush=True)
            path.append(step.group)
            widths = step.widths
        record = {
            "net": self.name,
            "images": count,
            "groups": len(space.groups),
            "steps": len(path),
            "search_seconds": round(seconds, 1),
            "preparation_seconds": round(preparation, 1),
            "compared": steps,
            "speedup": statistics.median(s["exhaustive"] / s["racing"] for s in steps),
            "speedup_over_recalibration": statistics.median(s["recalibration"] / s["racing"] for s in steps),
            "same_steps": statistics.mean(s["same"] for s in steps),
        }
        if self.options.paths:
            (*_, last) = greedy_slim(space, exact, cost, [limit])
            accuracies = {"racing": self.test_accuracy(widths), "exhaustive": self.test_accuracy(last.widths)}
            record |= {
                "accuracy": accuracies,
                "accuracy_gap": 100 * abs(accuracies["racing"] - accuracies["exhaustive"]),
            }
        return record

    def _compare(self, widths: Widths, chosen: str, raced: float, exact: Judge, images: Images) -> dict[str, Any]:
        space = self.supernet.space
        candidates = {g: c for g in space.groups if (c := space.narrowed(widths, g)) is not None}
        started = time.perf_counter()
        scores = {group: exact(candidate) for group, candidate in candidates.items()}
        exhaustive = time.perf_counter() - started
        some = list(candidates)[:: max(1, len(candidates) // 3)]
        started = time.perf_counter()
        for group in some:
            self.recalibrated(candidates[group], images)
        recalibration = (time.perf_counter() - started) * len(candidates) / len(some)
        best = max(scores, key=lambda group: scores[group])
        return {
            "racing": raced,
            "exhaustive": exhaustive,
            "recalibration": recalibration,
            "same": best == chosen,
            "lost": scores[best] - scores[chosen],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--images", nargs="+", type=int, default=[2000, 10000])
    parser.add_argument("--every", type=int, default=10, help="compare each so many steps")
    parser.add_argument("--steps", type=int, default=10**6, help="at most so many steps")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--epochs", type=int, default=4, help="of a supernet")
    parser.add_argument("--training-images", type=int, default=40_000, help="for a supernet")
    parser.add_argument("--paths", action="store_true", help="compare whole paths too")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench_search")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.quick:
        options.nets, options.images, options.every = options.nets[:1], [2000], 20
    torch.set_num_threads(options.threads)
    options.runs.mkdir(parents=True, exist_ok=True)
    data = load_data(str(options.data), image_size=32, holdout=10_000)
    records = []
    for name in options.nets:
        bench = Bench(name, data, options)
        for count in options.images:
            records.append(bench.run(count))
            RESULTS.write_text(json.dumps({"provenance": provenance(), "records": records}, indent=1) + "\n")
    worst = {
        "speedup": min(record["speedup"] for record in records),
        "same_steps": min(record["same_steps"] for record in records),
        "accuracy_gap": max((record["accuracy_gap"] for record in records if "accuracy_gap" in record), default=None),
        "speedup_over_recalibration": min(record["speedup_over_recalibration"] for record in records),
    }
    print(json.dumps(worst))


if __name__ == "__main__":
    main()
