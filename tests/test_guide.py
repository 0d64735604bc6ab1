"""docs/your_model.md as a new user reads it: its files written, its commands run, from images to an ONNX file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import autoslim
from autoslim.cli import main

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "your_model.md").read_text()


def test_the_guide_runs_as_it_stands(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("PIL", "onnx", "onnxscript", "onnxruntime", "plotly"):
        pytest.importorskip(package)
    pattern = r"<!-- file: (\S+) -->\n```\w+\n(.*?)```|```sh\n(.*?)```"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(autoslim.__file__).parent.parent), "."])}
    ran = 0
    for name, content, commands in re.findall(pattern, GUIDE, re.S):
        if name:
            if name == "make_images.py":  # fewer of them
                content = content.replace("1500", "300").replace("300)", "100)")
            Path(name).write_text(content)
        for command in commands.splitlines():
            program, *arguments = command.split()
            ran += 1
            if program == "autoslim":
                assert main([*arguments, *([] if arguments[0] == "inspect" else ["--threads", "1"])]) == 0, command
            else:
                subprocess.run([sys.executable, *arguments], check=True, env=environment)
    assert ran == 10
    mine, tuned = (json.loads(Path(f"runs/{run}/results.json").read_text()) for run in ("mine", "tuned"))
    assert [subnet["budget"] for subnet in tuned["subnets"]] == ["50%"]
    assert [subnet["budget"] for subnet in mine["subnets"]] == ["70%", "50%"]
    assert all(subnet["accuracy"]["uniform"] is not None for subnet in (*mine["subnets"], *tuned["subnets"]))
    assert Path("runs/mine/subnets/50%/model.onnx").exists()
    assert Path("runs/mine/subnets/70%/model.onnx").exists()
    assert "sorted: " in capsys.readouterr().err


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", GUIDE):
        if "://" not in target:
            assert (ROOT / "docs" / target).exists(), target
    assert all(path.name in GUIDE for path in (ROOT / "examples").glob("*.py"))
