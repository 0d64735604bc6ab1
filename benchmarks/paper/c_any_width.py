"""Figure c: a US-Net over the whole range of widths, beside the S-Net and I-Nets, which exist at four of them.

    python benchmarks/paper/c_any_width.py

Fashion-MNIST. The S-Net is cut to the widths between its switches too, from the next wider switch, recalibrated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import common
import torch
from common import CALIBRATION, SMALL, SWITCHES, Lab, spread, table

from autoslim import SwitchableNet, evaluate, extract, recalibrate_batchnorm, trace

RATIOS = tuple(step / 16 for step in range(4, 17))
SYSTEMS = {"us-net": "US-Net", "s-net": "S-Net", "i-net": "I-Nets"}


def between(lab: Lab, net: SwitchableNet, ratio: float) -> float:
    """Accuracy of an S-Net at a width it was not trained for."""
    wider = net.subnet(min(switch for switch in SWITCHES if switch > ratio))
    cut = extract(wider, trace(wider, torch.zeros(1, *lab.data.image_shape)), lab.space.uniform(ratio))
    recalibrate_batchnorm(cut, lab.seen(CALIBRATION))
    return evaluate(cut, lab.test)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    lab = Lab(SMALL, options)
    rows = [
        {"ratio": ratio, "macs": lab.macs(lab.space.uniform(ratio)), **{name: [] for name in SYSTEMS}}
        for ratio in RATIOS
    ]
    for seed in options.seeds:
        (us_net, _), (s_net, curve) = lab.us_net(0.25, seed), lab.s_net(seed)
        for row in rows:
            ratio = row["ratio"]
            row["us-net"].append(lab.accuracy(us_net, lab.space.uniform(ratio)))
            if ratio in SWITCHES:
                row["s-net"].append(1 - curve["epochs"][-1]["test_error"][f"{ratio:g}"])
                row["i-net"].append(lab.i_net(ratio, seed)[1])
            else:
                row["s-net"].append(between(lab, s_net, ratio))
    return {"rows": rows, **lab.about()}


def draw(record: dict[str, Any], picture: Callable[..., Any]) -> str:
    rows = record["rows"]

    def plot(axes: Any) -> None:
        for (name, label), style in zip(SYSTEMS.items(), ("o-", "s--", "^"), strict=True):
            points = [(row["macs"] / 1e6, 100 * sum(row[name]) / len(row[name])) for row in rows if row[name]]
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=5)
        axes.set(xlabel="million MACs", ylabel="test accuracy, %")
        axes.legend()

    picture(plot)
    cells = [
        [
            f"{row['ratio']:g}",
            f"{row['macs'] / 1e3:.0f}K",
            *(spread(row[name]) if row[name] else "" for name in SYSTEMS),
        ]
        for row in rows
    ]
    return table(["width", "MACs", *(f"{label}, %" for label in SYSTEMS.values())], cells)


if __name__ == "__main__":
    common.main("c", __doc__, measure, draw)
