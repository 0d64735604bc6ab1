"""How long a search takes: racing and reuse against judging every candidate on all images, and against recalibration.

    python benchmarks/bench_search.py            # both nets, 2,000 and 10,000 images; hours on two cores
    python benchmarks/bench_search.py --quick    # one net, 2,000 images, fewer steps compared: minutes

One process, the same supernet and images. The search walks down by racing. At each `--every`-th step (2,000 images:
all) the same step is judged on all images as well: by reuse, which gives the scores of judging one by one to 1e-5, and
in turn some of its candidates one by one, with the statistics of each batch and by the common practice (BatchNorm
recalibrated on 2,000 images, then evaluated). Times of those are per candidate, times the candidates of the walk. The
time of the race has its preparation in it, which a search makes once. With one thread times are CPU times of the process,
which other programs on the machine move least; with several, wall times. `--precision bf16`: the race runs in that where
its rounding is harmless, as `slim.precision` does; what it is compared with runs in fp32 throughout. Where every step was
compared, the nets at the ends of both paths are evaluated on the test images.
Supernets are trained once, briefly, on Fashion-MNIST at 32 px and kept in runs/bench_search. Writes
benchmarks/results/search.json; the last line is one JSON object with the worst of all nets and numbers of images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoslim import (
    Judge,
    MacCost,
    RacingJudge,
    ReuseJudge,
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
from autoslim.precision import lowered, lowered_inputs, rounding_of
from autoslim.run import provenance
from autoslim.scores import SCORES
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

    def __init__(
        self,
        name: str,
        model: nn.Module,
        data: ImageData,
        options: argparse.Namespace,
        *,
        bins: int = 4,
        divisor: int = 4,
        fixed: Sequence[str] = (),
    ) -> None:
        self.name, self.data, self.options = name, data, options
        self.clock = time.process_time if options.threads == 1 else time.perf_counter
        space = trace(model, torch.zeros(1, 1, 32, 32), fixed=fixed).with_choices(bins, divisor, min_ratio=1 / 4)
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

    def run(self, count: int, every: int, most: int) -> dict[str, Any]:
        """Walk down by racing; at some steps judge the same step in the other ways too."""
        space, images = self.supernet.space, self.held_out(count)
        cost, racing, exact = MacCost(space), self._racing(images), ReuseJudge(self.supernet, images)
        started = self.clock()
        racing.reuse.whole()
        preparation = self.clock() - started
        exact.reuse.whole()
        widths, path, limit = space.full(), list[str](), self.options.budget * cost(space.full())
        steps: list[dict[str, Any]] = []
        while cost(widths) > limit and len(steps) < most:
            candidates = {g: c for g in space.groups if (c := space.narrowed(widths, g)) is not None}
            started = self.clock()
            raced = racing.compare(widths, candidates)
            step: dict[str, Any] = {"candidates": len(candidates), "racing": self.clock() - started}
            chosen = _best(raced)
            if len(steps) % every == 0:
                step |= self._compared(widths, candidates, chosen, exact, images)
            steps.append(step)
            path.append(chosen)
            widths = candidates[chosen]
            print(f"{self.name}, {count} images, step {len(steps)}: {_rounded(step)}", flush=True)
        return self._record(count, path, steps, preparation) | self._gap(widths, path, steps, exact, limit)

    def _racing(self, images: Images) -> RacingJudge:
        """The judge of the walk, in the precision asked for if that is harmless."""
        if self.options.precision == "fp32":
            return RacingJudge(self.supernet, images)
        low = lowered(self.supernet)
        found = rounding_of(self.supernet, low, images, SCORES["loss"])
        print(f"{self.name}: rounding {found.rounding:.2g}, chance {found.chance:.2g}", flush=True)
        if not found.is_harmless:
            raise SystemExit(f"{self.name}: rounding to bf16 moves decisions here; a run would go on in fp32")
        return RacingJudge(low, [(lowered_inputs(inputs), labels) for inputs, labels in images])

    def _compared(
        self, widths: Widths, candidates: dict[str, Widths], chosen: str, exact: ReuseJudge, images: Images
    ) -> dict[str, Any]:
        """The step judged on all images by reuse, and times of some candidates judged one by one, in turn."""
        started = self.clock()
        found = exact.compare(widths, candidates)
        reuse = self.clock() - started
        judge, times = Judge(self.supernet, images), {"exhaustive": list[float](), "recalibration": list[float]()}
        for group in list(candidates)[:: max(1, len(candidates) // 3)][:3]:
            started = self.clock()
            score = judge(candidates[group])
            times["exhaustive"].append(self.clock() - started)
            assert abs(score - found[group][0]) < 1e-5, "reuse gives what judging one by one gives"
            started = self.clock()
            self.recalibrated(candidates[group], images)
            times["recalibration"].append(self.clock() - started)
        best = _best(found)
        return {
            "reuse": reuse,
            "per_candidate": {kind: statistics.median(seconds) for kind, seconds in times.items()},
            "same": best == chosen,
            "lost": found[best][0] - found[chosen][0],
        }

    def _record(self, count: int, path: list[str], steps: list[dict[str, Any]], preparation: float) -> dict[str, Any]:
        compared = [step for step in steps if "reuse" in step]
        judged = sum(step["candidates"] for step in steps)
        seconds = {"racing": preparation + sum(step["racing"] for step in steps)}
        for kind in ("exhaustive", "recalibration"):
            seconds[kind] = judged * statistics.median(step["per_candidate"][kind] for step in compared)
        return {
            "net": self.name,
            "images": count,
            "precision": self.options.precision,
            "threads": self.options.threads,
            "groups": len(self.supernet.space.groups),
            "candidates": judged,
            "seconds": _rounded(seconds),
            "preparation_seconds": round(preparation, 1),
            "path": path,
            "steps": [_rounded(step) for step in steps],
            "speedup": round(seconds["exhaustive"] / seconds["racing"], 2),
            "speedup_of_reuse": round(
                statistics.median(s["candidates"] * s["per_candidate"]["exhaustive"] / s["reuse"] for s in compared), 2
            ),
            "speedup_over_recalibration": round(seconds["recalibration"] / seconds["racing"], 2),
            "same_steps": statistics.mean(step["same"] for step in compared),
        }

    def _gap(
        self, widths: Widths, path: list[str], steps: list[dict[str, Any]], exact: ReuseJudge, limit: float
    ) -> dict[str, Any]:
        """Accuracy of the nets at the end of both paths, if every step was compared."""
        if any("same" not in step for step in steps):
            return {}
        space = self.supernet.space
        other = space.full()
        for group, step in zip(path, steps, strict=True):
            if not step["same"]:
                break
            other = space.narrowed(other, group) or other
        same = next((number for number, step in enumerate(steps) if not step["same"]), len(steps))
        rest = greedy_slim(space, exact, MacCost(space), [limit], start=other)
        for step in itertools.islice(rest, len(steps) - same):
            other = step.widths
        accuracy = {"racing": self.test_accuracy(widths), "exhaustive": self.test_accuracy(other)}
        return {"accuracy": accuracy, "accuracy_gap": 100 * abs(accuracy["racing"] - accuracy["exhaustive"])}


def _keep(records: list[dict[str, Any]]) -> None:
    """Add records to the file; each takes the place of one of the same net, number of images and precision."""
    before = json.loads(RESULTS.read_text())["records"] if RESULTS.exists() else []
    kept = {
        (record["net"], record["images"], record.get("precision", "fp32")): record for record in (*before, *records)
    }
    RESULTS.write_text(json.dumps({"records": [kept[key] for key in sorted(kept)]}, indent=1) + "\n")


def _best(found: Mapping[str, tuple[float, float]]) -> str:
    return max(found, key=lambda group: found[group][1])


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _rounded(value)
        if isinstance(value, Mapping)
        else round(value, 6 if key == "lost" else 3)
        if isinstance(value, float)
        else value
        for key, value in values.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--images", nargs="+", type=int, default=[2000, 10000])
    parser.add_argument("--every", nargs="+", type=int, default=[1, 8], help="compare each so many steps; by --images")
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 20], help="at most so many steps; by --images")
    parser.add_argument("--budget", type=float, default=0.25, help="share of the MACs at which the walk ends")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--epochs", type=int, default=2, help="of a supernet")
    parser.add_argument("--training-images", type=int, default=20_000, help="for a supernet")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench_search")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the race")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.quick:
        options.nets, options.images, options.every, options.steps = options.nets[:1], [2000], [1], [8]
    torch.set_num_threads(options.threads)
    options.runs.mkdir(parents=True, exist_ok=True)
    data = load_data(str(options.data), image_size=32, holdout=10_000)
    records = []
    for name in options.nets:
        torch.manual_seed(0)
        bench = Bench(name, NETS[name](), data, options)
        for count, every, most in zip(options.images, options.every, options.steps, strict=True):
            records.append(bench.run(count, every, most) | {"provenance": provenance()})
            _keep(records)
    worst = {
        "speedup": min(record["speedup"] for record in records),
        "same_steps": min(record["same_steps"] for record in records),
        "accuracy_gap": max((record["accuracy_gap"] for record in records if "accuracy_gap" in record), default=None),
        "speedup_over_recalibration": min(record["speedup_over_recalibration"] for record in records),
    }
    print(json.dumps(worst))


if __name__ == "__main__":
    main()
