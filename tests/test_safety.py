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
from forks import forks
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
WRONG: tuple[Any, ...] = (
    None,
    "x",
    "",
    [],
    {},
    -1,
    0,
    True,
    0.5,
    10**400,
    1e308,
    float("nan"),
    [[[]]],
    {"a": {}},
    [-1],
)


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
                said = named
            except AutoSlimError as error:
                tally.refused += 1
                said = str(error)
            except BaseException as error:
                raise AssertionError(f"{path.name}, {kind.__name__} {number}: {damaged[:300]!r}") from error
            assert named in said, f"{kind.__name__} {number}: {said}"
            assert len(said) < 2000, f"{kind.__name__} {number}: {said[:300]}"
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
            budgets = pipeline._budgets(opened.config, self.job.space, self.job.costs)
            return replace(self.job, run=opened, progress=progress, budgets=budgets)

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
    fuzz(60, root / "supernet/checkpoint.safetensors", train, sorts)
    (finished.whole / "supernet/checkpoint.safetensors").unlink()
    finished.restore()
    search = finished.command("slim", root, forget=("subnets/*/metrics.json",))
    fuzz(40, sorted(root.glob("race/*"))[-2], search, sorts)


def test_damaged_json_of_a_run(finished: Finished) -> None:
    root, sorts, by_line = finished.root, (*BYTES, *[other_json] * 5), (*BYTES, *[other_line] * 5)
    lookup = finished.command("slim", root, "--budget", "70%")  # loads no torch
    fuzz(60, root / "space.json", lookup, sorts)
    fuzz(50, root / "slim.jsonl", lookup, by_line)
    fuzz(40, root / "supernet/metrics.json", lookup, sorts)
    report = finished.command("report", root)
    fuzz(25, root / "subnets/50%/metrics.json", report, sorts)
    fuzz(25, root / "subnets/50%/widths.json", report, sorts)
    fuzz(25, root / "train.jsonl", report, by_line)
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


# --- what means harm ----------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it leaves a mark."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def refusal(read: Callable[[], Any]) -> str:
    with in_time(), pytest.raises(AutoSlimError) as caught:
        read()
    return str(caught.value)


