"""The figures of docs/paper.md: every script runs through on made-up images, and the page shows what was measured."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for path in (ROOT / "benchmarks" / "paper").glob("?_*.py"))
RESULTS = sorted((ROOT / "benchmarks" / "results" / "paper").glob("?.json"))

sys.path.insert(0, str(ROOT / "benchmarks" / "paper"))
common = importlib.import_module("common")
ranking = importlib.import_module("i_ranking")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("figures")
    (root / "docs").mkdir()
    tables = "".join(f"<!-- table {script.stem[0]} -->\n<!-- end -->\n" for script in SCRIPTS)
    (root / "docs" / "paper.md").write_text(f"before\n{tables}after\n")
    return root


def draw_figure(script: str, root: Path, *options: str) -> str:
    """Run a script below `root`; returns what it put on the page."""
    module = importlib.import_module(script)
    places = ["--root", str(root), "--runs", str(root / "runs")]
    common.main(script[0], module.__doc__, module.measure, module.draw, [*places, "--tiny", *options])
    return table_of(root / "docs" / "paper.md", script[0])


def table_of(page: Path, letter: str) -> str:
    return page.read_text().split(f"<!-- table {letter} -->\n")[1].split("<!-- end -->")[0].strip()


def test_there_is_a_script_for_each_figure() -> None:
    assert [script.stem[0] for script in SCRIPTS] == list("abcdefghij")


@pytest.mark.parametrize("script", [script.stem for script in SCRIPTS])
def test_a_figure_is_measured_drawn_and_drawn_again(script: str, place: Path) -> None:
    pytest.importorskip("matplotlib")
    table = draw_figure(script, place)
    assert table.startswith("| ")
    assert "nan" not in table
    record = json.loads((place / "benchmarks" / "results" / "paper" / f"{script[0]}.json").read_text())
    assert {"version", "commit", "date", "machine", "command", "threads"} <= set(record["provenance"])
    picture = (place / "docs" / "figures" / f"{script[0]}.svg").read_text()
    assert "<svg" in picture
    (place / "runs").rename(place / "hidden")  # nothing is trained, and nothing changes, when it is only drawn
    try:
        assert draw_figure(script, place, "--draw") == table
    finally:
        (place / "hidden").rename(place / "runs")
    assert (place / "docs" / "figures" / f"{script[0]}.svg").read_text() == picture
    page = (place / "docs" / "paper.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")


def test_what_was_trained_is_not_trained_again_and_another_recipe_is_refused(place: Path) -> None:
    draw_figure("b_switches", place)
    net = place / "runs" / "fashion-mnist" / "i-net-0.5-0.json"
    before = net.read_text()
    draw_figure("b_switches", place)
    assert net.read_text() == before
    net.write_text(json.dumps(json.loads(before) | {"seed": 7}))
    try:
        with pytest.raises(SystemExit, match="was trained otherwise"):
            draw_figure("b_switches", place)
    finally:
        net.write_text(before)


def test_missing_data_names_the_script_that_brings_it(place: Path, tmp_path: Path) -> None:
    module = importlib.import_module("b_switches")
    with pytest.raises(SystemExit, match=r"fetch\.py"):
        common.main("b", "", module.measure, module.draw, ["--root", str(tmp_path), "--data", str(tmp_path)])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_page_shows_what_was_measured(path: Path) -> None:
    script = next(script.stem for script in SCRIPTS if script.stem[0] == path.stem)
    table = importlib.import_module(script).draw(json.loads(path.read_text()), lambda *_, **__: None)
    assert table_of(ROOT / "docs" / "paper.md", path.stem) == table.strip()
    assert (ROOT / "docs" / "figures" / f"{path.stem}.svg").stat().st_size < 150_000


def test_the_page_shows_what_imagenet_would_cost() -> None:
    estimate = importlib.import_module("imagenet_cost")
    (row,) = estimate.rows([ROOT / "configs" / "imagenet" / "mobilenet_v1.yaml"])
    assert f"| {' | '.join(row)} |" in table_of(ROOT / "docs" / "paper.md", "cost")


def test_correlations_of_ranks() -> None:
    xs = [1.0, 2.0, 3.0, 4.0]
    assert ranking.spearman(xs, [2.0, 4.0, 6.0, 100.0]) == 1.0
    assert ranking.kendall(xs, [4.0, 3.0, 2.0, 1.0]) == -1.0
    assert ranking.kendall(xs, [1.0, 3.0, 2.0, 4.0]) == pytest.approx(4 / 6)
    assert ranking.spearman(xs, [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)
    assert ranking.spearman([1.0, 1.0, 2.0], [1.0, 1.0, 5.0]) == pytest.approx(1.0)  # equal values share a rank
    assert ranking.kendall([1.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == pytest.approx(2 / math.sqrt(2 * 3))


def test_the_script_that_brings_the_data_has_a_help(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    script = ROOT / "benchmarks" / "paper" / "fetch.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fashion-mnist.npz" in done.stdout
    assert not any(tmp_path.iterdir())
