"""Figure h: nets found by AutoSlim at 50, 25 and 12 % of the MACs against uniform widths of equal MACs.

    python benchmarks/paper/h_autoslim.py --seeds 0 1 2

CIFAR-10. Per seed a supernet of independent widths, a greedy pass on images held out of the training part by each
rule, and nets trained from scratch by one recipe. A net found costs at most its budget; beside it stand the uniform
net whose MACs are nearest to the budget, and the one nearest to those of the net found. The paper's rule, which looks at the score alone, and exchanges of bins are taken at
25 % only, like nets of a supernet that learned from labels alone. `--finished` draws the nets that are trained already.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import common
from common import EQUAL, Lab, difference, say, spread, table

from autoslim import Judge, MacCost, RacingJudge, Supernet, Widths, exchange_bins, greedy_slim, uniform_like

BUDGETS = (0.5, 0.25, 0.12)
KINDS = {
    "score-per-cost": "AutoSlim, score per cost",
    "hard": "the same, supernet without distillation, judged by accuracy on 5,000 images",
    "exchanged": "score per cost, then exchanges of bins",
    "score": "AutoSlim, score alone",
    "uniform": "uniform width, MACs of the budget",
    "equal": "uniform width, MACs of the net found",
}
# in the order of their training: 25 % is what the claim is about, and wide nets take long
NETS = [
    (0.25, ("score-per-cost", "uniform")),
    (0.25, ("hard",)),
    (0.12, ("score-per-cost", "uniform")),
    (0.25, ("equal",)),
    (0.12, ("equal",)),
    (0.25, ("exchanged",)),
    (0.25, ("score",)),
    (0.5, ("score-per-cost", "uniform")),
]


def found(lab: Lab, supernet: Supernet, seed: int, rule: str, judge: Judge | None = None) -> dict[str, Widths]:
    """The nets of one greedy pass, by budget; the path is kept."""
    cost, full = MacCost(lab.space), lab.space.full()
    name, judge = (rule, lab.judge(supernet)) if judge is None else (f"{rule}-hard", judge)

    def search() -> list[dict[str, Any]]:
        steps = greedy_slim(lab.space, judge, cost, [min(BUDGETS) * cost(full)], rule=rule)
        path = []
        for step in steps:
            path.append({"group": step.group, "widths": dict(step.widths), "cost": step.cost, "score": step.score})
            if len(path) % 10 == 0:
                say(f"search {seed}, {name}: step {len(path)}, {step.cost / cost(full):.1%} of the MACs")
        return path

    path = lab.remembered(f"search-{name}-{seed}", search)
    widths = [Widths(step["widths"]) for step in path]
    return {f"{budget:.0%}": next(each for each in widths if cost(each) <= budget * cost(full)) for budget in BUDGETS}


def exchanged(lab: Lab, supernet: Supernet, seed: int, budget: float) -> Widths:
    """The net found by the score per cost, bettered by exchanges of bins."""
    cost, start = MacCost(lab.space), found(lab, supernet, seed, "score-per-cost")[f"{budget:.0%}"]
    limit = budget * cost(lab.space.full())

    def search() -> list[dict[str, Any]]:
        moves = exchange_bins(lab.space, lab.judge(supernet), cost, start, limit)
        return [{"wider": m.wider, "narrower": m.narrower, "widths": dict(m.widths), "score": m.score} for m in moves]

    moves = lab.remembered(f"exchanges-{budget:.0%}-{seed}", search)
    return Widths(moves[-1]["widths"]) if moves else start


def measure(options: argparse.Namespace) -> dict[str, Any]:
    lab = Lab(EQUAL, options)
    full, rows = lab.macs(lab.every.full()), []
    supernets: dict[int, Supernet] = {}
    order = [(budget, kind, seed) for budget, kinds in NETS for seed in options.seeds for kind in kinds]
    for budget, kind, seed in order:
        name = f"{budget:.0%}"
        if options.finished and not lab.is_trained(f"{kind}-{name}-{seed}"):
            continue
        if seed not in supernets:
            supernets[seed], _ = lab.supernet(f"supernet-{seed}", seed)
        if kind == "uniform":
            widths = uniform_like(lab.every, lab.macs, budget * full)[1]
        elif kind == "equal":
            slim = found(lab, supernets[seed], seed, "score-per-cost")[name]
            widths = uniform_like(lab.every, lab.macs, lab.macs(slim))[1]
        elif kind == "exchanged":
            widths = exchanged(lab, supernets[seed], seed, budget)
        elif kind == "hard":
            shared, _ = lab.supernet(f"supernet-hard-{seed}", seed, distill=False)
            images = list(lab.batches(lab.data.holdout, 1000))
            judge = RacingJudge(shared, images, "accuracy", confidence=1)  # as `Judge`, faster
            widths = found(lab, shared, seed, "score-per-cost", judge)[name]
        else:
            widths = found(lab, supernets[seed], seed, kind)[name]
        row = {"seed": seed, "budget": name, "kind": kind, "widths": list(widths.values())}
        row |= {
            "macs": lab.macs(widths),
            "params": lab.params(widths),
            "shared": lab.accuracy(shared if kind == "hard" else supernets[seed], widths),
        }
        row["alone"] = lab.plain(f"{kind}-{name}-{seed}", widths, seed)[1]
        say(f"seed {seed}, {name}, {kind}: {row['widths']}, {row['shared']:.2%} shared, {row['alone']:.2%} alone")
        rows.append(row)
    widest = {seed: lab.accuracy(supernet, lab.space.full()) for seed, supernet in supernets.items()}
    return {"rows": rows, "full": full, "widest": widest, **lab.about()}


def draw(record: dict[str, Any], picture: Callable[..., Any]) -> str:
    budgets = [f"{budget:.0%}" for budget in BUDGETS]

    def of(budget: str, kind: str, key: str) -> list[float]:
        return [row[key] for row in record["rows"] if (row["budget"], row["kind"]) == (budget, kind)]

    def plot(axes: Any) -> None:
        for kind, label in KINDS.items():
            shown = [budget for budget in budgets if of(budget, kind, "alone")]
            if not shown:
                continue
            accuracies = [[100 * value for value in of(budget, kind, "alone")] for budget in shown]
            bars = [stdev(values) if len(values) > 1 else 0.0 for values in accuracies]
            macs = [mean(of(budget, kind, "macs")) / 1e6 for budget in shown]
            style = "o-" if len(shown) > 1 else "o"
            axes.errorbar(macs, [mean(values) for values in accuracies], bars, fmt=style, capsize=3, label=label)
        axes.set(xlabel="million MACs", ylabel="test accuracy, %")
        axes.legend()

    picture(plot)
    rows = []
    for budget in budgets:
        alone = {kind: dict(zip(of(budget, kind, "seed"), of(budget, kind, "alone"), strict=True)) for kind in KINDS}
        for kind, label in KINDS.items():
            if not alone[kind]:
                continue
            costs = [f"{mean(of(budget, kind, 'macs')) / 1e6:.2f}M", f"{mean(of(budget, kind, 'params')) / 1e3:.0f}K"]
            cells = [budget, label, *costs, spread(of(budget, kind, "shared")), spread([*alone[kind].values()])]
            gains = [
                difference(
                    [accuracy - alone[other][seed] for seed, accuracy in alone[kind].items() if seed in alone[other]]
                )
                for other in ("uniform", "equal")
            ]
            rows.append([*cells, *(gains if kind not in ("uniform", "equal") else ["", ""])])
    head = ["budget", "net", "MACs", "parameters", "shared weights, %", "trained alone, %"]
    return table([*head, "gain by seed, MACs of the budget", "equal MACs"], rows)


if __name__ == "__main__":
    common.main("h", __doc__, measure, draw)
