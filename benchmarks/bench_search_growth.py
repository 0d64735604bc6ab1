"""How the time of a search grows with images, groups and bins: racing against judging every candidate on all images.

    python benchmarks/bench_search_growth.py           # about half an hour of one idle core
    python benchmarks/bench_search_growth.py --draw    # only the figure and the table again

MobileNet v1 0.5x at 32 px, supernet trained briefly on Fashion-MNIST (bench_search.py has the recipe). From 2,000
images, all groups and 8 bins one number at a time is changed; groups are left out by fixing their layers, evenly along
the network. A search walks until half of the MACs that can be saved are saved. Racing is timed as a whole; a candidate
judged on all images by itself is timed once per step, in turn with the race, and its median counted for every candidate
of the walk. With one thread the seconds are those of the process, which other programs move least. Writes
benchmarks/results/search_growth.json, docs/figures/search_growth.svg and the table of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path
from typing import Any

import torch

from autoslim import Judge, MacCost, RacingJudge, zoo
from autoslim.data import ImageData, load_data
from autoslim.files import read_json, write_json, write_whole
from autoslim.run import provenance
from bench_search import DATA, ROOT, Bench

RESULTS = ROOT / "benchmarks" / "results" / "search_growth.json"
FIGURE = ROOT / "docs" / "figures" / "search_growth.svg"
PAGE = ROOT / "docs" / "scaling.md"
BASE = {"images": 2000, "groups": 14, "bins": 8}
VALUES = {"images": (500, 2000, 8000), "groups": (4, 7, 14), "bins": (4, 8, 16)}


def settings() -> list[dict[str, int]]:
    """The base, and one number changed at a time."""
    changed = [BASE | {name: value} for name, values in VALUES.items() for value in values if value != BASE[name]]
    return [BASE, *changed]


def search(data: ImageData, setting: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """One walk: times of the race, and of single candidates by themselves."""
    model = zoo.mobilenet_v1(0.5, num_classes=10, in_channels=1)
    every = Bench("mobilenet_v1", model, data, options, bins=max(VALUES["bins"]), divisor=1).supernet.space.groups
    kept = {round(number * (len(every) - 1) / (setting["groups"] - 1)) for number in range(setting["groups"])}
    fixed = [group for number, group in enumerate(every) if number not in kept]
    bench = Bench("mobilenet_v1", model, data, options, bins=setting["bins"], divisor=1, fixed=fixed)
    space, images = bench.supernet.space, bench.held_out(setting["images"])
    assert len(space.groups) == setting["groups"]
    cost = MacCost(space)
    limit = (cost(space.full()) + cost(space.smallest())) / 2
    racing, single = RacingJudge(bench.supernet, images), Judge(bench.supernet, images)
    widths, seconds, alone, candidates, steps = space.full(), 0.0, list[float](), 0, 0
    while cost(widths) > limit:
        nets = {group: net for group in space.groups if (net := space.narrowed(widths, group)) is not None}
        started = bench.clock()
        found = racing.compare(widths, nets)
        seconds += bench.clock() - started
        started = bench.clock()
        single(list(nets.values())[steps % len(nets)])
        alone.append(bench.clock() - started)
        widths = nets[max(found, key=lambda group: found[group][1])]
        candidates, steps = candidates + len(nets), steps + 1
    times = {"racing": round(seconds, 1), "exhaustive": round(statistics.median(alone) * candidates, 1)}
    return setting | {"steps": steps, "candidates": candidates, "seconds": times}


def draw(records: list[dict[str, Any]]) -> None:
    """The figure, one plot per number that changes, and the table in the docs."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "autoslim"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained", sharey=True)
    for axis, name in zip(axes, VALUES, strict=True):
        rows = sorted((r for r in records if all(r[n] == BASE[n] for n in BASE if n != name)), key=lambda r: r[name])
        for kind, label in (("exhaustive", "every candidate on all images"), ("racing", "racing, with reuse")):
            axis.plot([row[name] for row in rows], [row["seconds"][kind] for row in rows], "o-", label=label)
        axis.set(xscale="log", yscale="log", xlabel=name)
        axis.set_xticks([row[name] for row in rows], [f"{row[name]:,}" for row in rows])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds of a search")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(FIGURE, metadata={"Date": None})
    lines = ["| images | groups | bins | steps | candidates | exhaustive, s | racing, s | ratio |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in records:
        slow, fast = row["seconds"]["exhaustive"], row["seconds"]["racing"]
        cells = [f"{row['images']:,}", *(row[name] for name in ("groups", "bins", "steps", "candidates"))]
        lines.append(
            "| " + " | ".join(str(c) for c in [*cells, f"{slow:.0f}", f"{fast:.0f}", f"{slow / fast:.1f}"]) + " |"
        )
    table = "<!-- growth -->\n\n" + "\n".join(lines) + "\n\n<!-- end -->"
    page = PAGE.read_text()
    assert "<!-- growth -->" in page, f"{PAGE} has no place for the table"
    write_whole(PAGE, re.sub(r"<!-- growth -->.*?<!-- end -->", lambda _: table, page, flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="from the records there are")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--epochs", type=int, default=2, help="of the supernet")
    parser.add_argument("--training-images", type=int, default=20_000, help="for the supernet")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench_search")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.runs.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    if options.draw:
        records = read_json(RESULTS)["records"]
    else:
        data = load_data(str(options.data), image_size=32, holdout=10_000)
        for setting in settings():
            records.append(search(data, setting, options))
            print(records[-1], flush=True)
            write_json(RESULTS, {"provenance": provenance(), "threads": options.threads, "records": records})
    draw(records)


if __name__ == "__main__":
    main()
