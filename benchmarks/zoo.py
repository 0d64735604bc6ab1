"""Grade public models: what is understood, is it right, how deep can it be cut (see `grading.py` for the grades).

    python benchmarks/zoo.py --convnets                          # the 720 convnets of torchvision and timm
    python benchmarks/zoo.py --torchvision --timm                # everything, transformers included
    python benchmarks/zoo.py 'timm:resnet*' torchvision:alexnet  # names and globs
    python benchmarks/zoo.py --page                              # only write docs/zoo.md from what there is

Rows go to benchmarks/results/zoo.csv as they come in; models that have a row already are skipped, unless --again. Each
model runs in a worker process with a time limit; a worker that dies or hangs costs one row, which says so.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import faulthandler
import fnmatch
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "benchmarks" / "results" / "zoo.csv"
PAGE = ROOT / "docs" / "zoo.md"
CONVNETS = ROOT / "benchmarks" / "convnets.json"
sys.path.insert(0, str(Path(__file__).resolve().parent))


# --- a worker: names in, rows out, one line of JSON each ---------------------------------------------------------


def work() -> None:
    warnings.filterwarnings("ignore")
    import grading

    for line in sys.stdin:
        job = json.loads(line)
        faulthandler.dump_traceback_later(job["limit"] - 5)  # where it hangs, if it does, goes to zoo.log
        row = _graded(grading, job)
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


def _graded(grading: Any, job: dict[str, Any]) -> dict[str, Any]:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            if job["alone"] is None:
                size = 0
                with contextlib.suppress(NotImplementedError):  # some builders look at the weights they draw
                    size = sum(p.numel() for p in grading.build(job["model"], device="meta").parameters())
                if size > grading.LARGE:
                    return {"postponed": True, "parameters": size}
            options = {"shapes_only": job["shapes_only"], "round_trip": job["round_trip"]}
            return dataclasses.asdict(grading.grade(job["model"], job["family"], **options))
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return dataclasses.asdict(grading.Grade(job["model"], job["family"], failure=text))


# --- the pool ----------------------------------------------------------------------------------------------------


class Worker:
    """A process that grades one model after another; it is started again when it hangs, dies or grows."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()
        self._done = 0

    def ask(self, job: dict[str, Any], limit: float) -> dict[str, Any] | str:
        """The row, or what happened instead."""
        if self._process is None or self._process.poll() is not None or self._done >= 25:
            self.stop()
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._done += 1
        try:
            self._process.stdin.write(json.dumps(job | {"limit": limit}) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            self.stop()
            return f"no result within {limit:.0f} s"
        except OSError:
            line = ""
        if not line:
            self.stop()
            return "the process died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> None:
        self._lines = queue.Queue()
        self._done = 0
        environment = os.environ | {"OMP_NUM_THREADS": str(self._threads), "MALLOC_MMAP_THRESHOLD_": "1048576"}
        self._process = subprocess.Popen(
            [sys.executable, "-u", __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(ROOT / "benchmarks" / "results" / "zoo.log").open("a"),
            text=True,
            env=environment,
        )
        threading.Thread(target=self._read, args=(self._process, self._lines), daemon=True).start()

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None


def grade_all(
    models: dict[str, str], workers: int, limit: float, rows: dict[str, dict[str, Any]], round_trip: bool
) -> None:
    """Grade what has no row yet; large models at the end, one at a time."""
    import grading

    jobs: queue.Queue[tuple[str, str]] = queue.Queue()
    for item in models.items():
        jobs.put(item)
    large: dict[str, tuple[str, int]] = {}
    lock = threading.Lock()
    started, total = time.monotonic(), len(models)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    done = 0

    def finish(model: str, family: str, answer: dict[str, Any] | str) -> None:
        nonlocal done
        if isinstance(answer, str):
            answer = dataclasses.asdict(grading.Grade(model, family, failure=answer, seconds=limit))
        answer["commit"] = commit
        with lock:
            rows[model] = answer
            write(rows.values())
            done += 1
            left = (time.monotonic() - started) / done * (total - done)
            print(
                f"{done:4d}/{total} {answer['grade']} {model:44s} {answer['seconds']:6.1f} s  ~{left / 60:.0f} min left  {answer['failure'][:90]}",
                flush=True,
            )

    def run() -> None:
        worker = Worker()
        while True:
            try:
                model, family = jobs.get_nowait()
            except queue.Empty:
                break
            job = {"model": model, "family": family, "alone": None, "shapes_only": False, "round_trip": round_trip}
            answer = worker.ask(job, limit)
            if isinstance(answer, dict) and answer.get("postponed"):
                with lock:
                    large[model] = family, answer["parameters"]
            else:
                finish(model, family, answer)
        worker.stop()

    threads = [threading.Thread(target=run) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, (family, size) in large.items():
        worker = Worker(os.cpu_count() or 1)
        job = {"model": model, "family": family, "alone": True, "round_trip": False}
        job["shapes_only"] = size > grading.TOO_LARGE
        finish(model, family, worker.ask(job, 3 * limit))
        worker.stop()


# --- files -------------------------------------------------------------------------------------------------------


def read() -> dict[str, dict[str, Any]]:
    if not CSV.exists():
        return {}
    with CSV.open(newline="") as file:
        return {row["model"]: {"round_trip": "", **row} for row in csv.DictReader(file)}


def write(rows: Iterable[dict[str, Any]]) -> None:
    import grading

    CSV.parent.mkdir(parents=True, exist_ok=True)
    beside = CSV.with_suffix(".tmp")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, [column.name for column in dataclasses.fields(grading.Grade)], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["family"], row["model"])))
    beside.replace(CSV)


