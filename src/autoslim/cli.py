"""The command line. Nothing heavy is imported before a command needs it: `autoslim --help` knows no torch."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import traceback
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoslim._version import __version__
from autoslim.errors import AutoSlimError, ConfigError
from autoslim.interruption import Stopped, interruption
from autoslim.launch import launched

if TYPE_CHECKING:
    from autoslim.config import Config
    from autoslim.progress import Progress
    from autoslim.run import Run

app = typer.Typer(
    name="autoslim",
    help="Decide the channel number of every layer of a network for budgets of MACs, memory or latency.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_Target = Annotated[str, typer.Argument(help="A configuration file (YAML), or a run directory to go on with.")]
_Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override, as train.lr=0.1.")]
_RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Where the run lies (default: runs/NAME).")]
_Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
_Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
_System = Annotated[
    str | None, typer.Option("--system", help="autoslim, nonuniform-us-net, us-net, s-net, shared-bn or i-net.")
]
_Input = Annotated[
    str | None, typer.Option("--input", metavar="SHAPE", help="Shape of the example input, as 1,3,224,224.")
]
_OnNan = Annotated[
    str | None, typer.Option("--on-nan", metavar="stop|skip", help="What a loss that is not a number does.")
]
_Pretrained = Annotated[
    str | None,
    typer.Option("--pretrained", metavar="WEIGHTS", help="Start from these: default, a name of theirs, or a file."),
]
_SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Leave broken images out and count them.")]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a path in another language is no reason to fail at the end
    # among other processes a signal must not come between a mistake and the line that says so
    with nullcontext() if _is_alone() else interruption.caught():
        try:
            return _ended(arguments)
        except Stopped as stopped:
            text, code = f"stopped by {stopped}; run the same command again to go on", 128 + stopped.number
            with suppress(Stopped), interruption.waiting():  # a second SIGINT is not answered
                mistake = stopped.__context__
                if isinstance(mistake, AutoSlimError):  # was on its way here, as that a process is lost
                    return _fail(str(mistake), mistake)
                _fail(text, stopped, code)
            return code


def _ended(arguments: list[str] | None) -> int:
    """Run the command line, and say what ended it; its exit code."""
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="autoslim", standalone_mode=False)
        if code == _INTERRUPTED:  # how typer hands on a KeyboardInterrupt
            return _stopped()
        if broken := _unwritten():
            return _output_failed(broken)
    except AutoSlimError as error:
        return _fail(str(error), error)
    except KeyboardInterrupt:
        return _stopped()
    except SystemExit as error:  # in the code of a user, where it would end us as if all were well
        if isinstance(error.__context__, BrokenPipeError):  # typer's own, of a reader that has seen enough
            raise
        from autoslim.importing import describe

        return _fail(f"sys.exit() was called by code that autoslim runs: {describe(error)}", error)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # of files it is a RunError
            return _output_failed(_unwritten() or error)
        shown = getattr(error, "format_message", None)  # a mistake in the arguments, as click reports it
        if shown is None:
            if _is_out_of_memory(error):
                what = (str(error).strip().splitlines() or [type(error).__name__])[0]
                return _fail(
                    f"out of memory ({what[:200]}); take smaller batches (train.batch_size, slim.batch_size), smaller "
                    "images (data.image_size), or stream them (a lower data.memory_gb)",
                    error,
                )
            if type(error).__name__ == "Abort":
                return _stopped()
            if _is_alone():
                raise
            return _say_once(traceback.format_exc().rstrip(), error, 1)
        if type(error).__name__ != "NoArgsIsHelpError":
            return _fail(shown(), error)
        return _say_once(shown(), error, 2)
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from autoslim.memory import is_out_of_memory

    return is_out_of_memory(error)


def _unwritten() -> OSError | None:
    """What keeps the rest of the output from being written, as a full disk does; then it is dropped."""
    try:
        if sys.stdout is not None:  # as it is when closed
            sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):  # or Python would try once more at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def _output_failed(error: OSError) -> int:
    if error.errno == errno.EPIPE:  # of a reader that has seen enough, as `head`
        return 1
    return _fail(f"standard output cannot be written: {error.strerror or error}", error)


def _is_alone() -> bool:
    try:
        return launched().size == 1
    except ConfigError:  # what is wrong there is said by whoever needs it
        return True


def _stopped() -> int:
    return _fail("stopped; run the same command again to go on", KeyboardInterrupt(), _INTERRUPTED)


def _fail(text: str, error: BaseException, code: int = 2) -> int:
    """Say in one line what `error` means; returns the exit code."""
    text = " ".join(text.split())
    if not _is_alone() and not launched().is_main:
        if isinstance(error, Stopped):
            text = f"{text} (rank 0 says nothing: it may have been killed)"
        text = f"rank {launched().rank} of {launched().size}: {text}"
    return _say_once(f"error: {text}", error, code)


def _say_once(text: str, error: BaseException, code: int) -> int:
    """Of several processes that end together one speaks."""
    if _is_alone():
        print(text, file=sys.stderr)
        return code
    with interruption.waiting():
        from autoslim.distributed import one_voice

        with one_voice(error) as is_mine:
            if is_mine:
                print(text, file=sys.stderr, flush=True)
    return code


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"autoslim {__version__}")
        raise typer.Exit


@app.command()
def run(
    config: _Target,
    system: _System = None,
    set_: _Set = None,
    run_dir: _RunDir = None,
    device: _Device = None,
    threads: _Threads = None,
    skip_broken: _SkipBroken = False,
    on_nan: _OnNan = None,
    pretrained: _Pretrained = None,
    as_json: _Json = False,
) -> None:
    """Everything in a row: train the supernet, search, retrain, export, report. Continues where it was killed."""
    asked = _asked(set_, system=system, skip_broken=skip_broken, on_nan=on_nan, pretrained=pretrained)
    _stages(config, asked, run_dir, device, threads, as_json)


@app.command()
def inspect(
    target: Annotated[
        str, typer.Argument(help="A model (torchvision:resnet50, file.py:function, ...) or a YAML file.")
    ],
    input_shape: _Input = None,
    budget: Annotated[
        list[str] | None, typer.Option("--budget", help="Is it within reach? 300M, 50%, params=4M")
    ] = None,
    set_: _Set = None,
    as_json: _Json = False,
) -> None:
    """What can be slimmed, what is frozen and why, and whether budgets are within reach. Trains nothing."""
    from rich.console import Console

    from autoslim.inspection import inspect_model
    from autoslim.terminal import inspect_report

    config = _inspected(target, set_ or [], budget or [])
    asked = bool(budget) or _is_file(target) or any(text.startswith("slim.budgets") for text in set_ or [])
    shape = _shape(input_shape)
    facts = inspect_model(config, shape, from_data=_is_file(target), with_budgets=asked, progress=_progress())
    if as_json:
        print(json.dumps(facts))
    else:
        inspect_report(facts, Console(soft_wrap=False))
    missed = [entry for entry in facts["budgets"] if not entry["reachable"]]
    if missed:
        raise ConfigError(missed[0]["reason"])


@app.command()
def latency(
    target: Annotated[
        str, typer.Argument(help="A model (torchvision:resnet50, file.py:function, ...), a YAML file or a run.")
    ],
    input_shape: _Input = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="torch, torch.compile, onnxruntime or openvino.")
    ] = None,
    threads: _Threads = None,
    device: _Device = None,
    width: Annotated[float, typer.Option("--width", min=0.01, max=1.0, help="Width ratio of the net.")] = 1.0,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Show the net found for a budget, or the uniform one near it.")
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the table of operators here.")] = None,
    table: Annotated[str | None, typer.Option("--table", help="Use this table (CSV), measured elsewhere.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what was measured before.")] = False,
    top: Annotated[int, typer.Option("--top", min=1, help="How many operators to show.")] = 15,
    set_: _Set = None,
    as_json: _Json = False,
) -> None:
    """Measure how long each operator of a network takes over its widths, and show the hot layers of one net."""
    from rich.console import Console

    options = {"latency.runtime": runtime, "latency.threads": threads, "latency.table": table, "device": device}
    asked = [*(set_ or []), *(f"{key}={value}" for key, value in options.items() if value)]
    config = _inspected(target, asked, [])
    is_given = any(text.partition("=")[0] == "latency.table" for text in asked)
    if fresh and is_given and config.latency.table is not None:
        raise ConfigError(
            f"latency --fresh measures, and would not use the table {config.latency.table}; leave one of the two out"
        )
    from autoslim.inspection import latency_facts
    from autoslim.terminal import latency_report

    facts = latency_facts(
        config,
        _shape(input_shape),
        run=Path(target) if Path(target).is_dir() else None,
        from_data=_is_file(target),
        ratio=width,
        budget=budget,
        csv=csv,
        given=is_given,
        fresh=fresh,
        progress=_progress(),
    )
    if as_json:
        print(json.dumps(facts))
    else:
        latency_report(facts, Console(soft_wrap=False), top)


@app.command()
def published(as_json: _Json = False) -> None:
    """The nets the authors published: what they cost, and the accuracy they claim. Each can be built by its name."""
    from dataclasses import asdict

    from autoslim.published import WITHOUT_LISTS, published_nets

    if as_json:
        print(json.dumps([asdict(net) for net in published_nets()]))
        return
    from rich.console import Console

    from autoslim.terminal import published_table

    Console(soft_wrap=False).print(published_table(published_nets()))
    others = ", ".join(f"{name} ({top1:.1%})" for name, top1 in WITHOUT_LISTS.items())
    print(f"of the 13 nets of the paper these are missing, for their channel lists are not here: {others}")
    print("a name builds the net: autoslim inspect autoslim:published/mobilenet_v2-207m")


def _stage_command(name: str, help_text: str) -> None:
    """Each stage is a command with the same options."""

    def command(
        config: _Target,
        system: _System = None,
        set_: _Set = None,
        run_dir: _RunDir = None,
        device: _Device = None,
        threads: _Threads = None,
        skip_broken: _SkipBroken = False,
        on_nan: _OnNan = None,
        pretrained: _Pretrained = None,
        as_json: _Json = False,
    ) -> None:
        asked = _asked(set_, system=system, skip_broken=skip_broken, on_nan=on_nan, pretrained=pretrained)
        _stages(config, asked, run_dir, device, threads, as_json, name)

    app.command(name, help=help_text)(command)


_stage_command("train", "Train the supernet (or go on with it).")
_stage_command("export", "Measure latency and write ONNX files, checked against PyTorch.")
_stage_command("report", "Write results.json and report.html from what the run holds.")


@app.command()
def retrain(
    config: _Target,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", help="Only its nets; other processes may retrain those of other budgets meanwhile."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", help="Once more by this seed, beside those of the run; results.json has mean and spread."
        ),
    ] = None,
    system: _System = None,
    set_: _Set = None,
    run_dir: _RunDir = None,
    device: _Device = None,
    threads: _Threads = None,
    skip_broken: _SkipBroken = False,
    on_nan: _OnNan = None,
    as_json: _Json = False,
) -> None:
    """Train the nets found, and uniform ones of equal MACs by the same recipe."""
    asked = _asked(set_, system=system, skip_broken=skip_broken, on_nan=on_nan)
    _stages(config, asked, run_dir, device, threads, as_json, "retrain", budgets=budget or [], seed=seed)


@app.command()
def slim(
    config: _Target,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", help="One more, as 37% or 'macs<=50%, params<=2M'; at once if searched."),
    ] = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option("--ratio", help="One more width of a trained us-net or nonuniform-us-net, as 0.63; at once."),
    ] = None,
    system: _System = None,
    set_: _Set = None,
    run_dir: _RunDir = None,
    device: _Device = None,
    threads: _Threads = None,
    skip_broken: _SkipBroken = False,
    pretrained: _Pretrained = None,
    as_json: _Json = False,
) -> None:
    """Search all budgets in one greedy pass on held-out images, or take one more from the path of a finished search."""
    asked = _asked(set_, system=system, skip_broken=skip_broken, pretrained=pretrained)
    if not budget and not ratio:
        _stages(config, asked, run_dir, device, threads, as_json, "slim")
        return
    if launched().size > 1:
        raise ConfigError("slim --budget and --ratio take a net from what is there; start them without torchrun")
    from autoslim.cost import as_spelt
    from autoslim.path import found_on_path, take_from_path
    from autoslim.run import check_searched, exclusive, grown_ratios, keep_config, open_run

    root, wanted = _opened(config, asked, run_dir, device, threads)
    if budget:
        check_searched(root, wanted)
    if ratio:
        asked.append(f"ratios={json.dumps(grown_ratios(root, wanted, ratio))}")
        _stages(config, asked, run_dir, device, threads, as_json, "slim", "export", "report")
        return
    assert budget is not None
    budget = as_spelt(budget, wanted.slim.budgets)
    budgets = (*wanted.slim.budgets, *(text for text in budget if text not in wanted.slim.budgets))
    wanted = _checked(wanted, budgets, config)
    with exclusive(root):
        opened = open_run(root, wanted)
        taken = [take_from_path(opened, text) for text in budget]
        if None not in taken:
            keep_config(opened)
    if None in taken:  # the search goes on
        asked.append(f"slim.budgets={json.dumps(budgets)}")
        opened, _ = _worked(config, asked, run_dir, device, threads, "slim")
        pairs = zip(budget, taken, strict=True)
        taken = [found_on_path(opened, text) if metrics is None else metrics for text, metrics in pairs]
    if as_json:
        print(json.dumps(taken))
        return
    from autoslim.terminal import taken_lines

    for line in taken_lines([metrics for metrics in taken if metrics], opened):
        print(line)


def _checked(config: Config, budgets: tuple[str, ...], where: str) -> Config:
    """The configuration with these budgets; `BudgetError` or `ConfigError` for one that cannot be read."""
    from autoslim.config import make_config

    values = config.plain()
    values["slim"]["budgets"] = list(budgets)
    return make_config(values, where)


def _asked(
    set_: list[str] | None,
    *,
    system: str | None,
    skip_broken: bool,
    on_nan: str | None = None,
    pretrained: str | None = None,
) -> list[str]:
    """Options that are short for `--set`."""
    return [
        *(set_ or []),
        *([f"system={system}"] if system is not None else []),
        *(["data.skip_broken=true"] if skip_broken else []),
        *([f"train.on_nan={on_nan}", f"retrain.on_nan={on_nan}"] if on_nan is not None else []),
        *([f"pretrained={json.dumps(pretrained)}"] if pretrained is not None else []),
    ]


def _stages(
    target: str,
    set_: list[str],
    run_dir: Path | None,
    device: str | None,
    threads: int | None,
    as_json: bool,
    *only: str,
    budgets: list[str] | None = None,
    seed: int | None = None,
) -> None:
    """Work on some stages (default: all), with `budgets` on some of the nets, by a `seed`, and print what came out."""
    opened, results = _worked(target, set_, run_dir, device, threads, *only, budgets=budgets, seed=seed)
    if results is None:
        return
    is_summed_up = not only or "report" in only
    if as_json:
        print(json.dumps(results if is_summed_up else {"directory": str(opened.root), **results}))
    if as_json or not is_summed_up:
        return
    from rich.console import Console

    from autoslim.terminal import print_results

    print_results(results, Console(width=None if sys.stdout.isatty() else 110))
    if opened.report.exists():
        print(f"report: {opened.report}")
    print(f"results: {opened.results}")


def _worked(
    target: str,
    set_: list[str],
    run_dir: Path | None,
    device: str | None,
    threads: int | None,
    *only: str,
    budgets: list[str] | None = None,
    seed: int | None = None,
) -> tuple[Run, dict[str, Any] | None]:
    """Open the run and work on it; on rank 0 with its results as far as they are known."""
    from autoslim.run import chosen_budgets, exclusive, left_out, open_run

    root, config = _opened(target, set_, run_dir, device, threads)
    seed = None if seed == config.seed else seed
    budgets = chosen_budgets(root, config, budgets or [], seed)
    progress = _progress()
    with interruption.caught(), exclusive(root, budgets, seed) if launched().is_main else nullcontext():
        opened = open_run(root, config)
        progress.say(f"run directory: {root}")
        if dropped := left_out(opened):
            progress.say(
                f"left out, for slim.budgets does not have it: {', '.join(dropped)}; its net stays in {root}/subnets, "
                f"and autoslim slim {root} --budget takes it up again"
            )
        return opened, _work(opened, progress, only, budgets, seed)


def _work(
    opened: Run, progress: Progress, only: tuple[str, ...], budgets: list[str], seed: int | None
) -> dict[str, Any] | None:
    progress.say("loading torch, tracing the network ...")
    # every shape is a compiled kernel to oneDNN; a supernet has thousands, and the default cache of 1024 thrashes
    # (a quarter of the time of a sandwich step on CPU). Must be set before torch is imported.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
    # half an import of torch cannot be done again, and what stopped it is still to be said
    with interruption.waiting():
        from autoslim.distributed import joined
        from autoslim.pipeline import prepare, run_stages
    if interruption.is_asked:
        raise interruption.stop()
    with joined(opened.config.device) as world:
        if world.size > 1:
            progress.say(f"{world.size} processes share the work")
        job = prepare(opened, progress)
        if seed is not None:
            job = replace(job, seed=seed)
        if budgets:
            job = replace(job, budgets=[each for each in job.budgets if each.text in budgets])
        for remark in job.data.remarks:
            progress.say(remark)
        if job.data.skipped:
            progress.say(f"broken images left out: {len(job.data.skipped)}, the first: {job.data.skipped[0]}")
        return run_stages(job, *only)


def _opened(
    target: str, set_: list[str], run_dir: Path | None, device: str | None, threads: int | None
) -> tuple[Path, Config]:
    """The run directory and the configuration that a command line means."""
    from autoslim.config import load_config, make_config
    from autoslim.run import read_run

    path = Path(target)
    if not path.is_dir():
        config = load_config(path, set_, device=device, threads=threads)
        if run_dir is None and path.stem in (".", ".."):
            raise ConfigError(f"{target} has no name for a run directory; choose one with --run-dir")
        return run_dir or Path("runs") / path.stem, config
    if run_dir is not None and run_dir.resolve() != path.resolve():
        raise ConfigError(f"{target} is a run directory already, and --run-dir names another one: {run_dir}")
    values = read_run(path).config.plain()
    from autoslim.config import override

    for text in set_:
        override(values, text)
    values |= {key: value for key, value in (("device", device), ("threads", threads)) if value is not None}
    return path, make_config(values, str(path / "config.yaml"))


def _inspected(target: str, set_: list[str], budgets: list[str]) -> Config:
    from autoslim.config import load_config, make_config, override
    from autoslim.run import available_cpus, read_run

    if Path(target).is_dir():
        values = read_run(Path(target)).config.plain()
    elif _is_file(target):
        values = load_config(target).plain()
        values["threads"] = values["threads"] or available_cpus()  # as a run measures
    else:
        values = {"model": target}
    for text in set_:
        override(values, text)
    if budgets:
        values["slim"] = {**values.get("slim", {}), "budgets": budgets}
    return make_config(values, target)


def _is_file(target: str) -> bool:
    """A configuration or a run directory, rather than the name of a model."""
    return target.endswith((".yaml", ".yml")) or Path(target).is_dir()


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ConfigError(f"--input {text!r} is no shape; write it as 1,3,224,224")
    return shape


def _progress() -> Progress:
    if not launched().is_main:
        from autoslim.progress import Progress as Silence

        return Silence()
    from rich.console import Console

    from autoslim.terminal import TerminalProgress

    return TerminalProgress(Console(stderr=True))


if __name__ == "__main__":
    sys.exit(main())
