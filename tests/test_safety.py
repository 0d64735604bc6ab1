"""Nothing that a stranger gives crashes, hangs or runs code; full disks and second processes lose nothing.

A thousand damaged files are read the way a user would read them: each either is read, or ends in one line that names
it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import autoslim
from autoslim import files, pipeline
from autoslim.config import load_config
from autoslim.data import load_data
from autoslim.errors import AutoSlimError
from autoslim.export import load_tensors, save_tensors
from autoslim.models import build_model
from autoslim.pretrained import load_pretrained
from autoslim.progress import Progress
from autoslim.run import read_run
from autoslim.tables import LatencyCost, LatencyTable
from test_latency import invented
from test_pipeline import NET, artefacts, config, fails, run

__all__ = ["config"]  # the fixture
SECONDS = 60  # nothing takes one of them; a busy machine may
Damage = Callable[[bytes, random.Random], bytes]


# --- damage -------------------------------------------------------------------------------------------------------


def flipped(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 30))):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def cut_short(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice((0, 1, 7, 8, 9, len(content) - 1, rng.randrange(len(content))))]


def at_start(content: bytes, rng: random.Random) -> bytes:
    """Most formats say there what follows."""
    place = rng.randrange(min(len(content), 64))
    return content[:place] + rng.randbytes(rng.randint(1, 8)) + content[place + rng.randint(0, 8) :]


def with_a_span(content: bytes, rng: random.Random) -> bytes:
    """Something put in, left out, zeroed or repeated."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice((1, 4, 100, 1000)))
    span = content[start:end]
    between = rng.choice((b"", span + span, bytes(len(span)), rng.randbytes(len(span)), span + rng.randbytes(20)))
    return content[:start] + between + content[end:]


HUGE = (b"9" * 30, b"9" * 5000, b"1e999", b"-1", b"0", b"NaN", b"1e308", b"18446744073709551616", b"0.5", b'"x"', b"")


def with_another_number(content: bytes, rng: random.Random) -> bytes:
    places = [*re.finditer(rb"\d+", content[:20000])]
    if not places:
        return flipped(content, rng)
    place = rng.choice(places)
    return content[: place.start()] + rng.choice(HUGE) + content[place.end() :]


def foreign(content: bytes, rng: random.Random) -> bytes:
    """Something else altogether."""
    nested = rng.choice((b"[", b'{"a":', b"- ", b"&a [", b"{")) * 50_000
    others = (b"", b"\0" * 300, nested, b"PK\x03\x04" + rng.randbytes(50), b"\x89PNG\r\n\x1a\n", pickle.dumps([1]))
    others += (rng.randbytes(500), "ÿþ½".encode("utf-16"), b"%PDF-1.7\n", b"null", b"[]", b"{}", b"3", b'"text"', b"\n")
    return rng.choice(others)


BYTES: tuple[Damage, ...] = (flipped, cut_short, at_start, with_a_span, with_another_number, foreign)
WRONG: tuple[Any, ...] = (None, "x", "", [], {}, -1, 0, True, 0.5, 10**400, 1e308, float("nan"), [[[]]], {"a": {}}, [-1])


