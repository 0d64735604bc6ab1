"""What a sandwich step costs beyond the convolutions: time, memory, what the time goes to, and whether data would wait.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/bench_train.py --profile     # everything; about 25 minutes of one idle core, resumes
    python benchmarks/bench_train.py --quick              # MobileNetV2 at 64 px, few rounds: a minute or two
    python benchmarks/bench_train.py --fresh ...          # forget what results/train.json holds
    python benchmarks/bench_train.py --precisions fp32 --draws 2 --rounds 3 --batch 16     # where there is more time

Time: one process, one batch. A sandwich step (four nets) against its four nets extracted, each trained as a plain module, in turn, in
an order that alternates; the ratio of a round is taken within it, and medians over rounds. Nets of several draws of widths; each draw warms
up first, as compiled kernels are cached by shape. `ratio` compares forward and backward passes alone: a sandwich makes one optimizer step where
four plain nets make four, which would flatter it. `ratio_with_optimizer` has these steps in it, one against four. With one thread
the clock is the CPU time of the process (`time.process_time`), which other programs on the machine move least; with several it is wall time.
Memory: the peak of a sandwich step against a plain step of the full net, each in a process of its own: of tensors, and of the process, which
has oneDNN's kernels in it (bench_memory.py says how). Loader: images per
second of `Batches` with flips and resized crops against those of the step: from memory, and streamed from a folder of JPEGs written for it, by
0, 1 ... worker processes (wall time). --profile: torch.profiler's shares of CPU time in convolutions and matrix products, in normalisation and
activations, and in everything else, for a sandwich step and its plain nets. Written to benchmarks/results/train.json case by case; a case that is
there is not measured again. The last line is one JSON object with the worst ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")  # as the command line does

import torch
import torchvision
from torch import nn
from torch.profiler import ProfilerActivity, profile

from autoslim import Recipe, Supernet, extract, sandwich_backward, trace
from autoslim.data import Batches, ImageSet, load_data
from autoslim.files import read_json, write_json
from autoslim.losses import soft_cross_entropy
from autoslim.run import provenance
from autoslim.train import make_optimizer
from bench_memory import peak

RESULTS = Path(__file__).parent / "results" / "train.json"
NETS = ("mobilenet_v2", "resnet50")
# images per batch by size: with more, what a step costs beyond its nets is less of it
BATCHES = {64: 32, 128: 16, 224: 8}
FOLDER_IMAGES = 384  # JPEGs of twice the size of a step's images
KINDS = {
    "convolutions and matrix products": ("conv", "mm", "linear", "matmul", "mkldnn", "gemm", "onednn"),
    "normalisation": ("batch_norm", "native_batch"),
    "activations, sums, pooling": (
        "relu",
        "hardtanh",
        "threshold",
        "clamp",
        "pool",
        "aten::add",
        "mean",
        "softmax",
        "dropout",
    ),
}


class Steps:
    """A sandwich step and the training of its four nets as plain modules, at the same widths, in pieces."""

    def __init__(
        self, supernet: Supernet, images: torch.Tensor, targets: torch.Tensor, draw: int, precision: str
    ) -> None:
        space, self.loss = supernet.space, nn.CrossEntropyLoss()
        rng = random.Random(draw)
        widths = [space.full(), space.smallest(), space.sample(rng), space.sample(rng)]
        self.supernet, self.images, self.targets, self.draw = supernet, images, targets, draw
        self.nets = [extract(supernet.model, space, each).train() for each in widths]
        self.optimizers = {
            "sandwich": [make_optimizer(supernet, Recipe())],
            "plain": [make_optimizer(net, Recipe()) for net in self.nets],
        }
        self.autocast = {"device_type": "cpu", "dtype": torch.bfloat16, "enabled": precision == "bf16"}

    def sandwich(self) -> None:
        with torch.autocast(**self.autocast):
            rng = random.Random(self.draw)
            sandwich_backward(self.supernet, self.images, self.targets, loss=self.loss, rng=rng)

    def plain(self) -> None:
        lesson = None
        for net in self.nets:
            with torch.autocast(**self.autocast):
                output = net(self.images)
                value = self.loss(output, self.targets) if lesson is None else soft_cross_entropy(output, lesson)
                value.backward()
            lesson = output.detach() if lesson is None else lesson

    def optimize(self, kind: str) -> None:
        for optimizer in self.optimizers[kind]:
            optimizer.step()
        for optimizer in self.optimizers[kind]:
            optimizer.zero_grad(set_to_none=True)

    def run(self, kind: str) -> None:
        getattr(self, kind)()


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    run()
    return clock() - started


def clock_of(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


def compare(
    name: str,
    size: int,
    precision: str,
    batch: int,
    *,
    draws: int,
    rounds: int,
    profiled: bool,
    clock: Callable[[], float],
) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    supernet = Supernet(model, trace(model, torch.zeros(1, 3, size, size)).with_choices()).train()
    images, targets = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    passes: dict[str, list[float]] = {"sandwich": [], "plain": []}
    optimizing: dict[str, list[float]] = {"sandwich": [], "plain": []}
    shares: dict[str, Any] = {}
    for draw in range(draws):
        both = Steps(supernet, images, targets, draw, precision)
        for kind in passes:
            both.run(kind)
            both.optimize(kind)
        for number in range(rounds):
            for kind in sorted(passes, reverse=bool(number % 2)):
                passes[kind].append(seconds(partial(both.run, kind), clock))
                optimizing[kind].append(seconds(partial(both.optimize, kind), clock))
        if profiled and draw == 0:
            shares = {kind: shares_of(both, kind) for kind in passes}
    ratio = median_ratio(passes["sandwich"], passes["plain"])
    whole = {kind: [a + b for a, b in zip(passes[kind], optimizing[kind], strict=True)] for kind in passes}
    medians = {kind: statistics.median(times) for kind, times in passes.items()}
    print(
        f"{name} {size} px {precision}: sandwich {medians['sandwich']:.3f} s, four plain nets {medians['plain']:.3f} s, "
        f"ratio {ratio:.3f}, with optimizer steps {median_ratio(whole['sandwich'], whole['plain']):.3f}",
        flush=True,
    )
    for kind, found in shares.items():
        print(f"  {kind}: " + ", ".join(f"{what} {share:.1%}" for what, share in found.items()), flush=True)
    return {
        "ratio": ratio,
        "ratio_with_optimizer": median_ratio(whole["sandwich"], whole["plain"]),
        "seconds": passes,
        "optimizer_seconds": optimizing,
        **({"profile": shares} if shares else {}),
    }


def median_ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(first, second, strict=True))


def shares_of(both: Steps, kind: str) -> dict[str, float]:
    """Shares of the time of one step, by what its operators do; "everything else" holds ours, Python's and autograd's."""
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        both.run(kind)
        both.optimize(kind)
    total = time.perf_counter() - started
    found = dict.fromkeys(KINDS, 0.0)
    operators = 0.0
    for event in profiled.key_averages():
        spent = event.self_cpu_time_total / 1e6
        operators += spent
        for what, parts in KINDS.items():
            if any(part in event.key.lower() for part in parts):
                found[what] += spent
                break
    total = max(total, operators)
    shares = {what: spent / total for what, spent in found.items()}
    return shares | {"everything else": 1 - sum(shares.values())}


# --- whether data would wait ---


def loader(size: int, batch: int, workers: list[int]) -> dict[str, Any]:
    """Images per second that are loaded and augmented: from memory, and from a folder of JPEGs by so many workers."""
    pixels = torch.randint(0, 256, (8 * batch, 3, size, size), dtype=torch.uint8)
    found = {"memory": rate(ImageSet(pixels, torch.zeros(8 * batch).long()), batch, 0)}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), 2 * size)
        data = load_data(folder, image_size=size, memory_gb=0, holdout=0.1).train
        for count in workers:
            found[f"folder, {count} workers"] = rate(data, batch, count)
    print(f"loader {size} px: " + ", ".join(f"{name} {each:.0f} images/s" for name, each in found.items()), flush=True)
    return {"images_per_second": found}


def rate(data: Any, batch: int, workers: int) -> float:
    options: dict[str, Any] = {"augment": "resized-crop,flip", "shuffle": True, "workers": workers}
    batches = Batches(data, batch, mean=[0.5] * 3, std=[0.2] * 3, **options)
    list(batches)  # workers start, files are read
    times = [seconds(lambda: list(batches)) for _ in range(3)]
    batches.close()
    return len(data) / statistics.median(times)


def write_images(folder: Path, side: int) -> None:
    """JPEGs as large as photographs are at that size: smooth shapes with some noise."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for number in range(FOLDER_IMAGES):
        coarse = torch.rand(1, 3, 8, 8, generator=generator)
        image = nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")[0] * 255
        image = (image + 12 * torch.randn(3, side, side, generator=generator)).clamp(0, 255).byte()
        path = folder / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, quality=90)


