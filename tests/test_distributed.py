"""Two processes on CPU stand for many GPUs: what they compute together is what one computes alone."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import autoslim
import ranks
from autoslim.distributed import joined
from autoslim.errors import ConfigError, DataError
from autoslim.launch import launched
from test_pipeline import artefacts, config, run

__all__ = ["config"]
HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(autoslim.__file__).parents[1]), str(HERE)]),
    "OMP_NUM_THREADS": "1",
}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def together(count: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Start ranks as a launcher would."""
    port = str(free_port())
    processes = []
    for rank in range(count):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment = ENVIRONMENT | {key: str(value) for key, value in variables.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    return processes


def case(name: str, tmp_path: Path, count: int = 2) -> Any:
    path = tmp_path / f"{name}.json"
    processes = together(count, str(HERE / "ranks.py"), name, str(path))
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, outputs
    return json.loads(path.read_text())


def close(one: Any, other: Any, tolerance: float = 1e-9) -> bool:
    return torch.allclose(torch.tensor(one).double(), torch.tensor(other).double(), rtol=tolerance, atol=tolerance)


def test_gradients_are_those_of_one_process_on_the_joined_batch_by_one_all_reduce(tmp_path: Path) -> None:
    found = case("gradients", tmp_path)
    alone = ranks.supernet()
    ((images, targets),) = ranks.batches(1)
    losses = autoslim.sandwich_backward(alone, images, targets, loss=nn.functional.cross_entropy, rng=random.Random(3))
    for name, parameter in alone.named_parameters():
        assert parameter.grad is not None
        assert close(found["gradients"][name], parameter.grad.tolist()), name
    assert found["losses"] == pytest.approx(losses, abs=1e-9)
    assert found["reduced"] == [1, 1, 1]  # for the four nets and the losses


def test_nets_in_distributed_data_parallel_get_the_gradients_of_one_process(tmp_path: Path) -> None:
    found = case("wrapped", tmp_path)
    shared, switches = ranks.supernet(), ranks.switchable()
    for images, targets in ranks.batches(2, 8):
        autoslim.sandwich_backward(shared, images, targets, rng=random.Random(3), **ranks.LOSS)
        autoslim.switch_backward(switches, images, targets, distill=True, **ranks.LOSS)
    for name, alone in (("supernet", shared), ("switches", switches)):
        gradients = {key: p.grad.tolist() for key, p in alone.named_parameters() if p.grad is not None}
        assert gradients.keys() == found[name]["gradients"].keys()
        assert all(close(found[name]["gradients"][key], gradient) for key, gradient in gradients.items())
    assert found["supernet"]["reduced"] == 1  # for two batches of four nets
    assert found["switches"]["reduced"] == 2  # and which parameters were used


def test_training_is_that_of_one_process_and_ranks_draw_widths_of_their_own(tmp_path: Path) -> None:
    found = case("training", tmp_path)
    model, recipe = ranks.net(), autoslim.Recipe(epochs=2, lr=0.05, accumulate=2, clip_norm=1.0)
    logs = list(autoslim.retrain(model, ranks.batches(5), recipe, seed=3))
    assert found["losses"] == pytest.approx([log.losses["loss"] for log in logs], abs=1e-9)
    assert all(close(found["weights"][name], p.tolist()) for name, p in model.named_parameters())
    first, second = found["drawn"]
    assert first != second
    assert found["shared"][0] == found["shared"][1]
    assert found["statistics"][0] == found["statistics"][1]  # running statistics of rank 0


def test_a_loss_that_is_no_number_or_a_signal_on_one_rank_is_so_on_all(tmp_path: Path) -> None:
    found = case("nan_on_one_rank", tmp_path)
    assert found["skipped"] == [1, 1]
    assert found["weights"][0] == found["weights"][1]


def test_the_search_takes_the_path_of_one_process_on_every_rank(tmp_path: Path) -> None:
    found = case("search", tmp_path)
    alone, images, seen = ranks.searched(), ranks.batches(7, 30, torch.float32), set()
    for name, kind in (
        ("exhaustive", autoslim.Judge),
        ("reuse", autoslim.ReuseJudge),
        ("racing", autoslim.RacingJudge),
    ):
        for rule in ("score", "score-per-cost"):
            judge = kind(alone, images, also="accuracy")
            steps = autoslim.greedy_slim(alone.space, judge, autoslim.MacCost(alone.space), ["30%"], rule=rule)
            path = [[step.group, step.cost, step.score, *judge.also_of(step.widths)] for step in steps]
            assert len(path) > 3
            seen |= {step[-1] for step in path}
            assert found["paths"][f"{name} {rule}"] == path  # to the bit, and on as many images
    assert all(paths == found["paths"] for paths in found["all"])
    assert min(seen) < 210  # racing decided steps before the last batch, and in the middle of a round too


def test_shares_are_disjoint_and_whole() -> None:
    ((images, targets),) = ranks.batches(1, 7)
    parts = [ranks.share_of((images, targets), autoslim.distributed.World(rank, 3)) for rank in range(3)]
    assert sorted(len(part[1]) for part in parts) == [2, 2, 3]
    assert torch.equal(torch.cat([part[0] for part in parts]).sum(0), images.sum(0)) or torch.allclose(
        torch.cat([part[0] for part in parts]).sum(0), images.sum(0)
    )
    with pytest.raises(DataError, match="cannot be shared by 9"):
        ranks.share_of((images, targets), autoslim.distributed.World(0, 9))
    from autoslim.data import Batches, ImageSet

    data = ImageSet(torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1), torch.arange(20))
    whole = Batches(data, 6, mean=[0], std=[1], shuffle=True, drop_last=True, seed=5)
    shares = [
        Batches(data, 6, mean=[0], std=[1], shuffle=True, drop_last=True, seed=5, share=(rank, 4)) for rank in range(4)
    ]
    assert len(whole) == len(shares[1])
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(torch.cat([labels for _, labels in parts]).tolist()) == sorted(batch[1].tolist())