def test_nothing_is_unpickled(in_tmp: Path, finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    harm = np.empty(3, dtype=object)
    harm[:] = [Evil()] * 3
    np.savez(in_tmp / "evil.npz", x_train=harm, y_train=harm, x_test=harm, y_test=harm, allow_pickle=True)
    assert "never loaded" in refusal(lambda: load_data(in_tmp / "evil.npz"))
    for name, content in (("evil.pth", {"state_dict": {"head.weight": Evil()}}), ("whole.pth", Evil())):
        torch.save(content, in_tmp / name)
        assert name in refusal(lambda name=name: load_pretrained(build_model(NET), in_tmp / name))
        assert name in fails(capsys, "run", finished.root.parent / "small.yaml", "--pretrained", name)
    for name in ("evil.pt", "evil.safetensors", "evil.npz"):
        (in_tmp / name).write_bytes(pickle.dumps(Evil(), protocol=2))
        read = load_data if name.endswith("npz") else lambda path: load_pretrained(build_model(NET), path)
        assert name in refusal(lambda name=name, read=read: read(in_tmp / name))
    subnet = finished.root / "subnets/50%/model.safetensors"
    good = subnet.read_bytes()
    subnet.write_bytes(pickle.dumps(Evil()))
    assert "damaged" in refusal(lambda: autoslim.load_subnet(subnet.parent))
    subnet.write_bytes(good)
    assert not (in_tmp / "executed").exists()


HOSTILE = [
    "model: !!python/object/apply:os.mkdir [executed]",
    "model: !!python/object/new:os.mkdir [executed]",
    "model: !!python/name:os.mkdir",
    "model: !!python/module:antigravity",
    "!!python/object/apply:os.mkdir [executed]",
    "model: os:mkdir\nmodel_args: {path: executed}",
    "model: posix:mkdir\nmodel_args: {path: executed}",
    "model: subprocess:run\nmodel_args: {args: [mkdir, executed]}",
    "model: builtins:exec\nmodel_args: {source: 'import os; os.mkdir(\"executed\")'}",
    "model: antigravity:fly",
    "model: torch:load\nmodel_args: {f: evil.pth, weights_only: false}",
    "model: torch.hub:load\nmodel_args: {repo_or_dir: ., model: net, source: local}",
    "model: torch.utils.cpp_extension:load\nmodel_args: {name: x, sources: []}",
    "model: numpy:load\nmodel_args: {file: evil.npz, allow_pickle: true}",
    "model: yaml:unsafe_load\nmodel_args: {stream: '!!python/object/apply:os.mkdir [executed]'}",
    "model: autoslim:mobilenet_v1\ndata: {source: 'os:abort'}",
    "model: autoslim:mobilenet_v1\ndata: {source: 'wds:pipe:mkdir executed'}",
    'model: autoslim:mobilenet_v1\ndata: {source: "no\\0thing.npz"}',
    'model: "no\\0thing.py:net"',
    'model: autoslim:mobilenet_v1\npretrained: "no\\0thing.pth"',
    'model: autoslim:mobilenet_v1\nlatency: {table: "no\\0thing.csv"}\nslim: {budgets: [latency_ms<=50%]}',
    "model: autoslim:mobilenet_v1\nseed: 99999999999999999999999",
    "model: autoslim:mobilenet_v1\nthreads: 99999999999",
    "model: autoslim:mobilenet_v1\nspace: {bins: 2001-99-99}",
    "model: autoslim:mobilenet_v1\nmodel_args: &a {width: *a}",
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)),
    "model_args: " + "[" * 20_000,
    "model_args: " + "{a: " * 900 + "}" * 900,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_configuration_runs_no_code(text: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(Evil(), in_tmp / "evil.pth")
    np.savez(in_tmp / "evil.npz", x_train=np.array([Evil()]), allow_pickle=True)
    (in_tmp / "hubconf.py").write_text("import os\nos.mkdir('executed')\n")
    (in_tmp / "evil.yaml").write_text(text)
    with in_time():
        assert len(fails(capsys, "run", "evil.yaml", "--threads", "1" if "threads" not in text else "2")) < 2000
    assert not (in_tmp / "executed").exists()
    assert not (in_tmp / "runs/evil/supernet").exists()


def test_a_saved_net_names_nothing_but_builders_of_networks(finished: Finished, in_tmp: Path) -> None:
    shutil.copytree(finished.root / "subnets/50%", in_tmp / "net")
    path = in_tmp / "net/model.safetensors"
    tensors, record = load_tensors(path)
    for name, arguments in (("os:mkdir", {"path": "executed"}), ("torch:load", {"f": "x"}), (3, {}), (None, [1])):
        save_tensors(path, tensors, record | {"model": name, "model_args": arguments})
        refusal(lambda: autoslim.load_subnet(in_tmp / "net"))
    assert not (in_tmp / "executed").exists()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*each) for each in chunks) + chunk(b"IEND", b"")


