"""The command line itself: help, start-up time, inspect, and mistakes in the arguments."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from autoslim import cli, inspection, runtimes, trace
from autoslim.cli import main
from autoslim.errors import RunError
from autoslim.models import build_model
from autoslim.terminal import print_results
from test_latency import invented

NET = f"{Path(__file__).parent / 'small_net.py'}:net"


def test_help_is_there_at_once_and_needs_no_torch() -> None:
    script = Path(sys.executable).with_name("autoslim")
    times = []
    for _ in range(5):
        before = os.times()  # of a process that waits for nothing; a clock would measure who else is at work
        done = subprocess.run([str(script), "--help"], capture_output=True, text=True, check=True)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    for command in ("run", "inspect", "latency", "train", "slim", "retrain", "export", "report"):
        assert f"  {command} " in done.stdout
    assert sorted(times)[2] < 0.3
    code = "import sys; from autoslim.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_inspect_prints_what_the_readme_promises(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    assert main(["inspect", "torchvision:mobilenet_v2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"groups", "frozen", "macs", "params", "memory", "smallest", "slimmable_macs"} <= set(facts)
    assert len(facts["groups"]) == 25
    assert facts["groups"][0] == {"name": "features.0.0", "size": 32, "choices": [8, 16, 24, 32]}
    assert facts["macs"] == 300_774_272
    assert facts["params"] == 3_504_872
    assert facts["smallest"]["macs"] < 0.1 * facts["macs"]
    assert [note["name"] for note in facts["frozen"]] == ["classifier.1"]
    assert facts["frozen"][0]["reason"] == "its output is an output of the network"
    assert 0.99 < facts["slimmable_macs"] < 1


def test_inspect_for_people_names_groups_frozen_layers_and_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["inspect", NET, "--input", "1,1,16,16", "--budget", "50%", "--set", "space.divisor=4"])
    out = capsys.readouterr().out
    assert code == 0
    for text in ("stem.0", "blocks.1.0", "head", "output of the network", "budget 50%: can be reached"):
        assert text in out


def test_inspect_says_that_a_budget_is_out_of_reach(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["inspect", NET, "--input", "1,1,16,16", "--budget", "0.001x", "--json"])
    captured = capsys.readouterr()
    assert code == 2
    assert json.loads(captured.out)["budgets"][0]["reachable"] is False
    assert "smallest net" in captured.err


def test_inspect_reads_a_configuration(capsys: pytest.CaptureFixture[str], in_tmp: Path) -> None:
    config = in_tmp / "c.yaml"
    config.write_text(f"model: {NET}\nmodel_args: {{classes: 10}}\nspace: {{divisor: 2, fixed: [stem]}}\n")
    assert main(["inspect", str(config), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert ("stem.0", "fixed by the user") in [(note["name"], note["reason"]) for note in facts["frozen"]]
    assert [budget["budget"] for budget in facts["budgets"]] == ["50%", "25%"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["frobnicate"], "frobnicate"),
        (["run"], "Missing argument"),
        (["run", "nowhere.yaml"], "no configuration file 'nowhere.yaml'"),
        (["run", "c.yaml", "--epochs", "3"], "--epochs"),
        (["run", "c.yaml", "--threads", "0"], "--threads"),
        (["run", "c.yaml", "--set", "train"], "write key=value"),
        (["run", "broken.yaml"], "no valid YAML"),
        (["run", "list.yaml"], "must be a mapping"),
        (
            ["run", "c.yaml", "--set", "data.holdout=true"],
            "data.holdout: a number of images, as 5000, or a share",
        ),
        (
            ["run", "c.yaml", "--set", "data.holdout=1.0"],
            "data.holdout: a number of images, as 5000, or a share",
        ),
        (["inspect", "twice.yaml"], "the key 'slim' stands in line 2 and again in line 4; keep one"),
        (["run", "c.yaml", "--set", "slim={budgets: [30%], budgets: [40%]}"], "the key 'budgets' stands in line 1 and"),
        (["inspect", "torchvision:mobilnet_v2"], "did you mean 'mobilenet_v2'"),
        (["inspect", NET], "does not run on the example input of shape (1, 3, 224, 224)"),
        (["inspect", NET, "--input", "abc"], "write it as 1,3,224,224"),
        (["inspect", NET, "--input", "1,1,16,16", "--set", "space.fixed=[sten]"], "did you mean 'stem'"),
        (["slim", "."], "is no run directory"),
        (["latency", NET, "--runtime", "tensorflow"], "latency.runtime"),
        (["latency", NET, "--runtime", "openvin", "--input", "1,1,16,16"], "did you mean 'openvino'"),
        (["latency", NET, "--device", "foo", "--input", "1,1,16,16"], "device 'foo' cannot be used"),
        (["latency", NET, "--device", "meta", "--input", "1,1,16,16"], "device 'meta' cannot be used"),
        (["latency", NET, "--device", "cuda:99", "--input", "1,1,16,16"], "device 'cuda:99' cannot be used"),
        (["inspect", NET, "--set", "device=foo", "--input", "1,1,16,16"], "device 'foo' cannot be used"),
        (["inspect", NET, "--set", "slim.memory_gb=1e-7", "--input", "1,1,16,16"], "slim.memory_gb=1e-07"),
        (["inspect", NET, "--set", "latency.table=nowhere.csv", "--input", "1,1,16,16"], "nowhere.csv cannot be read"),
        (["latency", NET, "--table", "nowhere.csv", "--input", "1,1,16,16"], "nowhere.csv cannot be read"),
        (["latency", NET, "--width", "0", "--input", "1,1,16,16", "--set", "latency.nets=4"], "--width"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], in_tmp: Path
) -> None:
    (in_tmp / "c.yaml").write_text("model: autoslim:mobilenet_v1\n")
    (in_tmp / "broken.yaml").write_text("model: [unclosed\n")
    (in_tmp / "list.yaml").write_text("- model\n")
    twice = "model: autoslim:mobilenet_v1\nslim: {budgets: [30%]}\nthreads: 1\nslim: {batch_size: 9}\n"
    (in_tmp / "twice.yaml").write_text(twice)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err
    assert captured.out == ""


def test_latency_shows_the_hot_layers_and_writes_a_table_that_it_reads_again(
    capsys: pytest.CaptureFixture[str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOSLIM_CACHE", str(in_tmp / "cache"))
    options = ["--input", "1,1,16,16", "--set", "space.divisor=4", "--set", "latency.nets=4", "--threads", "1"]
    assert main(["latency", NET, *options, "--json", "--csv", "table.csv"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["runtime"], facts["threads"], facts["net"]) == ("torch", 1, "full net")
    assert facts["predicted_ms"] > 0
    assert facts["measured_ms"] > 0
    assert facts["predicted_ms"] == pytest.approx(sum(fact["ms"] for fact in facts["operators"]))
    assert sum(fact["share"] for fact in facts["operators"]) == pytest.approx(1.0)
    assert {fact["layer"] for fact in facts["operators"]} >= {"stem.0", "blocks.0.0", "head"}
    assert main(["latency", NET, *options, "--width", "0.5", "--table", "table.csv", "--top", "2"]) == 0
    shown = capsys.readouterr().out
    for text in ("widths x0.5", "torch, 1 thread", "others", "predicted", "end to end"):
        assert text in shown
    assert main(["latency", NET, *options, "--budget", "macs<=80%", "--json"]) == 0
    assert "near macs<=80%" in json.loads(capsys.readouterr().out)["net"]
    space = trace(build_model(NET), torch.zeros(1, 1, 16, 16)).with_choices(12, 4)
    invented(space, 30).save(in_tmp / "phone.csv")
    budgets = ["--budget", "latency_ms<=80%", "--budget", "macs<=50%, latency_ms<=90%"]
    assert main(["inspect", NET, *options[:4], "--set", "latency.table=phone.csv", *budgets]) == 0
    assert capsys.readouterr().out.count("can be reached") == 2
    (in_tmp / "table.csv").write_text("operator,widths,ms\nconv,8 8,0.1\n")
    assert main(["latency", NET, *options, "--table", "table.csv"]) == 2
    assert "has no operator" in capsys.readouterr().err


def test_a_process_says_everything_before_it_ends(in_tmp: Path) -> None:
    """It leaves its garbage where it is: output, exit codes and what was left for the end are those of any process."""

    def ended(*arguments: str, first: str = "pass") -> subprocess.CompletedProcess[str]:
        code = f"import atexit, sys; from autoslim.__main__ import entry; {first}; sys.exit(entry())"
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)

    done = ended("--version", first="atexit.register(print, 'at the end')")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "at the end"
    assert done.stdout.startswith("autoslim ")
    done = ended("run", "nowhere.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no configuration file")
    done = ended("--version", first="import autoslim.cli; autoslim.cli.app = None")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("arguments", [["published", "--json"], ["published"], ["--version"], ["slim", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_the_output_is_one_line(arguments: list[str], unbuffered: str) -> None:
    script = Path(sys.executable).with_name("autoslim")
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [script, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: standard output cannot be written: ")
    with subprocess.Popen([script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as few:
        assert few.stdout is not None
        few.stdout.close()  # as `head` does
        assert few.stderr is not None
        assert few.stderr.read() == b""


@pytest.mark.parametrize("command", ["run", "train", "slim", "retrain", "export", "report"])
def test_short_options_mean_the_same_in_every_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meant = {
        "--system": ("us-net", ["system=us-net"]),
        "--on-nan": ("skip", ["train.on_nan=skip", "retrain.on_nan=skip"]),
        "--pretrained": ("w.pth", ['pretrained="w.pth"']),
    }
    meant.pop({"slim": "--on-nan", "retrain": "--pretrained"}.get(command, ""), None)
    opened = []
    monkeypatch.setattr(cli, "_stages", lambda target, asked, *others, **more: opened.append(asked))
    options = [text for option, (value, _) in meant.items() for text in (option, value)]
    assert main([command, "c.yaml", "--set", "seed=3", "--skip-broken", *options]) == 0
    expected = ["seed=3", "data.skip_broken=true", *(text for _, texts in meant.values() for text in texts)]
    assert sorted(opened[0]) == sorted(expected)


def test_a_mistake_is_said_though_a_signal_comes_on_top(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torchrun sends one to all processes that have just found out that another is gone."""

    def stages(*arguments: object) -> None:
        try:
            raise RunError("lost contact")
        finally:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cli, "_is_alone", lambda: False)
    monkeypatch.setattr(cli, "_say_once", lambda text, error, code: print(text) or code)
    monkeypatch.setattr(cli, "_stages", stages)
    assert main(["run", "c.yaml"]) == 2
    assert capsys.readouterr().out == "error: lost contact\n"


