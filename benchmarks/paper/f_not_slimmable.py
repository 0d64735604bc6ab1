"""Figure f: a net that was trained normally, cut to narrower widths: not slimmable.

    python benchmarks/paper/f_not_slimmable.py

Fashion-MNIST, the I-Net at full width of figure b, cut as it is, and with BatchNorm recalibrated; beside it the US-Net of
figure c.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import common
from common import CALIBRATION, SMALL, Lab, spread, table

from autoslim import Supernet, evaluate

RATIOS = (1.0, 0.9375, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
KINDS = {"cut": "I-Net, cut", "recalibrated": "I-Net, cut and recalibrated", "us-net": "US-Net, recalibrated"}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    lab = Lab(SMALL, options)
    rows = [{"ratio": ratio, **{kind: [] for kind in KINDS}} for ratio in RATIOS]
    for seed in options.seeds:
        plain, us_net = Supernet(lab.i_net(1.0, seed)[0], lab.space), lab.us_net(0.25, seed)[0]
        for row in rows:
            widths = lab.space.uniform(row["ratio"])
            row["cut"].append(evaluate(lab.calibrated(plain, widths, images=0), lab.test))
            row["recalibrated"].append(evaluate(lab.calibrated(plain, widths, images=CALIBRATION), lab.test))
            row["us-net"].append(lab.accuracy(us_net, widths))
    return {"rows": rows, **lab.about()}


def draw(record: dict[str, Any], picture: Callable[..., Any]) -> str:
    rows = record["rows"]

    def plot(axes: Any) -> None:
        for kind, label in KINDS.items():
            means = [100 * sum(row[kind]) / len(row[kind]) for row in rows]
            axes.plot([row["ratio"] for row in rows], means, "o-", label=label, markersize=4)
        axes.axhline(10, color="grey", linestyle=":", label="chance")
        axes.set(xlabel="width", ylabel="test accuracy, %", ylim=(0, 100))
        axes.legend()

    picture(plot)
    cells = [[f"{row['ratio']:g}", *(spread(row[kind]) for kind in KINDS)] for row in rows]
    return table(["width", *(f"{label}, %" for label in KINDS.values())], cells)


if __name__ == "__main__":
    common.main("f", __doc__, measure, draw)