def changed(value: Any, rng: random.Random) -> Any:
    """Plain data with something of another type somewhere in it, or a key less."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice([*value])
        if rng.random() < 0.15:
            return {name: each for name, each in value.items() if name != key}
        return value | {key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        return [*value[:place], changed(value[place], rng), *value[place + 1 :]]
    return rng.choice(WRONG)


def other_json(content: bytes, rng: random.Random) -> bytes:
    return json.dumps(changed(json.loads(content), rng)).encode()


def other_line(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    line = json.dumps(changed(json.loads(lines[place]), rng)).encode() + b"\n"
    return b"".join([*lines[:place], *rng.choice(([line], [line], [], [lines[place]] * 2)), *lines[place + 1 :]])


def other_yaml(content: bytes, rng: random.Random) -> bytes:
    return yaml.safe_dump(changed(yaml.safe_load(content), rng)).encode()


def other_tensors(content: bytes, rng: random.Random) -> bytes:
    """A whole file, with its checksum, by someone who means harm."""
    with scratch(content) as path:
        tensors, record = load_tensors(path)
        name = rng.choice([*tensors]) if tensors else "x"
        was = tensors.get(name, torch.zeros(1))
        others: tuple[Any, ...] = (was.flatten()[:1], was[None], torch.zeros(0), was.to(torch.int8), was.double(), None)
        tensor = rng.choice(others)
        if rng.random() < 0.5:
            other = changed(record, rng)
            record = other if isinstance(other, dict) else {"other": other}
        elif tensor is None:
            tensors.pop(name, None)
        else:
            tensors[rng.choice((name, "x", "widths.0", "scores.0", "gained.x", "optimizer.x.y"))] = tensor.clone()
        save_tensors(path, tensors, record)
        return path.read_bytes()


@contextlib.contextmanager
def scratch(content: bytes) -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scratch.safetensors"
        path.write_bytes(content)
        yield path


# --- reading ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError(f"still not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Tally:
    """What became of damaged files."""

    read: int = 0
    refused: int = 0


TALLIES: dict[str, Tally] = {}


def fuzz(
    count: int,
    path: Path,
    read: Callable[[], Any],
    kinds: tuple[Damage, ...] = BYTES,
    *,
    named: str | None = None,
) -> None:
    """Read a file so many times, each time damaged in another way; it is as it was afterwards."""
    tally, named, original = Tally(), named or path.name, path.read_bytes()
    try:
        for number in range(count):
            rng = random.Random(f"{path.name} {number}")
            kind = kinds[number % len(kinds)]
            path.write_bytes(damaged := kind(original, rng))
            try:
                with in_time():
                    read()
                tally.read += 1
            except AutoSlimError as error:
                tally.refused += 1
                assert named in str(error), f"{kind.__name__} {number}: {error}"
                assert len(str(error)) < 2000, f"{kind.__name__} {number}: {str(error)[:300]}"
            except BaseException as error:
                raise AssertionError(f"{path.name}, {kind.__name__} {number}: {damaged[:300]!r}") from error
    finally:
        path.write_bytes(original)
    assert tally.refused >= count // 4
    TALLIES[path.name] = tally


class Refused(AutoSlimError):
    """What a command said on its way out."""


@dataclass
class Finished:
    """A run that is done, to be damaged: `root` is a copy of `whole`."""

    whole: Path
    root: Path
    job: pipeline.Job
    checkpoint: bytes

    def restore(self) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self.whole, self.root)

    def command(self, *arguments: object, forget: tuple[str, ...] = ()) -> Callable[[], None]:
        """A command line on the run, which is restored if it did anything. Network and data are prepared already."""

        def prepared(opened: Any, progress: Progress) -> pipeline.Job:
            return replace(self.job, run=opened, progress=progress)

        def read() -> None:
            for pattern in forget:
                for path in self.root.glob(pattern):
                    path.unlink()
            said = io.StringIO()
            with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stderr(said):
                patched.setattr(pipeline, "prepare", prepared)
                with contextlib.redirect_stdout(io.StringIO()):
                    code = run(*arguments)
            if code == 0 or forget:
                self.restore()
            if code:
                (line,) = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
                assert code == 2, line
                raise Refused(line)

        return read


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shapes_npz: Path) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("finished")
    values = {
        "model": NET,
        "data": {"source": str(shapes_npz), "holdout": 150, "augment": "none"},
        "space": {"bins": 4, "divisor": 4, "min_ratio": 0.25},
        "train": {"epochs": 3, "batch_size": 50, "lr": 0.05},
        "slim": {"budgets": ["50%"], "batch_size": 30},
        "retrain": {"epochs": 1, "batch_size": 50, "lr": 0.05, "uniform": False},
        "export": {"onnx": False},
        "calibration_images": 50,
        "threads": 1,
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(values))
    kept = []

    def keeping(path: Path, *rest: Any) -> None:
        save_tensors(path, *rest)
        if path.name == "checkpoint.safetensors" and path.parent.name == "supernet":
            kept.append(path.read_bytes())

    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(pipeline, "save_tensors", keeping)
        assert run("run", "small.yaml", "--run-dir", "whole") == 0
        shutil.copytree("whole", "root")
        job = pipeline.prepare(read_run(Path("root")), Progress())
        yield Finished(folder / "whole", folder / "root", job, kept[-1])


def test_damaged_safetensors(finished: Finished) -> None:
    root, sorts = finished.root, (*BYTES, other_tensors, other_tensors)
    subnet = root / "subnets/50%"
    fuzz(130, subnet / "model.safetensors", lambda: autoslim.load_subnet(subnet, lambda: build_model(NET)), sorts)
    for folder in (finished.root, finished.whole):
        (folder / "supernet/checkpoint.safetensors").write_bytes(finished.checkpoint)
    train = finished.command("train", root, forget=("supernet/model.safetensors",))
    fuzz(70, root / "supernet/checkpoint.safetensors", train, sorts)
    (finished.whole / "supernet/checkpoint.safetensors").unlink()
    finished.restore()
    search = finished.command("slim", root, forget=("subnets/*/metrics.json",))
    fuzz(50, sorted(root.glob("race/*"))[-2], search, sorts)


def test_damaged_json_of_a_run(finished: Finished) -> None:
    root, sorts, by_line = finished.root, (*BYTES, *[other_json] * 5), (*BYTES, *[other_line] * 5)
    lookup = finished.command("slim", root, "--budget", "70%")  # loads no torch
    fuzz(60, root / "space.json", lookup, sorts)
    fuzz(50, root / "slim.jsonl", lookup, by_line)
    fuzz(40, root / "supernet/metrics.json", lookup, sorts)
    report = finished.command("report", root)
    fuzz(50, root / "subnets/50%/metrics.json", report, sorts)
    fuzz(40, root / "subnets/50%/widths.json", report, sorts)
    fuzz(50, root / "train.jsonl", report, by_line)
    for folder in (root, finished.whole):
        (folder / "batches.json").write_text('{"batch_size": 30, "keep_bytes": 1000000}')
    fuzz(30, root / "batches.json", lambda: pipeline._fit(read_run(root), finished.job.space), sorts)
    data = finished.job.data
    fuzz(30, root / "data.json", lambda: pipeline._keep_record(read_run(root), data), sorts, named=str(root))


def test_damaged_configurations(finished: Finished, in_tmp: Path) -> None:
    shutil.copy(finished.root / "config.yaml", in_tmp / "some.yaml")
    text = (in_tmp / "some.yaml").read_text()
    (in_tmp / "some.yaml").write_text(text[: text.index("provenance")])
    fuzz(150, in_tmp / "some.yaml", lambda: load_config(in_tmp / "some.yaml"), (*BYTES, *[other_yaml] * 6))
    fuzz(30, finished.root / "config.yaml", finished.command("report", finished.root), (*BYTES, *[other_yaml] * 6))


def test_damaged_tables(in_tmp: Path) -> None:
    space = autoslim.trace(build_model(NET), torch.zeros(1, 1, 16, 16)).with_choices(4, 4, 0.25)
    path = in_tmp / "phone.csv"
    invented(space, 30).save(path)

    def read() -> None:
        table = LatencyTable.load(path)
        try:
            assert LatencyCost(space, table)(space.full()) >= 0
        except AutoSlimError as error:
            raise Refused(f"{path.name}: {error}") from error  # which table it was stands in the configuration

    fuzz(120, path, read)


def test_damaged_arrays(in_tmp: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (40, 8, 8), dtype=np.uint8)
    labels = np.arange(40) % 4
    for name, save in (("plain.npz", np.savez), ("packed.npz", np.savez_compressed)):
        save(in_tmp / name, x_train=images, y_train=labels, x_test=images[:9], y_test=labels[:9])
        fuzz(70, in_tmp / name, lambda name=name: load_data(in_tmp / name), (*BYTES, flipped, with_a_span))


def test_damaged_images(in_tmp: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in "ab":
        (in_tmp / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(in_tmp / f"images/{name}/{number}.png")
    kinds = (*BYTES, flipped, at_start, with_a_span)
    fuzz(140, in_tmp / "images/a/1.png", lambda: load_data(in_tmp / "images", image_size=16), kinds)


def test_damaged_weights(in_tmp: Path) -> None:
    from safetensors.torch import save_file

    model = build_model(NET)
    save_file(model.state_dict(), in_tmp / "weights.safetensors")
    torch.save(model.state_dict(), in_tmp / "weights.pth")
    for name in ("weights.safetensors", "weights.pth"):
        fuzz(50, in_tmp / name, lambda name=name: load_pretrained(build_model(NET), in_tmp / name))


def test_it_was_a_thousand_files() -> None:
    """After the tests above, in this process."""
    if len(TALLIES) < 16:
        pytest.skip("not all of this file was run in this process")
    print({name: (tally.read, tally.refused) for name, tally in TALLIES.items()})
    assert sum(tally.read + tally.refused for tally in TALLIES.values()) >= 1000
