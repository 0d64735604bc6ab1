"""Figure h: nets found by AutoSlim at 50, 25 and 12 % of the MACs against uniform widths, trained by the same recipe.

    python benchmarks/paper/h_autoslim.py --seeds 0 1 2

CIFAR-10. Per seed a supernet of independent widths, a greedy pass on held-out images, and nets trained from scratch by
one recipe. The uniform net nearest to a share of the MACs sets the budget: what is found costs at most as much. What
else was tried is trained at 25 % only. `--shares` and `--kinds` train some of them; rows of nets that were trained
elsewhere stay as they are recorded, with where they come from. `--finished` draws the nets that are trained already.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import common
from common import EQUAL, Lab, difference, say, spread, table

from autoslim import MacCost, Supernet, Widths, exchange_bins, greedy_slim, uniform_like
from autoslim.files import read_json

SHARES = (0.5, 0.25, 0.12)
KINDS = {
    "found": "AutoSlim",
    "uniform": "uniform width",
    "found-long": "AutoSlim, trained alone three times as long",
    "uniform-long": "uniform width, trained alone three times as long",
    "exchanged": "the same search, then exchanges of bins",
    "bins": "bins twice as large",
    "bound": "lower bound of an eighth",
    "accuracy": "judged by accuracy",
    "distilled": "supernet with in-place distillation",
    "longer": "supernet trained for twice as long",
    "score": "greedy by the score alone",
}
RIVALS = {"found-long": "uniform-long"}  # what a kind is compared with, if not with "uniform"
# in the order of their training; 25 % is what the claim is about
NETS = [(0.25, ("found", "uniform")), (0.12, ("found", "uniform")), (0.5, ("found", "uniform"))]
TRIED = ("exchanged", "bins", "found-long", "uniform-long", "longer", "bound", "accuracy", "distilled", "score")
NETS += [(0.25, (kind,)) for kind in TRIED]


def lab_of(options: argparse.Namespace, kind: str) -> Lab:
    """The setting that a kind of net is found in."""
    if kind == "bound":
        return Lab(replace(EQUAL, min_ratio=0.125), options)
    return Lab(replace(EQUAL, bins=6, divisor=4), options) if kind == "bins" else Lab(EQUAL, options)


def supernet_of(lab: Lab, kind: str, seed: int) -> Supernet:
    """The supernet that a kind of net is found in: trained by labels alone, for longer, or by distillation as in the paper."""
    if kind == "bound":
        return lab.supernet(f"supernet-bound-{seed}", seed, distill=False)[0]
    if kind == "bins":  # fewer of the widths of the same supernet
        fine = lab_of(lab.options, "found")
        return Supernet(supernet_of(fine, "found", seed).model, lab.space)
    if kind == "distilled":
        return lab.supernet(f"supernet-distilled-{seed}", seed)[0]
    if kind == "longer":
        epochs = 2 * lab.setting.supernet_epochs
        return lab.supernet(f"supernet-longer-{seed}", seed, epochs=epochs, distill=False)[0]
    return lab.supernet(f"supernet-{seed}", seed, distill=False)[0]


def uniform(lab: Lab, share: float) -> Widths:
    """The net of one width ratio whose MACs are nearest to a share of all; its MACs are the budget."""
    return uniform_like(lab.every, lab.macs, share * lab.macs(lab.every.full()))[1]


def found(lab: Lab, supernet: Supernet, kind: str, seed: int) -> dict[float, Widths]:
    """The nets of one greedy pass, by the share of the MACs; the path is kept."""
    cost = MacCost(lab.space)
    limits = {share: lab.macs(uniform(lab, share)) for share in SHARES}
    rule = "score" if kind == "score" else "score-per-cost"

    def search() -> list[dict[str, Any]]:
        judge = lab.judge(supernet, "accuracy" if kind == "accuracy" else "loss")
        path = []
        for step in greedy_slim(lab.space, judge, cost, [min(limits.values())], rule=rule):
            path.append({"group": step.group, "widths": dict(step.widths), "cost": step.cost, "score": step.score})
            if len(path) % 10 == 0:
                say(f"search {seed}, {kind}: step {len(path)}, {step.cost / cost(lab.space.full()):.1%} of the MACs")
        return path

    path = [Widths(step["widths"]) for step in lab.remembered(f"search-{kind}-{seed}", search)]
    return {share: next(widths for widths in path if cost(widths) <= limit) for share, limit in limits.items()}


def exchanged(lab: Lab, supernet: Supernet, seed: int, share: float) -> Widths:
    """The net found, bettered by exchanges of bins."""
    cost, start = MacCost(lab.space), found(lab, supernet, "found", seed)[share]

    def search() -> list[dict[str, Any]]:
        judge = lab.judge(supernet)
        moves = exchange_bins(lab.space, judge, cost, start, lab.macs(uniform(lab, share)))
        return [{"wider": m.wider, "narrower": m.narrower, "widths": dict(m.widths), "score": m.score} for m in moves]

    moves = lab.remembered(f"exchanges-{share:.0%}-{seed}", search)
    return Widths(moves[-1]["widths"]) if moves else start


def measure(options: argparse.Namespace) -> dict[str, Any]:
    labs = {kind: lab_of(options, kind) for kind in KINDS}
    known = {(row["budget"], row["kind"], row["seed"]): row for row in recorded(options)}
    seeds, rows = sorted({*options.seeds, *(seed for _, _, seed in known)}), list[dict[str, Any]]()
    for share, kind, seed in [(share, kind, seed) for share, kinds in NETS for seed in seeds for kind in kinds]:
        lab, name, before = labs[kind], f"{kind}-{share:.0%}-{seed}", known.get((f"{share:.0%}", kind, seed))
        is_wanted = share in (options.shares or SHARES) and kind in (options.kinds or KINDS) and seed in options.seeds
        if (options.finished or not is_wanted) and not lab.is_trained(name):
            rows += [before] if before else []
            continue
        supernet = supernet_of(lab, kind, seed)
        widths = widths_of(lab, supernet, kind, seed, share)
        row = {"seed": seed, "budget": f"{share:.0%}", "kind": kind, "widths": list(widths.values())}
        row |= {"macs": lab.macs(widths), "params": lab.params(widths), "shared": lab.accuracy(supernet, widths)}
        epochs = 3 * lab.setting.epochs if kind.endswith("-long") else None
        row["alone"] = lab.plain(name, widths, seed, epochs)[1]
        say(f"seed {seed}, {share:.0%}, {kind}: {row['widths']}, {row['shared']:.2%} shared, {row['alone']:.2%} alone")
        rows.append(row | {"from": lab.origin()["provenance"]})
    lab = labs["found"]
    return {"rows": rows, "full": lab.macs(lab.every.full()), **lab.about(), "seeds": seeds}


def widths_of(lab: Lab, supernet: Supernet, kind: str, seed: int, share: float) -> Widths:
    """The net of a kind at a share of the MACs."""
    kind = kind.removesuffix("-long")
    if kind == "uniform":
        return uniform(lab, share)
    if kind == "exchanged":
        return exchanged(lab, supernet, seed, share)
    return found(lab, supernet, kind, seed)[share]


def recorded(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the record as it is, each with where it comes from."""
    path = options.root / "benchmarks" / "results" / "paper" / "h.json"
    record = read_json(path) if path.exists() and not options.tiny else {"rows": []}
    return [{"from": record["provenance"], **row} for row in record["rows"]]


def draw(record: dict[str, Any], picture: Callable[..., Any]) -> str:
    budgets = [f"{share:.0%}" for share in SHARES]

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
        axes.legend(loc="lower right", fontsize=7)

    picture(plot)
    rows = []
    for budget in budgets:
        alone = {kind: dict(zip(of(budget, kind, "seed"), of(budget, kind, "alone"), strict=True)) for kind in KINDS}
        for kind, label in KINDS.items():
            if not alone[kind]:
                continue
            costs = [f"{mean(of(budget, kind, 'macs')) / 1e6:.2f}M", f"{mean(of(budget, kind, 'params')) / 1e3:.1f}K"]
            cells = [budget, label, *costs, spread(of(budget, kind, "shared")), spread([*alone[kind].values()])]
            rival = alone[RIVALS.get(kind, "uniform")]
            gains = [value - rival[s] for s, value in alone[kind].items() if s in rival]
            rows.append([*cells, "" if kind.startswith("uniform") else difference(gains)])
    head = ["budget", "net", "MACs", "parameters", "shared weights, %", "trained alone, %"]
    return table([*head, "gain over uniform by seed, points"], rows)


if __name__ == "__main__":
    common.main("h", __doc__, measure, draw)