def convnets() -> set[str]:
    """The 720 convnets of the two zoos, by name."""
    return set(json.loads(CONVNETS.read_text()))


def page(rows: list[dict[str, Any]]) -> str:
    """docs/zoo.md: per family the grades, trace times and reasons; then every model that is not A."""
    nets = convnets()
    lines = [
        "# The public zoo, graded",
        "",
        "Written by `python benchmarks/zoo.py`; rows in [benchmarks/results/zoo.csv](../benchmarks/results/zoo.csv), grades",
        "explained in [benchmarks/grading.py](../benchmarks/grading.py). Double precision, every weight drawn anew, small inputs.",
        "A: correct, and at least 95 % of the MACs can be cut or at most 30 % are left with every group at half. B: correct, at",
        "least 60 % can be cut. C: correct. F: anything raised, hung, differed, or took more than ten seconds to trace.",
        "Models whose numbers do not fit into 20 GB in double precision are traced, proven and measured on meta: the last",
        "section names them.",
        "",
    ]
    for title, chosen in (
        ("Convnets", [row for row in rows if row["model"] in nets]),
        (
            "Everything else: transformers, hybrids, detection, segmentation, video",
            [row for row in rows if row["model"] not in nets],
        ),
    ):
        if chosen:
            lines += [f"## {title}", "", *_table(chosen), ""]
    short = [row for row in rows if row["grade"] != "A"]
    lines += [
        "## Every model that is not A",
        "",
        "| model | grade | cuttable | MACs at half | why |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in sorted(short, key=lambda row: (row["model"] not in nets, row["family"], row["model"])):
        why = row["failure"] or _slow(row) or row["frozen"] or "widths of few choices: half is not near"
        lines.append(
            f"| {row['model']} | {row['grade']} | {float(row['cuttable']):.2f} | {float(row['at_half']):.2f} | {why} |"
        )
    tried = [row for row in rows if row.get("round_trip")]
    if tried:
        kept = [row for row in tried if row["round_trip"] in ("yes", "n/a")]
        lines += [
            "",
            "## Round trips",
            "",
            f"A subnet of random widths, saved and loaded, through torch.export, and as ONNX in onnxruntime: {len(kept)} of "
            f"{len(tried)} models tried (`--round-trip`) come back the same. The others:",
            "",
            "| model | what does not |",
            "| --- | --- |",
            *(f"| {row['model']} | {row['round_trip'].replace('|', '/')} |" for row in tried if row not in kept),
        ]
    large = sorted(row["model"] for row in rows if row["checked"] == "shapes")
    lines += ["", "## Graded on shapes alone", "", f"{len(large)} models: {', '.join(large)}."]
    return "\n".join(lines) + "\n"


def _slow(row: dict[str, Any]) -> str:
    return f"traced in {row['trace_s']} s" if float(row["trace_s"]) >= 10 else ""


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| family | models | A | B | C | F | median trace (s) | frozen, if anything |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(row)
    for family, members in [*sorted(families.items()), ("**all**", rows)]:
        counts = Counter(row["grade"] for row in members)
        median = statistics.median(float(row["trace_s"]) for row in members)
        reasons = Counter(
            row["frozen"].split("; ")[0].split("x ", 1)[-1] for row in members if row["frozen"] and row["grade"] != "A"
        )
        why = "" if family == "**all**" else "; ".join(reason for reason, _ in reasons.most_common(1))
        grades = " | ".join(str(counts[letter]) for letter in "ABCF")
        yield f"| {family} | {len(members)} | {grades} | {median:.2f} | {why} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names or globs, such as timm:resnet50 or 'torchvision:*'")
    parser.add_argument("--torchvision", action="store_true", help="every torchvision model")
    parser.add_argument("--timm", action="store_true", help="every timm model")
    parser.add_argument("--convnets", action="store_true", help="the 720 convnets of the two")
    parser.add_argument("--one-per-family", action="store_true", help="of what was chosen, the first of each family")
    parser.add_argument("--again", action="store_true", help="grade models that have a row already, too")
    parser.add_argument("--round-trip", action="store_true", help="also save, load and export a subnet of each")
    parser.add_argument("--page", action="store_true", help="write docs/zoo.md only")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--limit", type=float, default=300, help="seconds for one model (three times that for large ones)"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    warnings.filterwarnings("ignore")
    rows = read()
    if not options.page:
        import grading

        every = grading.torchvision_models() | grading.timm_models()
        nets = convnets()
        chosen = {
            name: family
            for name, family in every.items()
            if (options.torchvision and name.startswith("torchvision:"))
            or (options.timm and name.startswith("timm:"))
            or (options.convnets and name in nets)
            or any(fnmatch.fnmatchcase(name, glob) for glob in options.names)
        }
        if not chosen:
            parser.error("no model is chosen: give names or globs, --torchvision, --timm or --convnets")
        if options.one_per_family:
            first = {family: name for name, family in reversed(chosen.items())}
            chosen = {name: family for name, family in chosen.items() if first[family] == name}
        todo = {name: family for name, family in chosen.items() if options.again or name not in rows}
        print(f"{len(chosen)} models, {len(todo)} to grade")
        grade_all(todo, options.workers, options.limit, rows, options.round_trip)
    PAGE.write_text(page(list(rows.values())))
    print(
        f"{CSV.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}: {dict(Counter(row['grade'] for row in rows.values()))}"
    )


if __name__ == "__main__":
    main()
