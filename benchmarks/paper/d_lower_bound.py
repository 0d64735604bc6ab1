"""Figure d: what the lower bound of the width range costs the whole range.

    python benchmarks/paper/d_lower_bound.py

Fashion-MNIST, US-Nets for ratios from 0.05, 0.15, 0.25 and 0.35 to 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import common
from common import SMALL, Lab, spread, table

BOUNDS = (0.05, 0.15, 0.25, 0.35)
RATIOS = (0.05, 0.15, 0.25, 0.35, 0.5, 0.625, 0.75, 0.875, 1.0)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    lab = Lab(SMALL, options)
    rows = [{"bound": bound, "ratio": ratio, "accuracy": []} for bound in BOUNDS for ratio in RATIOS if ratio >= bound]
    for seed in options.seeds:
        nets = {bound: lab.us_net(bound, seed)[0] for bound in BOUNDS}
        for row in rows:
            row["accuracy"].append(lab.accuracy(nets[row["bound"]], lab.space.uniform(row["ratio"])))
    channels = {f"{bound:g}": list(lab.space.uniform(bound).values()) for bound in BOUNDS}
    return {"rows": rows, "channels": channels, **lab.about()}


def draw(record: dict[str, Any], picture: Callable[..., Any]) -> str:
    accuracies = {(row["bound"], row["ratio"]): row["accuracy"] for row in record["rows"]}

    def plot(axes: Any) -> None:
        for bound in BOUNDS:
            points = [(r, 100 * sum(a) / len(a)) for (b, r), a in accuracies.items() if b == bound]
            axes.plot(*zip(*points, strict=True), "o-", label=f"from {bound:g}", markersize=4)
        axes.set(xlabel="width (below 70 %: see the table)", ylabel="test accuracy, %", ylim=(70, None))
        axes.legend()

    picture(plot)
    rows = [
        [
            f"{bound:g}",
            "-".join(map(str, record["channels"][f"{bound:g}"])),
            *(spread(accuracies[bound, ratio]) if ratio >= bound else "" for ratio in RATIOS),
        ]
        for bound in BOUNDS
    ]
    return table(["range from", "channels of the narrowest", *(f"{ratio:g}" for ratio in RATIOS)], rows)


if __name__ == "__main__":
    common.main("d", __doc__, measure, draw)
