"""Figure e: how many nets a sandwich step needs, and what distillation gives.

    python benchmarks/paper/e_sandwich.py

Fashion-MNIST, US-Nets for ratios from 0.25 to 1; n = 2 are the widest and the narrowest net alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import common
from common import SMALL, Lab, spread, table, us_net_name

VARIANTS = {
    "n = 4": (4, True),
    "n = 4, no distillation": (4, False),
    "n = 2": (2, True),
    "n = 3": (3, True),
    "n = 5": (5, True),
}
RATIOS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    lab = Lab(SMALL, options)
    rows = []
    for name, (n, distill) in VARIANTS.items():
        if options.finished and not all(lab.is_trained(us_net_name(0.25, seed, n, distill)) for seed in options.seeds):
            continue
        nets = [lab.us_net(0.25, seed, n, distill) for seed in options.seeds]
        accuracies = {
            f"{ratio:g}": [lab.accuracy(net, lab.space.uniform(ratio)) for net, _ in nets] for ratio in RATIOS
        }
        rows.append({"name": name, "accuracy": accuracies, "seconds": [record["seconds"] for _, record in nets]})
    return {"rows": rows, **lab.about()}


def draw(record: dict[str, Any], picture: Callable[..., Any]) -> str:
    def plot(axes: Any) -> None:
        for row in record["rows"]:
            means = [100 * sum(values) / len(values) for values in row["accuracy"].values()]
            style = "s--" if "no " in row["name"] else "o-"
            axes.plot(RATIOS, means, style, label=row["name"], markersize=4)
        axes.set(xlabel="width", ylabel="test accuracy, %")
        axes.legend()

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
