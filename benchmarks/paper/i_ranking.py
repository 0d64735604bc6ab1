"""Figure i: does the supernet rank nets as separate training does?

    python benchmarks/paper/i_ranking.py --seeds 0 1

CIFAR-10, the first supernet of figure h and the one trained with distillation: 12 random nets of similar cost and 12 of different cost, each trained from
scratch by a shorter recipe, by every seed.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import common
from common import EQUAL, Lab, say, table
from ranking import kendall, spearman

from autoslim import Judge, MacCost, Widths

SIMILAR = (0.25,) * 12  # of the MACs of the full net
DIFFERENT = tuple(0.1 * 6 ** (index / 11) for index in range(12))  # 10 to 60 %
EPOCHS = 2


def draw_widths(lab: Lab, shares: Sequence[float], seed: int) -> list[Widths]:
    """Random nets that cost at most these shares of the full net's MACs: drawn, then cut at random until they do."""
    rng, cost, chosen = random.Random(seed), MacCost(lab.space), list[Widths]()
    for share in shares:
        limit = share * cost(lab.space.full())
        while True:
            widths = lab.space.sample(rng)
            while cost(widths) > limit:
                widths = lab.space.narrowed(widths, rng.choice(list(widths))) or widths
            if (cost(widths) > 0.94 * limit or lab.options.tiny) and widths not in chosen:
                break
        chosen.append(widths)
    return chosen


def measure(options: argparse.Namespace) -> dict[str, Any]:
    lab = Lab(EQUAL, options)
    supernets = {
        "supernet": lab.supernet("supernet-0", 0, distill=False)[0],
        "distilled supernet": lab.supernet("supernet-distilled-0", 0)[0],
    }
    few = lab.held_out[: max(1, len(lab.held_out) // 5)]
    judges = {
        f"{score}, {sum(len(labels) for _, labels in images):,} held-out images, {name}": Judge(supernet, images, score)
        for name, supernet in supernets.items()
        for score in ("loss", "accuracy")
        for images in (few, lab.held_out)
    }
    rows = []
    for kind, shares in (("similar", SIMILAR), ("different", DIFFERENT)):
        for index, widths in enumerate(draw_widths(lab, shares, 1 + (kind == "different"))):
            alone = [lab.plain(f"random-{kind}-{index}-{seed}", widths, seed, EPOCHS)[1] for seed in options.seeds]
            row = {
                "kind": kind,
                "widths": list(widths.values()),
                "macs": lab.macs(widths),
                "params": lab.params(widths),
            }
            row |= {"shared": lab.accuracy(supernets["supernet"], widths), "alone": alone}
            row["judged"] = {name: judge(widths) for name, judge in judges.items()}
            say(f"{kind} {index}: {row}")
            rows.append(row)
    return {"rows": rows, "full": lab.macs(lab.every.full()), **lab.about()}


def draw(record: dict[str, Any], picture: Callable[..., Any]) -> str:
    rows = record["rows"]
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("similar", "different")}

    def plot(axes: Any) -> None:
        for place, (kind, nets) in zip(axes, kinds.items(), strict=True):
            place.plot([100 * net["shared"] for net in nets], [100 * mean(net["alone"]) for net in nets], "o")
            place.set(xlabel="accuracy in the supernet (test images), %", ylabel="accuracy after separate training, %")
            place.set_title(f"12 nets of {kind} cost")

    picture(plot, panels=2)
    cells = []
    for kind, nets in (*kinds.items(), ("all", rows)):
        alone = [mean(net["alone"]) for net in nets]
        for name, values in (
            ("accuracy in the supernet, test images", [net["shared"] for net in nets]),
            *((name, [net["judged"][name] for net in nets]) for name in nets[0]["judged"]),
            ("MACs", [net["macs"] for net in nets]),
            ("parameters", [net["params"] for net in nets]),
            *([("another training", [net["alone"][1] for net in nets])] if len(nets[0]["alone"]) > 1 else []),
        ):
            target = [net["alone"][0] for net in nets] if name == "another training" else alone
            cells.append([kind, name, f"{spearman(values, target):.2f}", f"{kendall(values, target):.2f}"])
    return table(["nets", "separate training against", "Spearman", "Kendall"], cells)


if __name__ == "__main__":
    common.main("i", __doc__, measure, draw)
