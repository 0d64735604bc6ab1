"""The Python of the README runs as it stands, with the user's own model and loader."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import autoslim
import nets

README = Path(__file__).parent.parent / "README.md"


def test_the_python_in_the_readme_runs(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"<!-- tested: .*? -->\n```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 3
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 20
    torch.manual_seed(0)
    labels = torch.arange(60) % 5
    images = torch.randn(60, 3, 8, 8) + labels.view(-1, 1, 1, 1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=20, shuffle=True)
    mine = types.ModuleType("my_project")
    mine.MyNet = lambda: nets.MENAGERIE["residual"]()[0]  # type: ignore[attr-defined]
    mine.train_loader = loader  # type: ignore[attr-defined]
    mine.held_out_batches = [(images[:30], labels[:30])]  # type: ignore[attr-defined]
    mine.example = images[:1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_project", mine)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    subnet, again, cost, space = (names[key] for key in ("subnet", "again", "cost", "space"))
    assert cost(names["steps"][-1].widths) <= 0.5 * cost(space.full())  # type: ignore[operator,index,attr-defined]
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in subnet.parameters())  # type: ignore[attr-defined]
    assert (in_tmp / "half" / "widths.json").exists()


def test_the_file_tree_names_every_module() -> None:
    text = README.read_text()
    source = README.parent / "src" / "autoslim"
    for path in source.iterdir():
        if path.suffix == ".py" and not path.name.startswith("_"):
            assert path.name in text, f"README's file tree lacks {path.name}"


def test_the_page_of_public_names_has_them_all() -> None:
    page = (README.parent / "docs" / "api.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) | {"__version__"} == set(autoslim.__all__)