@pytest.mark.parametrize("command", ["latency", "slim"])
def test_the_help_of_a_command_needs_no_torch(command: str) -> None:
    code = f"import sys; from autoslim.cli import main; main(['{command}', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_inspect_measures_latency_only_for_budgets_that_may_be_met(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "measure_latency_table", None)  # calling it would be a TypeError
    texts = ["--budget", "macs<=0.1%, latency_ms<=50%", "--budget", "50%"]
    assert main(["inspect", NET, "--input", "1,1,16,16", *texts]) == 2
    captured = capsys.readouterr()
    assert "budget macs<=0.1%, latency_ms<=50%: budget 'macs<=0.1%'" in captured.out
    assert "budget 50%: can be reached" in captured.out
    assert "the smallest net of this space has" in captured.err


def test_inspect_shows_latency_and_limits_that_hold_already(capsys: pytest.CaptureFixture[str], in_tmp: Path) -> None:
    net = build_model(NET)
    invented(trace(net, torch.zeros(1, 1, 16, 16)).with_choices(12, 4, 1 / 6), 30).save(in_tmp / "phone.csv")
    options = ["--input", "1,1,16,16", "--set", "space.divisor=4", "--set", "latency.table=phone.csv"]
    assert main(["inspect", NET, *options, "--budget", "macs<=900M, latency_ms<=70%", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["latency_ms"] > facts["smallest"]["latency_ms"] > 0
    assert facts["budgets"][0]["slack"] == ["macs<=900M"]
    assert main(["inspect", NET, *options, "--budget", "macs<=900M, latency_ms<=70%"]) == 0
    shown = capsys.readouterr().out
    assert "latency_ms: " in shown
    assert "can be reached; macs<=900M is already met by the full net" in shown


def test_inspect_refuses_a_runtime_that_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda package: None)
    assert main(["inspect", NET, "--input", "1,1,16,16", "--set", "latency.runtime=openvino"]) == 2
    assert "pip install 'autoslim[openvino]'" in capsys.readouterr().err


def _results(*budgets: str) -> dict[str, Any]:
    sizes = {"macs": 165_000_000, "params": 3_500_000, "memory": 10_000_000, "peak_memory": 21_000_000}
    figures = {**sizes, "latency_ms": 123.45, "latency_predicted_ms": 120.01}
    accuracy = {"supernet": 0.512, "found": 0.611, "retrained": 0.721, "uniform": 0.731}
    subnets = [{"budget": budget, **figures, "accuracy": accuracy} for budget in budgets]
    return {"model": "net", "full": {**figures, "accuracy": 0.812}, "subnets": subnets}


@pytest.mark.parametrize("width", [60, 80, 110])
def test_the_table_of_results_cuts_no_figure(width: int) -> None:
    text = "macs<=50%, peak_memory<=50%, memory<=60%, latency_ms<=8"
    output = io.StringIO()
    print_results(_results(text, "25%"), Console(width=width, file=output))
    for figure in ("51.2%", "61.1%", "72.1%", "73.1%", "81.2%", "165M", "3.5M", "10M", "21M", "123.45 ms", "(120.01)"):
        assert figure in output.getvalue()
    assert "…" not in output.getvalue()
    assert "peak" in output.getvalue()
    assert max(map(len, output.getvalue().splitlines())) <= 120
    output = io.StringIO()
    print_results(_results("latency_ms<=8, macs<=50%", "25%"), Console(width=width, file=output))
    assert all(figure in output.getvalue() for figure in ("51.2%", "73.1%", "165M", "(100%)", "(120.01)"))
    assert "…" not in output.getvalue()
    assert "peak" not in output.getvalue()  # no budget is on it
