"""A run is a directory: where each file lies, which configuration it belongs to, and who may write."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from autoslim._version import __version__
from autoslim.config import Config, make_config, read_yaml
from autoslim.cost import as_spelt
from autoslim.errors import ConfigError, RunError, nearest
from autoslim.files import append_record, keep_records, write_whole
from autoslim.records import EPOCH, read_lines
from autoslim.space import name_of_ratio

# the path of the search is kept for other budgets; the others change nothing that has been computed
_MAY_CHANGE = {
    "slim.budgets",
    "data.workers",
    "data.prefetch",
    *(f"{part}.{key}" for part in ("train", "retrain") for key in ("on_nan", "checkpointing", "checkpoint_minutes")),
}
_BEFORE_SEARCH = {"slim.batch_size", "slim.memory_gb", "slim.keep_gb"}  # where they turn out to be too much memory
_SEED = "seed-"  # before the number, as name of a directory


_ANY_RATIO = ("us-net", "nonuniform-us-net")  # trained at all widths of a range


@dataclass(frozen=True)
class Run:
    """The files of one run (DESIGN: `config.yaml space.json supernet/ train.jsonl slim.jsonl subnets/ ...`)."""

    root: Path
    config: Config
    provenance: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.root.resolve().name

    @property
    def space(self) -> Path:
        """The channel space that is searched."""
        return self.root / "space.json"

    @property
    def data(self) -> Path:
        """Which images were held out, and what the data was."""
        return self.root / "data.json"

    @property
    def supernet(self) -> Path:
        """Directory of the supernet's tensors and figures."""
        return self.root / "supernet"

    @property
    def start(self) -> Path:
        """The tensors that training starts from, where they are pretrained or sorted."""
        return self.supernet / "start.safetensors"

    @property
    def plain(self) -> Path:
        """Directory of the network after its plain epochs, its channels sorted, if there are such epochs."""
        return self.supernet / "plain"

    @property
    def train_log(self) -> Path:
        """One line per epoch of every training."""
        return self.root / "train.jsonl"

    def log_epoch(self, record: Mapping[str, Any]) -> None:
        """Add a line to `train_log`, which several processes that retrain different nets may share."""
        with self._train_lock():
            append_record(self.train_log, record)

    def drop_epochs(self, stage: str, after: int) -> None:
        """Take the lines of a training after an epoch out of `train_log`."""
        with self._train_lock():
            lines = read_lines(self.train_log, EPOCH)
            kept = [line for line in lines if line["stage"] != stage or line["epoch"] <= after]
            if len(kept) < len(lines):
                keep_records(self.train_log, kept)

    def _train_lock(self) -> FileLock:
        return FileLock(self.root / ".train.lock", timeout=60)

    @property
    def slim_log(self) -> Path:
        """One line per greedy step."""
        return self.root / "slim.jsonl"

    def race(self, step: int) -> Path:
        """What a race learned in one greedy step, counted from 1."""
        return self.root / "race" / f"{step:04}.safetensors"

    @property
    def batches(self) -> Path:
        """The batches of the search, once it has begun: other ones would give other scores."""
        return self.root / "batches.json"

    def exchange_log(self, budget: str) -> Path:
        """One line per exchange of bins after the greedy steps."""
        return self.subnet(budget) / "exchange.jsonl"

    @property
    def latency_table(self) -> Path:
        """The latency table that budgets of this run were taken by, if there are any."""
        return self.root / "latency.csv"

    @property
    def is_begun(self) -> bool:
        """Was anything computed that a later stage goes on from? Locks are nothing, nor are files of a failed start."""
        found = (*self.root.glob("joint/*/*"), *self.root.glob("subnets/*/[!.]*.*"))
        return self.supernet.exists() or self.slim_log.exists() or bool(found)

    def joint(self, kind: str) -> Path:
        """Directory of an S-Net of the nets found ("retrained"), or of the uniform ones."""
        return self.root / "joint" / kind

    @property
    def results(self) -> Path:
        """The sum of the run."""
        return self.root / "results.json"

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.root / "report.html"

    def subnet(self, budget: str) -> Path:
        """Directory of the net found for a budget."""
        return self.root / "subnets" / _slug(budget)

    def seeded(self, budget: str, seed: int) -> Path:
        """Directory of that net retrained by a seed: of its own, if it is not the seed of the run."""
        return self.subnet(budget) if seed == self.config.seed else self.subnet(budget) / f"{_SEED}{seed}"

    def seeds(self, budget: str) -> dict[int, Path]:
        """Figures of the same net retrained by other seeds than that of the run."""
        paths = self.subnet(budget).glob(f"{_SEED}*/metrics.json")
        numbers = {path.parent.name.removeprefix(_SEED): path for path in paths}
        return {int(number): numbers[number] for number in sorted(numbers) if number.lstrip("-").isdecimal()}


