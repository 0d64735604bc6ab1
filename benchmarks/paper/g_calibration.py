"""Figure g: how many images BatchNorm statistics need.

    python benchmarks/paper/g_calibration.py

Fashion-MNIST, the US-Net of figure c. Without images the narrow nets run on slices of the widest net's statistics. Each
number of images is drawn three times.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import common
from common import SMALL, Lab, spread, table

from autoslim import evaluate, extract, recalibrate_batchnorm

COUNTS = (0, 8, 32, 125, 500, 1000, 2000, 4000)
RATIOS = (0.25, 0.5, 0.75, 1.0)
DRAWS = 3


def measure(options: argparse.Namespace) -> dict[str, Any]:
    lab = Lab(SMALL, options)
    us_net = lab.us_net(0.25, options.seeds[0])[0]
    rows = []
    for count in COUNTS:
        for ratio in RATIOS:
            accuracies = []
            for draw_seed in range(DRAWS if count else 1):
                net = extract(us_net.model, lab.space, lab.space.uniform(ratio))
                if count:
                    recalibrate_batchnorm(net, lab.seen(count, draw_seed))
                accuracies.append(evaluate(net, lab.test))
            rows.append({"images": count, "ratio": ratio, "accuracy": accuracies})
    return {"rows": rows, **lab.about()}


def draw(record: dict[str, Any], picture: Callable[..., Any]) -> str:
    accuracies = {(row["images"], row["ratio"]): row["accuracy"] for row in record["rows"]}

    def plot(axes: Any) -> None:
        for ratio in RATIOS:
            means = [100 * sum(accuracies[count, ratio]) / len(accuracies[count, ratio]) for count in COUNTS]
            axes.plot(range(len(COUNTS)), means, "o-", label=f"width {ratio:g}", markersize=4)
        axes.set_xticks(range(len(COUNTS)), COUNTS)
        axes.set(xlabel="images for calibration", ylabel="test accuracy, %")
        axes.legend()

    picture(plot)
    rows = [[f"{count:,}", *(spread(accuracies[count, ratio]) for ratio in RATIOS)] for count in COUNTS]
    return table(["images", *(f"width {ratio:g}, %" for ratio in RATIOS)], rows)


if __name__ == "__main__":
    common.main("g", __doc__, measure, draw)
