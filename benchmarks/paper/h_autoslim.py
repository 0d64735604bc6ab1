"""Figure h: nets found by AutoSlim at 50, 25 and 12 % of the MACs against uniform widths of equal MACs.

    python benchmarks/paper/h_autoslim.py --seeds 0 1 2

CIFAR-10. Per seed one supernet of independent widths, one greedy pass on images held out of the training part, and six
nets trained from scratch by one recipe. The search may use either rule; the paper's looks at the score alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import common
from common import EQUAL, Lab, say

from autoslim import MacCost, Supernet, Widths, greedy_slim, uniform_like, widths_within

BUDGETS = (0.5, 0.25, 0.12)
RULE = "score"


def found(lab: Lab, supernet: Supernet, seed: int, rule: str = RULE) -> dict[str, Widths]:
    """The nets of one greedy pass, by budget; the path is kept."""
    cost, full = MacCost(lab.space), lab.space.full()

    def search() -> list[dict[str, Any]]:
        steps = greedy_slim(lab.space, lab.judge(supernet), cost, [min(BUDGETS) * cost(full)], rule=rule)
        path = []
        for step in steps:
            path.append({"group": step.group, "widths": dict(step.widths), "cost": step.cost, "score": step.score})
            if len(path) % 10 == 0:
                say(f"search {seed}, {rule}: step {len(path)}, {step.cost / cost(full):.1%} of the MACs")
        return path

    path = lab.remembered(f"search-{rule}-{seed}", search)
    widths = [Widths(step["widths"]) for step in path]
    return {
        f"{budget:.0%}": next(each for each in widths if cost(each) <= budget * cost(full)) for budget in BUDGETS
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    lab = Lab(EQUAL, options)
    rows = []
    for seed in options.seeds:
        supernet, record = lab.supernet(f"supernet-{seed}", seed)
        widest = lab.accuracy(supernet, lab.space.full())
        say(f"supernet {seed}: {widest:.2%} at full width")
        for budget, widths in found(lab, supernet, seed).items():
            ratio, uniform = uniform_like(lab.every, lab.macs, lab.macs(widths))
            row = {"seed": seed, "budget": budget, "ratio": ratio, "widest": widest, "nets": {}}
            for kind, net in (("found", widths), ("uniform", uniform)):
                shared = lab.accuracy(supernet, net)
                accuracy = lab.plain(f"{kind}-{budget}-{seed}", net, seed)[1]
                row["nets"][kind] = {
                    "widths": list(net.values()), "macs": lab.macs(net), "params": lab.params(net),
                    "shared": shared, "retrained": accuracy,
                }  # fmt: skip
                say(f"{kind} {budget} {seed}: {list(net.values())}, {shared:.2%} shared, {accuracy:.2%} retrained")
            rows.append(row)
    return {"rows": rows, "full": lab.macs(lab.every.full()), **lab.about()}


def draw(record: dict[str, Any], picture: Callable[..., Any]) -> str:
    return ""


if __name__ == "__main__":
    common.main("h", __doc__, measure, draw)
