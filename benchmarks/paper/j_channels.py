"""Figure j: what greedy slimming found, layer by layer.

    python benchmarks/paper/j_channels.py --seeds 0 1 2

CIFAR-10, the nets of figure h.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import common
from common import EQUAL, Lab, table
from h_autoslim import found, supernet_of

KINDS = {"found": "judged by the loss", "accuracy": "judged by accuracy"}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    lab = Lab(EQUAL, options)
    nets = []
    for seed in options.seeds:
        for kind in KINDS:
            if options.finished and not lab.is_trained(f"search-{kind}-{seed}"):
                continue
            for share, widths in found(lab, supernet_of(lab, kind, seed), kind, seed).items():
                net = {"kind": kind, "seed": seed, "budget": f"{share:.0%}", "widths": list(widths.values())}
                nets.append(net | {"macs": lab.macs(widths)})
    full = list(lab.space.full().values())
    return {"nets": nets, "full": full, "smallest": list(lab.space.smallest().values()), **lab.about()}


def draw(record: dict[str, Any], picture: Callable[..., Any]) -> str:
    budgets = list(dict.fromkeys(net["budget"] for net in record["nets"]))
    layers = range(1, len(record["full"]) + 1)

    def plot(axes: Any) -> None:
        for place, (kind, label) in zip(axes, KINDS.items(), strict=True):
            place.plot(layers, record["full"], ":", color="grey", label="full net")
            for index, budget in enumerate(budgets):
                chosen = [net["widths"] for net in record["nets"] if (net["budget"], net["kind"]) == (budget, kind)]
                for widths in chosen:
                    place.plot(layers, widths, color=f"C{index}", alpha=0.35, linewidth=1)
                if not chosen:
                    continue
                means = [sum(column) / len(column) for column in zip(*chosen, strict=True)]
                place.plot(layers, means, "o-", color=f"C{index}", label=f"{budget} of the MACs")
            place.set(
                title=label,
                xlabel="layer",
                ylabel="channels",
                ylim=(0, None),
            )
        axes[0].legend(loc="lower right", fontsize=7)

    picture(plot, panels=2)
    rows = [
        [label, net["budget"], str(net["seed"]), *map(str, net["widths"]), f"{net['macs'] / 1e6:.2f}M"]
        for kind, label in KINDS.items()
        for budget in budgets
        for net in record["nets"]
        if (net["budget"], net["kind"]) == (budget, kind)
    ]
    return table(["rule", "budget", "seed", *(f"layer {layer}" for layer in layers), "MACs"], rows)


if __name__ == "__main__":
    common.main("j", __doc__, measure, draw)