def memory(name: str, size: int, precision: str, batch: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for of in ("tensors", "process"):
        peaks = {kind: peak(name, kind, batch, size, precision, of) for kind in ("plain", "sandwich")}
        found[of] = {"mib": peaks, "ratio": peaks["sandwich"] / peaks["plain"]}
    ratios = ", ".join(f"{of} {each['ratio']:.3f}" for of, each in found.items())
    print(f"{name} {size} px {precision}, batch {batch}: memory ratios: {ratios}", flush=True)
    return found


# --- the record ---


class Record:
    """What was measured, written after each case; cases that are there are left alone."""

    def __init__(self, path: Path, about: dict[str, Any], fresh: bool) -> None:
        self.path, self.about = path, about
        known = read_json(path) if path.exists() and not fresh else {}
        same = all(known.get(key) == value for key, value in about.items())
        self.known: dict[str, Any] = known if same else {}
        self.known |= {"time": {}, "memory": {}, "loader": {}} if not self.known else {}

    def case(self, part: str, key: str, measure: Callable[[], dict[str, Any]], **facts: Any) -> None:
        if key in self.known[part]:
            return
        started = time.process_time()
        found = measure()
        about = {
            "cpu_seconds": time.process_time() - started,
            "load": os.getloadavg(),
            "commit": provenance()["commit"],
        }
        case = {**facts, **found, **about}
        self.known[part][key] = case
        self.known |= {**self.about, **provenance()}
        write_json(self.path, self.known)

    def worst(self) -> dict[str, float]:
        times, loaders = self.known["time"].values(), self.known["loader"]
        steps = {
            key: each["batch"] / (statistics.median(each["seconds"]["sandwich"]))
            for key, each in self.known["time"].items()
        }
        shares = {
            name: max(
                steps[key] / loaders[str(each["size"])]["images_per_second"][name]
                for key, each in self.known["time"].items()
                if str(each["size"]) in loaders
            )
            for name in next(iter(loaders.values()))["images_per_second"]
        }
        return {
            "time_ratio": max(each["ratio"] for each in times),
            "time_ratio_with_optimizer": max(each["ratio_with_optimizer"] for each in times),
            **{
                f"memory_ratio, {of}": max(each[of]["ratio"] for each in self.known["memory"].values())
                for of in ("tensors", "process")
            },
            **{f"loader_share, {name}": share for name, share in shares.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured")
    parser.add_argument("--profile", action="store_true", help="what the time goes to, by torch.profiler")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=2, help="of widths")
    parser.add_argument("--batch", type=int, help="images in a batch, for all sizes")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.nets, options.sizes, options.draws, options.workers = ["mobilenet_v2"], [64], 1, [0, 1]
    clock = clock_of(options.threads)
    about = {
        "quick": options.quick,
        "threads": options.threads,
        "clock": clock.__name__,
        "draws": options.draws,
        "rounds": options.rounds,
        "profiled": options.profile,
    }
    record = Record(options.out, about, options.fresh)
    run: dict[str, Any] = {
        "draws": options.draws,
        "rounds": options.rounds,
        "profiled": options.profile,
        "clock": clock,
    }
    cases = [(net, size, each) for size in options.sizes for net in options.nets for each in options.precisions]
    for net, size, each in cases:
        batch = options.batch or BATCHES[size]
        facts = {"net": net, "size": size, "precision": each, "batch": batch}
        key = f"{net} {size} {each} batch {batch}"
        record.case("time", key, partial(compare, net, size, each, batch, **run), **facts)
        record.case("memory", key, partial(memory, net, size, each, batch), **facts)
    for size in options.sizes:
        batch = options.batch or BATCHES[size]
        record.case("loader", str(size), partial(loader, size, batch, options.workers), size=size, batch=batch)
    print(json.dumps({key: round(value, 4) for key, value in record.worst().items()} | {"quick": options.quick}))


if __name__ == "__main__":
    main()
