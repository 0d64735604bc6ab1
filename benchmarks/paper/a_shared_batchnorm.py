"""Figure a: errors over epochs of an S-Net with private BatchNorm and of the same net with shared BatchNorm.

    python benchmarks/paper/a_shared_batchnorm.py

Fashion-MNIST, switches 0.25, 0.5, 0.75 and 1.0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import common
from common import SMALL, SWITCHES, Lab, spread, table

KINDS = {"private": "private BatchNorm", "shared": "shared BatchNorm"}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    lab = Lab(SMALL, options)
    curves: dict[str, Any] = {
        kind: [lab.s_net(seed, private=kind == "private")[1]["epochs"] for seed in options.seeds] for kind in KINDS
    }
    return {"curves": curves, **lab.about()}


def draw(record: dict[str, Any], picture: Callable[..., Any]) -> str:
    shown = ("0.25", "1")

    def plot(axes: Any) -> None:
        for place, switch in zip(axes, shown, strict=True):
            for colour, (kind, label) in zip(("C0", "C3"), KINDS.items(), strict=True):
                epochs = record["curves"][kind][0]
                for part, style in (("train", "--"), ("test", "-")):
                    errors = [100 * epoch[f"{part}_error"][switch] for epoch in epochs]
                    place.plot(
                        [epoch["epoch"] for epoch in epochs], errors, style, color=colour, label=f"{label}, {part}"
                    )
            place.set(title=f"switch {switch}", xlabel="epoch", ylabel="error, %", ylim=(0, 100))
            place.set_xticks([epoch["epoch"] for epoch in epochs])
        axes[0].legend()

    picture(plot, panels=2)
    rows = []
    for kind, label in KINDS.items():
        for part in ("train", "test"):
            last = [epochs[-1][f"{part}_error"] for epochs in record["curves"][kind]]
            rows.append([label, part, *(spread([errors[f"{ratio:g}"] for errors in last]) for ratio in SWITCHES)])
    return table(["error after the last epoch, %", "images", *(f"switch {ratio:g}" for ratio in SWITCHES)], rows)


if __name__ == "__main__":
    common.main("a", __doc__, measure, draw)
