"""Figure b: an S-Net at each of its switches against nets of these widths trained one by one (I-Nets).

    python benchmarks/paper/b_switches.py

Fashion-MNIST, the S-Net of figure a.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import common
from common import SMALL, SWITCHES, Lab, difference, spread, table


def measure(options: argparse.Namespace) -> dict[str, Any]:
    lab = Lab(SMALL, options)
    rows = [
        {"ratio": ratio, "macs": lab.macs(lab.space.uniform(ratio)), "s-net": [], "i-net": []} for ratio in SWITCHES
    ]
    for seed in options.seeds:
        errors = lab.s_net(seed)[1]["epochs"][-1]["test_error"]
        for row in rows:
            row["s-net"].append(1 - errors[f"{row['ratio']:g}"])
            row["i-net"].append(lab.i_net(row["ratio"], seed)[1])
    return {"rows": rows, **lab.about()}


def draw(record: dict[str, Any], picture: Callable[..., Any]) -> str:
    rows = record["rows"]

    def plot(axes: Any) -> None:
        for name, label in (("i-net", "I-Nets, one by one"), ("s-net", "S-Net, one set of weights")):
            means = [100 * sum(row[name]) / len(row[name]) for row in rows]
            axes.plot([row["ratio"] for row in rows], means, "o-", label=label)
        axes.set(xlabel="width", ylabel="test accuracy, %")
        axes.legend()

    picture(plot)
    cells = []
    for row in rows:
        gains = [shared - alone for shared, alone in zip(row["s-net"], row["i-net"], strict=True)]
        cells.append(
            [
                f"{row['ratio']:g}",
                f"{row['macs'] / 1e3:.0f}K",
                spread(row["i-net"]),
                spread(row["s-net"]),
                difference(gains),
            ]
        )
    return table(["switch", "MACs", "I-Net, %", "S-Net, %", "S-Net - I-Net"], cells)


if __name__ == "__main__":
    common.main("b", __doc__, measure, draw)