def open_run(root: Path, config: Config) -> Run:
    """A run directory that is still empty, or the one that was begun with this configuration.

    Nothing is written before `begin_run`, and until something was computed the configuration may change. Raises
    `RunError`, naming the keys that differ, if it was begun with another one. What may change at any time: the budgets,
    for the path of the search is kept, the ratios of a US-Net within the range that it was trained for, and what no
    result depends on (`on_nan`, `checkpointing`, how many processes read images); and the batches of the search before
    its first step. `threads` left open in `config` are those the run was begun with.
    """
    slugs = [_slug(budget) for budget in config.slim.budgets]
    if len(set(slugs)) < len(slugs):
        raise ConfigError(
            f"slim.budgets: {', '.join(config.slim.budgets)} would share a directory; write them alike once"
        )
    if not (root / "config.yaml").exists():
        if root.exists() and (not root.is_dir() or any(not p.name.startswith(".lock") for p in root.iterdir())):
            raise RunError(f"{root} exists and is no run directory; choose another with --run-dir")
        return _new_run(root, config)
    run = read_run(root)
    if config.threads is None:
        config = config.model_copy(update={"threads": run.config.threads})
    before, after = _flat(run.config.plain()), _flat(config.plain())
    different = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    may_change = _MAY_CHANGE | ({"ratios"} if trained_range(config) == trained_range(run.config) else set())
    may_change |= set() if run.slim_log.exists() else _BEFORE_SEARCH
    if not set(different) - may_change:
        return replace(run, config=config)
    if not run.is_begun:
        return _new_run(root, config)
    first = ", ".join(f"{key} is {before.get(key)!r} there and {after.get(key)!r} now" for key in different[:3])
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    raise RunError(f"{root} was begun with another configuration: {first}{more}; choose another --run-dir")


def left_out(run: Run) -> list[str]:
    """Budgets whose nets lie in the run directory, taken or found before, and which its configuration has no longer."""
    if not (run.root / "config.yaml").exists():
        return []
    known = {_slug(budget) for budget in run.config.slim.budgets}
    before = read_run(run.root).config.slim.budgets
    return [each for each in before if _slug(each) not in known and (run.subnet(each) / "metrics.json").exists()]


def begin_run(run: Run, space_json: str) -> None:
    """Write `config.yaml` and `space.json`, once everything that can be checked beforehand was.

    What a failed start left is removed: it may have had another configuration.
    """
    if not run.is_begun:
        write_whole(run.space, space_json)
        for leftover in (run.train_log, run.latency_table):
            leftover.unlink(missing_ok=True)
    keep_config(run)


def remove_net(run: Run, budget: str) -> None:
    """Remove what was trained and exported of the net of a budget; its widths and figures stay."""
    directory = run.subnet(budget)
    for name in ("model.safetensors", "model.onnx", "checkpoint.safetensors"):
        (directory / name).unlink(missing_ok=True)
    for below in (directory / "uniform", *directory.glob(f"{_SEED}*")):
        shutil.rmtree(below, ignore_errors=True)


def _new_run(root: Path, config: Config) -> Run:
    return Run(root, config.model_copy(update={"threads": config.threads or available_cpus()}), provenance())


def keep_config(run: Run) -> None:
    """Write `config.yaml`, unless it says the same already."""
    provenance = yaml.safe_dump({"provenance": dict(run.provenance)}, sort_keys=False)
    path, text = run.root / "config.yaml", run.config.to_yaml() + provenance
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)


def read_run(root: Path) -> Run:
    """The run that lies in `root`; `RunError` if there is none."""
    path = root / "config.yaml"
    if not path.is_file():
        raise RunError(f"{root} is no run directory: it has no config.yaml; begin one with: autoslim run CONFIG.yaml")
    values = read_yaml(path)
    provenance = values.pop("provenance", {})
    return Run(root, make_config(values, str(path)), provenance if isinstance(provenance, dict) else {})


def trained_range(config: Config) -> tuple[float, float] | None:
    """The width ratios that a net is trained for, all between these two; None if it knows only those of its list."""
    if config.system not in _ANY_RATIO:
        return None
    return (min(config.ratios), max(config.ratios)) if config.system == "us-net" else (config.space.min_ratio, 1.0)


def grown_ratios(root: Path, config: Config, asked: Sequence[float]) -> list[float]:
    """The ratios of a trained run with those that are asked for; what cannot be is refused, with what would work."""
    known = trained_range(config)
    if known is None:
        other = "its nets are found by budgets: slim --budget" if config.system == "autoslim" else _GIVEN
        raise ConfigError(f"slim --ratio: system {config.system} does not run at any ratio; {other}")
    low, high = known
    for ratio in asked:
        if not low <= ratio <= high:
            raise ConfigError(
                f"slim --ratio {ratio:g}: this {config.system} has the widths from {low:.3g} to {high:g}; choose one "
                "of those"
            )
    if not (root / "supernet" / "metrics.json").exists():
        raise RunError(f"slim --ratio: {root} is not trained yet; set ratios=[...], or first: autoslim run")
    names = {name_of_ratio(ratio) for ratio in config.ratios}
    return [*config.ratios, *(ratio for ratio in dict.fromkeys(asked) if name_of_ratio(ratio) not in names)]


