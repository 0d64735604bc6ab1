"""Processes that meet on one run directory: jobs for different nets work side by side, others are refused."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import autoslim
from autoslim.errors import RunError
from autoslim.run import exclusive
from test_distributed import ENVIRONMENT
from test_pipeline import artefacts, config, fails, run

__all__ = ["config"]


def settled(root: Path) -> dict[str, Any]:
    """Artefacts, with the log of trainings in the order of its stages."""
    found = artefacts(root)
    return found | {"train": sorted(found["train"], key=lambda line: (line["stage"], line["epoch"]))}


def test_nets_are_retrained_side_by_side(config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", config) == 0
    assert run("slim", "runs/small") == 0
    shutil.copytree("runs/small", "alone")
    assert run("retrain", "alone") == 0
    command = [sys.executable, "-m", "autoslim", "retrain", "runs/small", "--budget"]
    jobs = [
        subprocess.Popen([*command, budget], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        for budget in ("50%", "params-30%")  # as text, or as its directory is called
    ]
    outputs = [job.communicate(timeout=300)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert settled(in_tmp / "runs/small") == settled(in_tmp / "alone")
    assert run("report", "runs/small") == 0
    assert all(
        net["accuracy"]["retrained"] for net in json.loads(Path("runs/small/results.json").read_text())["subnets"]
    )
    again = Path("runs/small/subnets/50%/seed-7")
    with exclusive(in_tmp / "runs/small", ["50%"]):  # beside the job of the same net by the seed of the run
        assert run("retrain", "runs/small", "--budget", "50%", "--seed", "7") == 0
    assert autoslim.load_subnet(again).state_dict().keys() == autoslim.load_subnet(again.parent).state_dict().keys()
    kept = settled(in_tmp / "runs/small")
    assert kept[f"{again.relative_to('runs/small')}/model.safetensors"] != kept["subnets/50%/model.safetensors"]
    assert kept["subnets/50%/model.safetensors"] == settled(in_tmp / "alone")["subnets/50%/model.safetensors"]
    assert run("report", "runs/small") == 0
    one, other = json.loads(Path("runs/small/results.json").read_text())["subnets"]
    seeds = one["seeds"]["retrained"]
    assert seeds["accuracies"].keys() == {"0", "7"}
    assert seeds["mean"] == pytest.approx(sum(seeds["accuracies"].values()) / 2)
    assert seeds["std"] == pytest.approx(abs(seeds["accuracies"]["0"] - seeds["accuracies"]["7"]) / 2**0.5)
    assert "seeds" not in other
    assert "over 2 seeds" in Path("runs/small/report.html").read_text()
    assert "did you mean '50%'?" in fails(capsys, "retrain", "runs/small", "--budget", "50.5%")
    assert "autoslim slim runs/small --budget 12%" in fails(capsys, "retrain", "runs/small", "--budget", "12%")
    error = fails(capsys, "retrain", config, "--run-dir", "nowhere", "--budget", "50%")
    assert "is no run directory" in error
    assert not (in_tmp / "nowhere").exists()


def test_the_same_net_or_the_whole_run_is_refused_and_the_owner_named(in_tmp: Path) -> None:
    root = in_tmp / "run"
    me = f"pid {os.getpid()} on {platform.node()}"
    with exclusive(root, ["50%"]):
        with exclusive(root, ["25%"]):  # another net: side by side
            pass
        with pytest.raises(RunError, match=me), exclusive(root, ["50%"]):
            raise AssertionError
        with (
            pytest.raises(RunError, match=rf"50% is in use by another autoslim process \({me}, since"),
            exclusive(root),
        ):
            raise AssertionError
    with exclusive(root, ["50%"]), exclusive(root, ["50%"], 1), exclusive(root, ["50%"], 2):
        with pytest.raises(RunError, match=me), exclusive(root, ["50%"], 2):
            raise AssertionError("not reached")
        with pytest.raises(RunError, match=me), exclusive(root):
            raise AssertionError("not reached")
    with exclusive(root), pytest.raises(RunError, match=me), exclusive(root, ["25%"]):
        raise AssertionError
    with exclusive(root), pytest.raises(RunError, match=f"run is in use .*{me}"), exclusive(root):
        raise AssertionError
    with exclusive(root):  # all of it was given back
        pass
    assert not list(root.rglob("*.owner"))


def test_a_killed_process_holds_nothing(in_tmp: Path) -> None:
    code = "import os, pathlib; from autoslim.run import exclusive\nwith exclusive(pathlib.Path('run')): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=False).returncode == 9
    with exclusive(in_tmp / "run"):
        pass


def test_a_directory_that_cannot_be_written_is_one_line(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **options: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    with pytest.raises(RunError, match="cannot be used as a run directory: Read-only file system"), exclusive(in_tmp):
        raise AssertionError
