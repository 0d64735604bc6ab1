"""Figure e: how many nets a sandwich step needs, and what distillation gives.

    python benchmarks/paper/e_sandwich.py

Fashion-MNIST, US-Nets for ratios from 0.25 to 1; n = 2 are the widest and the narrowest net alone. Two of them are
trained four times as long too, for what distillation gives depends on how good the teacher is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import common
from common import SMALL, Lab, spread, table, us_net_name

VARIANTS = {  # nets per step, distillation, how many times as long
    "n = 4": (4, True, 1),
    "n = 4, no distillation": (4, False, 1),
    "n = 2": (2, True, 1),
    "n = 3": (3, True, 1),
    "n = 5": (5, True, 1),
    "n = 4, 4x as long": (4, True, 4),
    "n = 4, no distillation, 4x as long": (4, False, 4),
}
RATIOS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    lab = Lab(SMALL, options)
    rows = []
    for name, (n, distill, times) in VARIANTS.items():
        names = [us_net_name(0.25, seed, n, distill, times) for seed in options.seeds]
        if options.finished and not all(map(lab.is_trained, names)):
            continue
        nets = [lab.us_net(0.25, seed, n, distill, times) for seed in options.seeds]
        accuracies = {
            f"{ratio:g}": [lab.accuracy(net, lab.space.uniform(ratio)) for net, _ in nets] for ratio in RATIOS
        }
        rows.append({"name": name, "accuracy": accuracies, "seconds": [record["seconds"] for _, record in nets]})
    return {"rows": rows, **lab.about()}


def draw(record: dict[str, Any], picture: Callable[..., Any]) -> str:
    def plot(axes: Any) -> None:
        for row in record["rows"]:
            means = [100 * sum(values) / len(values) for values in row["accuracy"].values()]
            style = ("s" if "no " in row["name"] else "o") + ("--" if "long" in row["name"] else "-")
            axes.plot(RATIOS, means, style, label=row["name"], markersize=4)
        axes.set(xlabel="width", ylabel="test accuracy, %")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8)

    picture(plot)
    rows = []
    for row in record["rows"]:
        of_seeds = zip(*row["accuracy"].values(), strict=True)
        averages = [sum(values) / len(RATIOS) for values in of_seeds]
        seconds = sum(row["seconds"]) / len(row["seconds"])
        rows.append(
            [
                row["name"],
                *(spread(values) for values in row["accuracy"].values()),
                spread(averages),
                f"{seconds:.0f} s",
            ]
        )
    return table(["step", *(f"{ratio:g}" for ratio in RATIOS), "mean", "training"], rows)


if __name__ == "__main__":
    common.main("e", __doc__, measure, draw)