_GIVEN = "its widths are those of the key ratios, trained together (us-net is the one of any ratio)"


def check_searched(root: Path, config: Config) -> None:
    """`ConfigError` for a budget asked of a system that searches nothing, with what would work."""
    if config.system == "autoslim":
        return
    other = f"autoslim slim {root} --ratio 0.5" if config.system in _ANY_RATIO else _GIVEN
    raise ConfigError(f"slim --budget: system {config.system} searches nothing; {other}")


def chosen_budgets(root: Path, config: Config, asked: Sequence[str], seed: int | None = None) -> list[str]:
    """Those of the nets of a run that are asked for, as text or as the name of their directory; all of them by a seed.

    None means the run as a whole.
    """
    if not asked and seed is None:
        return []
    read_run(root)  # or there is none
    if config.system not in ("autoslim", "i-net") or config.retrain.jointly:
        how = "retrain.jointly=true" if config.retrain.jointly else f"system {config.system}"
        option = "--budget" if asked else "--seed"
        raise ConfigError(f"retrain {option}: with {how} the nets are trained together, not one by one")
    known = list(config.slim.budgets)
    if config.system == "i-net":
        known = [name_of_ratio(ratio) for ratio in config.ratios]
    names = {_slug(text): text for text in known}
    if config.system == "autoslim":
        asked = [text if _slug(text) in names else as_spelt([text], known)[0] for text in asked]
    for text in asked:
        if _slug(text) not in names:
            more = f"; one more: autoslim slim {root} --budget {text}" if config.system == "autoslim" else ""
            raise ConfigError(f"retrain --budget {text}: {root} has no such net; {nearest(text, known)}{more}")
    return [names[_slug(text)] for text in dict.fromkeys(asked or known)]


_TURN_SECONDS = 5.0  # processes that retrain one net each hold the lock of the whole run for a moment


@contextmanager
def exclusive(root: Path, budgets: Sequence[str] = (), seed: int | None = None) -> Iterator[None]:
    """Only one process at a time works on a run directory; `RunError`, naming it, for a second one.

    With `budgets` only their nets are taken, and other processes may work on other nets of the run at the same time;
    with a `seed` only what that makes of them. A kill releases everything.
    """
    with ExitStack() as held:
        with ExitStack() as turn:
            turn.enter_context(_lock(root, _TURN_SECONDS))
            below = () if seed is None else (f"{_SEED}{seed}",)
            directories = [Path(root, "subnets", _slug(budget), *below) for budget in budgets]
            others = [*root.glob("subnets/*/.lock"), *root.glob(f"subnets/*/{_SEED}*/.lock")]
            for directory in directories or (lock.parent for lock in sorted(others)):
                held.enter_context(_lock(directory, 0))
            if not budgets:
                held.enter_context(turn.pop_all())
        for directory in directories or [root]:
            for leftover in directory.rglob(".*.part"):  # of a file that a kill kept from appearing
                inside = leftover.relative_to(directory).parts
                if not directories or not inside[0].startswith(_SEED):  # other processes write there
                    leftover.unlink(missing_ok=True)
        yield


@contextmanager
def _lock(directory: Path, seconds: float) -> Iterator[None]:
    """Hold the lock of a directory, and leave a note of who does."""
    lock, note = FileLock(directory / ".lock"), directory / ".lock.owner"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=seconds)
    except Timeout:
        raise RunError(
            f"{directory} is in use by another autoslim process{_owner(note)}; wait for it or choose another --run-dir"
        ) from None
    except OSError as error:
        raise RunError(
            f"{directory} cannot be used as a run directory: {error.strerror or error}; choose another with --run-dir"
        ) from error
    try:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        with suppress(OSError):  # a full disk: what follows will say so
            note.write_text(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now}), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            note.unlink(missing_ok=True)
        lock.release()


def _owner(note: Path) -> str:
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        return f" (pid {known['pid']} on {known['host']}, since {known['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def available_cpus() -> int:
    """The CPUs this process may use: threads of a run that says nothing of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _slug(budget: str) -> str:
    return re.sub(r"[^A-Za-z0-9.%_-]+", "-", budget).strip("-.")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def provenance() -> dict[str, Any]:
    """Who made the run: version, commit of the sources (if they are a checkout), machine, date."""
    here = Path(__file__).parent
    commit = None
    try:
        shown = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "run.py"], capture_output=True, text=True, timeout=10, check=False
        )
        commit = shown.stdout.strip() or None if tracked.stdout.strip() else None
    except (OSError, subprocess.SubprocessError):
        pass  # no git: the version has to do
    return {
        "version": __version__,
        "commit": commit,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {available_cpus()} CPUs, "
        f"Python {platform.python_version()}, torch {metadata.version('torch')}",
    }