def test_bombs_are_not_unpacked(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = zlib.compress(bytes(10**6), 9)
    bombs = [
        png(60_000, 60_000, (b"IDAT", nothing)),
        png(2**31 - 1, 2**31 - 1, (b"IDAT", nothing)),
        png(8, 8, (b"zTXt", b"x\0\0" + zlib.compress(bytes(10**8), 9)), (b"IDAT", nothing)),
        png(8, 8, (b"iCCP", b"x\0\0" + zlib.compress(bytes(10**8), 9)), (b"IDAT", zlib.compress(b""))),
        png(0, 0, (b"IDAT", nothing)),
    ]
    for number, bomb in enumerate(bombs):
        for name in "ab":
            (in_tmp / f"{number}/{name}").mkdir(parents=True)
            for each in range(4):
                (in_tmp / f"{number}/{name}/{each}.png").write_bytes(bomb)
        assert str(number) in refusal(lambda number=number: load_data(in_tmp / str(number), image_size=16))
    images, labels = io.BytesIO(), io.BytesIO()
    np.save(labels, np.zeros(4, dtype=np.int64))
    np.lib.format.write_array_header_1_0(images, {"descr": "|u1", "fortran_order": False, "shape": (10**7, 1000, 1000)})
    for name, content in (("claims.npz", images.getvalue()), ("bomb.npz", images.getvalue() + bytes(10**7))):
        with zipfile.ZipFile(in_tmp / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for part in ("train", "test"):
                archive.writestr(f"x_{part}.npy", content)
                archive.writestr(f"y_{part}.npy", labels.getvalue())
        assert name in refusal(lambda name=name: load_data(in_tmp / name))
    raw = bytearray((in_tmp / "bomb.npz").read_bytes())  # says that it is 2 TB when it is unpacked
    with zipfile.ZipFile(in_tmp / "bomb.npz") as archive:
        size = struct.pack("<I", archive.getinfo("x_train.npy").file_size)
    (in_tmp / "bomb.npz").write_bytes(bytes(raw).replace(size, struct.pack("<I", 2**32 - 2)))
    assert "bomb.npz" in refusal(lambda: load_data(in_tmp / "bomb.npz"))


# --- disks --------------------------------------------------------------------------------------------------------


class FullAt:
    """The disk is full from the n-th write or fsync of the library on; half of that write is done."""

    def __init__(self, number: int) -> None:
        self.left = number

    def count(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open(self, *arguments: Any, **options: Any) -> Any:
        file = open(*arguments, **options)  # noqa: SIM115
        write = file.write

        def half(content: Any) -> Any:
            try:
                self.count()
            except OSError:
                write(content[: len(content) // 2])
                file.flush()
                raise
            return write(content)

        return WithHalfWrites(file, half)


class WithHalfWrites:
    def __init__(self, file: Any, write: Callable[[Any], Any]) -> None:
        self.file, self.write = file, write

    def __enter__(self) -> WithHalfWrites:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        number: int = self.file.fileno()
        return number


def test_a_disk_that_is_full_again_and_again_changes_nothing(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("slim.exchange=true", "slim.batch_size=30", "retrain.uniform=false", "retrain.epochs=1")
    options = [part for text in settings for part in ("--set", text)]
    assert run("run", config, *options, "--run-dir", "whole") == 0
    rng, errors, real = random.Random(0), Counter[str](), os.fsync
    for _ in range(60):
        disk = FullAt(rng.choice((2, 5, 9, 14, 19, 26, 33)))

        def fsync(descriptor: int, disk: FullAt = disk) -> None:
            disk.count()
            real(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fsync)
            patched.setattr(files, "open", disk.open, raising=False)
            capsys.readouterr()
            code = run("run", config, *options, "--run-dir", "full")
        if code == 0:
            break
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert code == 2
        assert "No space left on device; free some space and run the same command again" in line
        errors[re.sub(r"\d", "", Path(line.split("cannot write ")[1].split(":")[0]).name)] += 1
        assert not [*(in_tmp / "full").rglob("*.part")]
    assert code == 0
    assert errors.total() >= 4
    assert len(errors) >= 3, errors
    assert artefacts(in_tmp / "full") == artefacts(in_tmp / "whole")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_directory_that_cannot_be_written_is_named(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Simulated: to the superuser no directory is read-only."""

    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *rest: Any, **options: Any) -> Any:
            flags = rest[0] if rest else options.get("mode", 0)
            writes = flags & (os.O_WRONLY | os.O_RDWR) if real is os_open else real is os_mkdir or set("wa") & {*flags}
            if isinstance(path, (str, os.PathLike)) and "closed" in str(path) and writes:
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *rest, **options)

        return wrapped

    os_open, os_mkdir, plain = os.open, os.mkdir, open
    closed = in_tmp / "closed" / "run"
    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", refusing(os_mkdir))
        error = fails(capsys, "run", config, "--run-dir", closed)
        assert os.strerror(number) in error
        assert "--run-dir" in error
    closed.mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refusing(os_open))
        assert os.strerror(number) in fails(capsys, "run", config, "--run-dir", closed)
    with monkeypatch.context() as patched:
        patched.setattr(files, "open", refusing(plain), raising=False)
        error = fails(capsys, "run", config, "--run-dir", closed)
        assert "choose another directory with --run-dir" in error
    assert run("train", config, "--run-dir", closed, "--set", "train.epochs=1") == 0


# --- paths --------------------------------------------------------------------------------------------------------

NAMES = [
    "../../x",
    "/etc/x",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "x\0y",
    "CON",
    "nul.txt",
    "50%/../../x",
    "~",
    "$HOME",
    "-",
    "…",
]


def test_names_of_nets_stay_within_the_run(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    from autoslim.cost import Budget

    opened = read_run(finished.root)
    rng, accepted = random.Random(0), 0
    pieces = [*NAMES, "50%", "macs", "params", "<=", "=", ",", " ", "3M", "0.5x", "width 0.5", "latency_ms", "8"]
    for text in (*NAMES, *("".join(rng.choices(pieces, k=rng.randint(1, 5))) for _ in range(20_000))):
        try:
            Budget.parse_all(text)
        except AutoSlimError:
            continue
        accepted += 1
        path = opened.subnet(text)
        assert path.parent == opened.root / "subnets"
        assert re.fullmatch(r"[A-Za-z0-9%_][A-Za-z0-9.%_-]*[A-Za-z0-9%_]|[0-9]", path.name), text
        assert path.name.upper().split(".")[0] not in ("CON", "PRN", "AUX", "NUL")
    assert accepted > 100
    for name in NAMES:
        if "\0" not in name:
            for command in ("slim", "retrain"):
                fails(capsys, command, finished.root, f"--budget={name}")


def test_nothing_is_written_beside_the_run(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen() -> dict[str, int]:
        return {str(path): path.stat().st_size for path in in_tmp.rglob("*") if "runs/small" not in str(path)}

    (in_tmp / "runs").mkdir()
    before = seen()
    for name in NAMES[::2]:
        text = json.dumps(name)
        for key in ("model", "data.source", "latency.table", "pretrained", "system", "device", "slim.budgets"):
            late = ["--set", "slim.budgets=[latency_ms<=50%]"] if key == "latency.table" else []
            fails(capsys, "run", config, "--set", f"{key}={text}", *late, "--run-dir", "runs/small")
    assert seen() == before
    for name in ("..yaml", "...yaml"):  # a file of that name would make the run `runs/..`
        shutil.copy(config, in_tmp / name)
        assert "choose one with --run-dir" in fails(capsys, "run", name)
        (in_tmp / name).unlink()
    assert run("train", config, "--set", "train.epochs=1") == 0
    assert seen() == before


# --- two processes ------------------------------------------------------------------------------------------------


def sorted_log(root: Path) -> dict[str, Any]:
    """The artefacts of a run; processes that worked at the same time logged their epochs in any order."""
    found = artefacts(root)
    found["train"] = sorted(found["train"], key=lambda line: (line["stage"], line["epoch"]))
    return found


def started(*arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(autoslim.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "autoslim", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_processes_take_turns_or_one_is_refused(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--set", "train.epochs=3", "--set", "retrain.uniform=false", "--set", "retrain.epochs=1")
    assert run("run", config, *options, "--run-dir", "whole") == 0
    whole, root = sorted_log(in_tmp / "whole"), in_tmp / "shared"
    with forks(in_tmp / "first.txt") as one:
        said = [in_tmp / "first.txt", in_tmp / "second.txt"]
        beside = {"output": str(said[1])}
        train = ["train", config, *options, "--run-dir", root]
        codes = one.run(*train, beside=beside | {"arguments": [*map(str, train)]})[2:]
        assert sorted(codes) in ([0, 0], [0, 2]), [path.read_text() for path in said]
        if 2 in codes:
            refused = said[[*codes].index(2)].read_text()
            assert "is in use by another autoslim process (pid" in refused or "is in use by" in refused
        assert run("slim", root) == 0
        other = beside | {"arguments": ["retrain", str(root), "--budget", "params=30%"]}
        codes = one.run("retrain", root, "--budget", "50%", beside=other)[2:]
        assert codes == (0, 0), [path.read_text() for path in said]
    assert run("run", root) == 0
    assert sorted_log(root) == whole

    killed = in_tmp / "killed"
    process = started("train", config, *options, "--run-dir", killed)
    deadline = time.monotonic() + 120
    while not (killed / "supernet/checkpoint.safetensors").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGSTOP)  # it holds its lock for as long as we look
    assert f"pid {process.pid}" in fails(capsys, "train", config, *options, "--run-dir", killed)
    process.kill()
    process.communicate()
    assert run("train", config, *options, "--run-dir", killed) == 0  # its lock went with it
    assert artefacts(killed)["supernet/model.safetensors"] == whole["supernet/model.safetensors"]
