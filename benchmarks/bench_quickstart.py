"""The quickstart with several seeds: the nets found against uniform ones of equal MACs, trained by the same recipe.

    python benchmarks/bench_quickstart.py     # seeds 0, 1, 2; writes benchmarks/results/quickstart.{json,md}
    python benchmarks/bench_quickstart.py --seeds 0 1 2 3 4

Each seed is `autoslim run configs/quickstart.yaml --set seed=N` in a run directory of its own, so it resumes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KINDS = ("supernet", "found", "retrained", "uniform")


def spread(values: list[float]) -> str:
    return (
        f"{statistics.mean(values):.1%} ± {100 * statistics.stdev(values):.1f}"
        if len(values) > 1
        else f"{values[0]:.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench_quickstart")
    options = parser.parse_args()
    records = []
    for seed in options.seeds:
        run = options.runs / f"seed{seed}"
        command = [sys.executable, "-m", "autoslim.cli", "run", str(ROOT / "configs" / "quickstart.yaml")]
        started = time.perf_counter()
        subprocess.run([*command, "--run-dir", str(run), "--set", f"seed={seed}"], check=True)
        seconds = time.perf_counter() - started
        provenance = yaml.safe_load((run / "config.yaml").read_text())["provenance"]
        results = json.loads((run / "results.json").read_text())
        records.append({"seed": seed, "seconds": round(seconds), "provenance": provenance, "results": results})
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quickstart.json").write_text(json.dumps(records, indent=1) + "\n")

    lines = [
        "# Quickstart, several seeds",
        "",
        f"`python benchmarks/bench_quickstart.py --seeds {' '.join(map(str, options.seeds))}`; "
        f"{records[0]['provenance']['date'][:10]}, commit {records[0]['provenance']['commit']}, "
        f"{records[0]['provenance']['machine']}. Mean and standard deviation over {len(records)} seeds, in points; "
        "1,000 test images: a single accuracy has a standard error of about 1.2 points. Raw records: quickstart.json.",
        "",
        "| budget | MACs | parameters | supernet | found | retrained | uniform, equal MACs | retrained - uniform |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for index, subnet in enumerate(records[0]["results"]["subnets"]):
        nets = [record["results"]["subnets"][index] for record in records]
        cells = [spread([net["accuracy"][kind] for net in nets]) for kind in KINDS]
        gains = [100 * (net["accuracy"]["retrained"] - net["accuracy"]["uniform"]) for net in nets]
        shown = ", ".join(f"{gain:+.1f}" for gain in gains)
        macs, params = (statistics.mean([net[key] for net in nets]) / 1e3 for key in ("macs", "params"))
        lines.append(f"| {subnet['budget']} | {macs:.0f}K | {params:.0f}K | {' | '.join(cells)} | {shown} |")
    lines += ["", f"Wall time of a whole run: {', '.join(str(r['seconds']) + ' s' for r in records)}."]
    (RESULTS / "quickstart.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