def test_a_broken_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched().size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(autoslim.AutoSlimError, match="RANK is missing"):
        launched()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(ConfigError, match="2 processes were started on this machine, and there is 1 GPU"),
        joined("cuda"),
    ):
        pass


# --- whole runs ---------------------------------------------------------------------------------------------------


def cli(count: int, *arguments: object) -> list[subprocess.Popen[str]]:
    return together(count, "-m", "autoslim", *(str(argument) for argument in arguments))


def finished(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[tuple[str, str]]]:
    outputs = [process.communicate(timeout=400) for process in processes]
    return [process.returncode for process in processes], outputs


def wait_for_epochs(root: Path, count: int, processes: list[subprocess.Popen[str]]) -> None:
    log = root / "train.jsonl"
    for _ in range(15000):  # a busy machine takes a minute to import torch
        if log.exists() and len(log.read_text().splitlines()) >= count:
            return
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.02)
    raise AssertionError("no epoch was finished")


def test_a_run_of_two_ends_as_it_would_have_without_a_lost_process_and_may_go_on_alone(
    config: Path, in_tmp: Path
) -> None:
    options = ["--set", "train.epochs=6", "--set", "slim.batch_size=50"]
    codes, outputs = finished(cli(2, "run", config, *options, "--run-dir", "whole"))
    assert codes == [0, 0], outputs
    assert outputs[1] == ("", "")  # rank 0 alone speaks
    assert "2 processes share the work" in outputs[0][1]
    whole = artefacts(in_tmp / "whole")
    assert len(whole["train"]) == 6 + 4 * 2

    processes = cli(2, "run", config, *options, "--run-dir", "lost")
    wait_for_epochs(in_tmp / "lost", 2, processes)
    processes[1].kill()
    codes, outputs = finished(processes)
    assert codes[0] == 2
    (line,) = [line for line in outputs[0][1].splitlines() if line.startswith("error: ")]
    assert "lost contact with the other processes" in line
    assert "run the same command again" in line
    codes, outputs = finished(cli(2, "run", config, *options, "--run-dir", "lost"))
    assert codes == [0, 0], outputs
    assert artefacts(in_tmp / "lost") == whole

    # asked to stop in the middle, on one rank only; and going on with another number of processes
    processes = cli(2, "run", config, *options, "--run-dir", "alone")
    wait_for_epochs(in_tmp / "alone", 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = finished(processes)
    assert codes == [143, 143], outputs
    assert run("run", in_tmp / "alone") == 0
    alone = artefacts(in_tmp / "alone")
    assert [(line["stage"], line["epoch"]) for line in alone["train"]] == [
        (line["stage"], line["epoch"]) for line in whole["train"]
    ]
    assert alone["train"][:2] == whole["train"][:2]


def errors_in(*texts: str) -> list[str]:
    return [line for text in texts for line in text.splitlines() if line.startswith(("error: ", "Traceback"))]


ONLY_RANK_1 = """
import os
from small_net import net as usual
def net(**arguments):
    if os.environ.get("RANK") == "1":
        raise ValueError("only here")
    return usual(**arguments)
"""
OTHER_FILE = "sys.argv[2] += os.environ['RANK'].strip('0'); "
START = "import os, sys; from autoslim.__main__ import entry; {}sys.exit(entry())"


@pytest.mark.parametrize(
    ("first", "options", "expected"),
    [
        ("", ["--frobnicate"], "error: No such option: --frobnicate"),
        ("", ["--device", "cuda"], "error: device 'cuda' cannot be used: "),
        (OTHER_FILE, [], "error: rank 1 of 2: no configuration file"),
        (
            "",
            ["--set", "model=only.py:net"],
            "error: rank 1 of 2: model 'only.py:net' cannot be built: ValueError: only",
        ),
    ],
    ids=["option", "device", "no file on one machine", "model on one machine"],
)
def test_a_mistake_of_one_or_of_all_is_said_once(
    first: str, options: list[str], expected: str, config: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_tmp / "only.py").write_text(ONLY_RANK_1)
    monkeypatch.setitem(ENVIRONMENT, "CUDA_VISIBLE_DEVICES", "")
    codes, outputs = finished(together(2, "-c", START.format(first), "run", str(config), *options))
    assert codes == [2, 2], outputs
    (line,) = errors_in(*(err for _, err in outputs))
    assert line.startswith(expected)


def torchrun(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def workers_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """In the order of their ranks."""
    found = [p for p in psutil.Process(launcher.pid).children() if "autoslim" in " ".join(p.cmdline())]
    return sorted(found, key=lambda worker: int(worker.environ()["RANK"]))


def test_torchrun_does_not_end_the_process_that_says_what_is_wrong(config: Path, in_tmp: Path) -> None:
    (in_tmp / "other").mkdir()
    (in_tmp / "other" / "thesis.tex").touch()
    process = torchrun("-m", "autoslim", "run", config, "--run-dir", "other")
    _, err = process.communicate(timeout=400)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert lines == ["error: other exists and is no run directory; choose another with --run-dir"]


def test_a_killed_rank_0_ends_the_others_with_one_line(config: Path, in_tmp: Path) -> None:
    process = torchrun("-m", "autoslim", "run", config, "--run-dir", "lost", "--set", "train.epochs=50")
    wait_for_epochs(in_tmp / "lost", 2, [process])
    workers_of(process)[0].kill()
    _, err = process.communicate(timeout=400)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 1 of 2: ")
    assert "run the same command again" in line


@pytest.mark.slow
def test_torchrun_starts_lost_processes_again_from_the_last_checkpoint(config: Path, in_tmp: Path) -> None:
    process = torchrun(
        "--max-restarts", 2, "-m", "autoslim", "run", config, "--set", "train.epochs=20", "--run-dir", "again"
    )
    wait_for_epochs(in_tmp / "again", 2, [process])
    workers = workers_of(process)
    assert len(workers) == 2
    workers[1].kill()
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert "continues after epoch" in err
    lines = [json.loads(line) for line in (in_tmp / "again" / "train.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["stage"] == "supernet"] == list(range(1, 21))
    assert (in_tmp / "again" / "results.json").exists()
