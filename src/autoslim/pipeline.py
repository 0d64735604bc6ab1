"""The stages of a run: each reads files, writes files, and continues where it was killed."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoslim.batching import Fit
from autoslim.calibrate import recalibrate_batchnorm
from autoslim.checkpointing import blocks_of
from autoslim.config import Config
from autoslim.cost import (
    LATENCY,
    Cost,
    JointCost,
    MacCost,
    costs_of,
    figures_of,
    named_metrics,
    resolve_budget,
    slimmable_share,
)
from autoslim.data import Batches, ImageData, ImageSet, StreamedSet, load_data, usual_workers, worker_ended
from autoslim.distributed import agreed, local_device, usable_device, wait_for_all, world
from autoslim.errors import ConfigError, ExportError, RunError, TrainError, counted
from autoslim.export import export_onnx, has_onnx, load_subnet, load_tensors, save_subnet, save_tensors, verify_onnx
from autoslim.files import append_record, write_json, write_whole
from autoslim.importing import describe
from autoslim.inspection import searched_space
from autoslim.interruption import interruption
from autoslim.judge import Judge, RacingJudge, ReuseJudge, evaluate, make_judge
from autoslim.latency import latencies, spread
from autoslim.launch import launched
from autoslim.memory import in_smaller_batches, is_out_of_memory, naming_memory, parts_of
from autoslim.models import build_model, check_numbers
from autoslim.optimizers import make_optimizer, make_schedule
from autoslim.path import read_path
from autoslim.precision import lowered, lowered_inputs, rounding_of
from autoslim.progress import Progress
from autoslim.recipe import Recipe, RetrainRecipe, SupernetRecipe
from autoslim.records import (
    BATCHES,
    DATA,
    EPOCH,
    FULL_METRICS,
    MOVE,
    NET_METRICS,
    SEED_METRICS,
    STEP,
    naming,
    read_checked,
    read_lines,
    read_widths,
)
from autoslim.report import has_plotly, render_report
from autoslim.run import Run, begin_run, remove_net
from autoslim.runtimes import find_runtime
from autoslim.scores import SCORES
from autoslim.slicing import extract
from autoslim.slim import exchange_bins, greedy_slim, uniform_like, widths_within
from autoslim.space import ChannelSpace, SlimStep, Widths
from autoslim.start import sort_weights, starting_weights
from autoslim.supernet import Supernet
from autoslim.switchable import SwitchableNet
from autoslim.systems import Net, build_net, net_at, training_step, widths_of_ratios
from autoslim.tracing import trace
from autoslim.train import Step, Training, load_unshared, plain_step, switch_step, unshared

_SCORE_NAMES = {"accuracy": "held-out accuracy", "loss": "held-out loss (negated)"}


@dataclass(frozen=True)
class Budgeted:
    """A budget with its cost function and its limit in the unit of that."""

    text: str
    cost: Cost
    limit: float


@dataclass
class Job:
    """What the stages share: data, network and spaces, made once from the configuration."""

    run: Run
    progress: Progress
    data: ImageData
    net: Net  # what shares its weights among widths
    every: ChannelSpace  # all widths the network allows: for uniform nets of equal cost
    space: ChannelSpace  # the widths that are searched
    costs: dict[str, Cost]
    budgets: list[Budgeted]  # from the highest limit on
    device: torch.device
    fit: Fit  # batches of the search, and what may be kept of a pass
    seed: int  # of what is trained; data and search have that of the configuration

    @property
    def model(self) -> nn.Module:
        """The network itself, at full width."""
        return self.net.model

    @property
    def config(self) -> Config:
        """The configuration of the run."""
        return self.run.config

    def batches(
        self, images: ImageSet | StreamedSet, batch_size: int, recipe: Recipe | None = None, **options: Any
    ) -> Batches:
        """Images on the device, normalised; with a recipe shuffled, augmented and mixed for training."""
        config = self.config.data
        if recipe is not None:
            augment = self.data.default_augment if config.augment == "auto" else config.augment
            options |= {"augment": augment, "mix": config.mix, "num_classes": self.data.num_classes}
            here = world()
            options |= {"shuffle": True, "drop_last": True, "share": (here.rank, here.size)}
        layout = self.config.train if recipe is None else recipe
        return Batches(
            images,
            batch_size,
            mean=self.data.mean,
            std=self.data.std,
            seed=self.config.seed if recipe is None else self.seed,
            device=self.device,
            channels_last=layout.channels_last,
            workers=_workers(self.config),
            prefetch=config.prefetch,
            **options,
        )

    def calibration(self, size: int | None = None) -> list[Tensor]:
        """Training images for BatchNorm statistics, without augmentation, in batches of `size`."""
        order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(self.config.seed))
        chosen = self.data.train.subset(order[: self.config.calibration_images])
        return [images for images, _ in self.batches(chosen, _alike(len(chosen), size or self.within(250)))]

    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        """The images of the search in batches of about equal size, chosen once by the seed."""
        order = torch.randperm(len(self.data.holdout), generator=torch.Generator().manual_seed(self.config.seed))
        chosen = self.data.holdout.subset(order[: self.config.slim.images])
        return list(self.batches(chosen, _alike(len(chosen), self.fit.batch_size)))

    def test(self, size: int) -> Batches:
        """The test images, never looked at by training or search."""
        return self.batches(self.data.test, size)

    def within(self, size: int) -> int:
        """A size of batches that memory may limit; the result does not depend on it."""
        return size if self.config.slim.memory_gb is None else min(size, self.fit.batch_size)

    def example(self) -> Tensor:
        """One image, as costs and latencies are per image."""
        return torch.zeros(1, *self.data.image_shape, device=self.device)

    def save(
        self, directory: Path, net: nn.Module, space: ChannelSpace | None = None, widths: Widths | None = None
    ) -> None:
        """Write a subnet, or a whole `SwitchableNet`, with the name of the network it comes from; rank 0 does."""
        if not world().is_main:
            return
        save_subnet(directory, net, space, widths, model=self.config.model, model_args=self.config.model_args)

    def figures(self, widths: Mapping[str, int], space: ChannelSpace | None = None) -> dict[str, float]:
        """What widths cost, by metric."""
        return figures_of(self.costs if space is None else costs_of(space), widths)


# --- preparation -------------------------------------------------------------------------------------------------


def prepare(run: Run, progress: Progress) -> Job:
    """Load data and network, trace it, and check everything that can be checked before hours of training."""
    config = run.config
    device = usable_device(local_device(config.device))
    torch.set_num_threads(max(1, (config.threads or torch.get_num_threads()) // launched().local_size))
    if config.export.onnx is True and not has_onnx():
        raise ExportError("export.onnx needs onnx, onnxscript and onnxruntime: pip install 'autoslim[onnx]'")
    if config.export.report is True and not has_plotly():
        raise ExportError("export.report needs plotly: pip install 'autoslim[report]'")
    data = _load(config, progress)
    model = fresh_model(config)
    check_numbers(config.model, model)
    example = torch.zeros(1, *data.image_shape)
    every = trace(model, example, **config.space.wishes())
    _check_output(config, model, example, data)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model = model.to(device)
    find_runtime(config.latency.runtime)
    wanted = config.slim.budgets if config.system == "autoslim" else ()
    space, latency = agreed(
        lambda: searched_space(
            config,
            model,
            every,
            example.to(device),
            budgets=wanted,
            progress=progress,
            kept=run.latency_table if run.is_begun else None,  # a failed start may have had another runtime
        )
    )
    costs = costs_of(space) | ({LATENCY: latency} if latency is not None else {})
    budgets = _budgets(config, space, costs)
    trained = run.supernet / "model.safetensors"
    kept = agreed(lambda: load_tensors(trained)[0] if trained.exists() else None)
    # before the net is built: the BatchNorm of switches are copies
    keep_start = None if kept is not None else starting_weights(run, model, every, data, progress)
    net = build_net(config, model, space)
    if kept is not None:
        with naming(trained):
            load_unshared(net, kept)
    fit = agreed(lambda: _fit(run, space))
    job = Job(run, progress, data, net, every, space, costs, budgets, device, fit, config.seed)
    for recipe in (*_stages_of_training(config).values(), config.retrain):
        batches = job.batches(data.train, recipe.batch_size, recipe)  # names what cannot be, as all of these do
        if recipe.checkpointing and not blocks_of(model):
            raise ConfigError(
                f"checkpointing: model {config.model!r} has no blocks of layers to recompute; leave it out"
            )
        make_optimizer(net, recipe)
        make_schedule(recipe, math.ceil(len(batches) / recipe.accumulate))
    _check_lone_images(job)
    if config.system == "i-net":
        plain_step(model, config.train)
    else:
        training_step(config, net)
    if world().is_main:
        _keep_record(run, data)
        begin_run(run, space.to_json())
        if keep_start is not None:
            keep_start()
        if latency is not None and not run.latency_table.exists():
            latency.table.save(run.latency_table)
    return job


def _fit(run: Run, space: ChannelSpace) -> Fit:
    """The batches that the search of a run was begun with, or those that its memory allows."""
    if run.batches.exists() and run.slim_log.exists():
        record = read_checked(run.batches, BATCHES)
        return Fit(record["batch_size"], record["keep_bytes"])
    return run.config.slim.fit(space)


def _budgets(config: Config, space: ChannelSpace, costs: Mapping[str, Cost]) -> list[Budgeted]:
    """What is asked for, from the highest cost on: budgets of a search, or the width ratios of the other systems."""
    if config.system == "autoslim":
        budgets = [Budgeted(text, *resolve_budget(text, space, costs)) for text in config.slim.budgets]
        return sorted(budgets, key=lambda b: -b.limit / b.cost(space.full()))
    if min(config.ratios) < config.space.min_ratio:
        raise ConfigError(
            f"ratios: {min(config.ratios):g} is below space.min_ratio={config.space.min_ratio:g}, the narrowest that "
            f"may be; lower that"
        )
    widths = widths_of_ratios(space, config.ratios)
    return [Budgeted(name, costs["macs"], costs["macs"](each)) for name, each in widths.items()]


def fresh_model(config: Config, seed: int | None = None) -> nn.Module:
    """The network of the configuration, with the weights its seed gives, or another one."""
    seed = config.seed if seed is None else seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        return build_model(config.model, config.model_args)


def _load(config: Config, progress: Progress) -> ImageData:
    with progress.bar("images", 1) as advance:
        return load_data(
            config.data.source,
            holdout=config.data.holdout,
            seed=config.seed,
            workers=_workers(config),
            **config.data.reading(),
            progress=lambda done, total: advance(done / max(1, total), f"{done} of {total} images"),
        )


def _workers(config: Config) -> int:
    return usual_workers() if config.data.workers == "auto" else config.data.workers


def _keep_record(run: Run, data: ImageData) -> None:
    """Write which images were held out to `data.json`; `RunError` if they are not those of the run any more."""
    record = data.record()
    if run.data.exists() and run.is_begun:
        before = read_checked(run.data, DATA)
        changed = [part for part, digest in record["digest"].items() if before["digest"].get(part) != digest]
        if changed:
            counts = ", ".join(
                f"{part} {before['images'].get(part)} then, {record['images'][part]} now" for part in changed
            )
            raise RunError(
                f"the images are not those that {run.root} was begun with ({counts}); restore them or choose another "
                "--run-dir"
            )
    else:  # what a failed start left may be of other images
        write_json(run.data, record)


def _check_output(config: Config, model: nn.Module, example: Tensor, data: ImageData) -> None:
    """The network must give one logit per class, when it is trained too."""
    try:
        with torch.no_grad():
            output = model.eval()(example)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        others = sorted({str(each.dtype) for each in model.parameters()} - {"torch.float32"})
        hint = f"; its weights are {', '.join(others)} and images float32: return model.float()" if others else ""
        raise ConfigError(f"model {config.model!r} does not run: {describe(error)}{hint}") from error
    trained = _output_in_training(config, model.train(), example)
    for each, when in ((output, ""), (trained, " in training mode")):
        if not isinstance(each, Tensor) or each.ndim != 2:
            kind = f"a tensor of shape {tuple(each.shape)}" if isinstance(each, Tensor) else type(each).__name__
            hint = "; switch its auxiliary heads off (model_args.aux_logits=false, in torchvision)" if when else ""
            raise ConfigError(
                f"model {config.model!r} gives {kind}{when}; a run needs logits of shape (images, classes){hint}"
            )
    if output.shape[1] != data.num_classes:
        raise ConfigError(
            f"model {config.model!r} gives {output.shape[1]} outputs and the data has {data.num_classes} classes; "
            f"set model_args.num_classes={data.num_classes} (or your function's own argument)"
        )


def _alike(count: int, most: int) -> int:
    """The size of batches of about equal size, of at most so many: none is left with a single image without need."""
    return math.ceil(count / math.ceil(count / most))


def _check_lone_images(job: Job) -> None:
    """`ConfigError`, before training, where an image would be alone in a batch and the network cannot do with that.

    BatchNorm of a single value for each channel, as behind global pooling, has no statistics.
    """
    config, ranks = job.config, world().size
    by = f", shared by {ranks} processes," if ranks > 1 else ""
    smallest = {
        f"{stage}.batch_size={recipe.batch_size}{by}": recipe.batch_size // ranks
        for stage, recipe in (("train", config.train), ("retrain", config.retrain))
    }
    if config.system == "autoslim":
        images = min(len(job.data.holdout), config.slim.images or len(job.data.holdout))
        size = _alike(images, job.fit.batch_size)
        smallest[f"slim.batch_size={job.fit.batch_size} for {counted(images, 'image')}"] = images % size or size
    alone = next((name for name, size in smallest.items() if size == 1), None)
    if alone is None:
        return
    try:
        with _buffers_kept(job.model):
            job.model.train()(job.example())
    except ValueError as error:  # as torch says it
        raise ConfigError(f"{alone} leaves an image alone in a batch: {describe(error)}; raise it") from error


def _output_in_training(config: Config, model: nn.Module, example: Tensor) -> Any:
    """What the network gives for two images, as a loss would get it; its buffers stay as they are."""
    try:
        with _buffers_kept(model):
            return model(torch.rand(2, *example.shape[1:]))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"model {config.model!r} does not run in training mode: {describe(error)}") from error


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """A trial, of which neither running statistics nor random numbers nor gradients are left."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


# --- stages ------------------------------------------------------------------------------------------------------
# Every rank runs them. What depends on files is `agreed`; rank 0 alone writes, evaluates and exports.


def train_stage(job: Job) -> None:
    """Train the supernet; leaves `supernet/model.safetensors` and `supernet/metrics.json`."""
    run, config = job.run, job.config
    metrics = run.supernet / "metrics.json"
    if config.system == "i-net":  # every net is trained by itself
        if world().is_main and not metrics.exists():
            write_json(metrics, {**job.figures(job.space.full()), "accuracy": None})
        return
    done = run.supernet / "model.safetensors"
    if agreed(done.exists):
        job.progress.say(f"supernet: trained before, {done}")
    else:
        stages = _stages_of_training(config)
        if "plain" in stages:
            _train_alone(job, stages["plain"])
        if (recipe := stages.get("supernet")) is not None:
            step = training_step(config, job.net)
            _train(job, "supernet", job.net, recipe, step, run.supernet, _accuracies(job))
        if isinstance(job.net, SwitchableNet):
            job.save(run.supernet, job.net)
        elif world().is_main:
            save_tensors(done, unshared(job.model), {"stage": "supernet", "epochs": config.train.epochs})
    if not world().is_main:
        return
    (run.supernet / "checkpoint.safetensors").unlink(missing_ok=True)
    if not metrics.exists():
        name, widths = _widest(job)
        accuracy = _tested(job, _net_at(job, name, widths))
        write_json(metrics, {**job.figures(widths), "accuracy": accuracy})
        job.progress.say(f"supernet: its widest net has {accuracy:.1%} on the test images")


def _stages_of_training(config: Config) -> dict[str, SupernetRecipe]:
    """The recipes of the plain epochs, if there are any, and of the supernet, if any are left."""
    plain = config.train.plain_epochs
    epochs = {"plain": plain, "supernet": config.train.epochs - plain}
    return {stage: replace(config.train, epochs=count) for stage, count in epochs.items() if count}


def _train_alone(job: Job, recipe: SupernetRecipe) -> None:
    """Train the whole network as any other for the plain epochs, and sort its channels; leaves `supernet/plain/`."""
    config, done = job.config, job.run.plain / "model.safetensors"
    tensors = agreed(lambda: load_tensors(done)[0] if done.exists() else None)
    if tensors is None:
        step = plain_step(job.model, recipe)
        _train(job, "plain", job.model, recipe, step, job.run.plain, _accuracies(job))

        def finished() -> dict[str, Tensor]:
            record: dict[str, Any] = {"stage": "plain", "epochs": recipe.epochs, "sort": recipe.sort}
            if recipe.sort != "none":
                record |= sort_weights(config, job.model, job.every, job.data, job.progress)
            tensors = unshared(job.model)
            save_tensors(done, tensors, record)
            return tensors

        tensors = agreed(finished)
    load_unshared(job.model, tensors)
    _drop_checkpoint(job.run.plain)


def _widest(job: Job) -> tuple[str, Widths]:
    if isinstance(job.net, SwitchableNet):
        return next(iter(job.net.switches.items()))
    return "full", job.space.full()


def _accuracies(job: Job) -> Callable[[], dict[str, Any]]:
    """What is measured on the held-out images after each epoch: of the widest net, and of each switch if there are."""
    images = job.held_out()
    if isinstance(job.net, SwitchableNet):
        return _accuracies_of_switches(job.net, images)
    judge = Judge(job.net, images, "accuracy")

    def measure() -> dict[str, Any]:
        try:
            return {"accuracy": judge(job.space.full())}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        job.progress.say(f"out of memory for the held-out accuracy{_smaller_search(job)}; the search will need that")
        return {}  # a trained epoch is worth more

    return measure


def _accuracies_of_switches(
    net: SwitchableNet, images: Sequence[tuple[Tensor, Tensor]]
) -> Callable[[], dict[str, Any]]:
    def measure() -> dict[str, Any]:
        accuracies = {name: _held_out_accuracy(net.switch(name), images) for name in net.switches}
        return {"accuracy": next(iter(accuracies.values())), "switches": accuracies}

    return measure


def slim_stage(job: Job) -> None:
    """Search all budgets in one greedy pass; leaves `slim.jsonl` and `subnets/<budget>/{widths,metrics}.json`.

    Systems that search nothing leave the nets at their width ratios there.
    """
    agreed(lambda: _need(job.run.supernet / "metrics.json", "train"))
    if job.config.system != "autoslim":
        if world().is_main:
            _take_ratios(job)
        return
    if agreed(lambda: all(_is_found(job, budget) for budget in job.budgets)):
        if agreed(job.run.slim_log.exists):
            job.progress.say(f"search: done before, {job.run.slim_log}")
            return
        job.progress.say(f"search: done again, for {job.run.slim_log} is gone")
    if world().is_main and not job.run.slim_log.exists():
        _lose_found(job)
    assert isinstance(job.net, Supernet)
    steps = agreed(lambda: read_path(job.run, job.space, job.costs["macs"]))
    images = job.held_out()
    slim, fit = job.config.slim, job.fit
    there_are = len(job.data.holdout)
    if slim.images is not None and slim.images > there_are:
        job.progress.say(f"search: on the {there_are} images held out, for there are no {slim.images} (data.holdout)")
    if slim.memory_gb is not None and not steps:
        kept = (
            f"up to {fit.keep_bytes / 1e9:.2g} GB of a pass are kept" if fit.keep_bytes else "nothing is kept of a pass"
        )
        job.progress.say(f"search: within {slim.memory_gb:g} GB, batches of {len(images[0][1])} images; {kept}")
        if world().is_main:
            write_json(job.run.batches, asdict(fit))
    rule = agreed(partial(_step_rule, job))
    net, images = _in_precision(job, job.net, images)
    judge = make_judge(slim.judge, net, images, slim.score, slim.confidence, fit.keep_bytes, slim.screen)
    _load_race(job, judge, len(steps))
    start = steps[-1].widths if steps else job.space.full()
    cost = JointCost((budget.cost, budget.limit) for budget in job.budgets)
    if cost(start) > 1 and isinstance(judge, ReuseJudge) and (whole := judge.reuse.whole()):
        named = ", ".join(whole[:3]) + (" ..." if len(whole) > 3 else "")
        job.progress.say(f"search: nets narrower in {counted(len(whole), 'group')} run as a whole ({named})")
    # each budget may be on another metric: the walk ends when all are met, and weighs the one that is farthest away
    path = greedy_slim(
        job.space,
        judge,
        cost,
        [1.0],
        rule=rule,
        start=start,
        on_candidate=lambda group, score: advance(_share_done(job, current, group), f"step {len(steps) + 1}"),
    )
    current = start
    with job.progress.bar("search", 1.0) as advance, naming_memory(_smaller_search(job)):
        for step in path:
            steps.append(step)
            current = step.widths
            macs = job.costs["macs"](current)
            record = {
                "group": step.group,
                "width": current[step.group],
                "cost": macs,
                "score": step.score,
                "rule": rule,
            }
            correct, seen = judge.also_of(current)
            if world().is_main:
                if isinstance(judge, RacingJudge):
                    save_tensors(job.run.race(len(steps)), judge.learned(), {"step": len(steps)})
                append_record(job.run.slim_log, record | {"accuracy": correct, "images": seen})
    for budget in job.budgets:
        directory, known = job.run.subnet(budget.text), agreed(partial(_metrics, job, budget.text))
        if agreed(partial(_is_found, job, budget)):
            continue
        widths = widths_within(job.space, steps, budget.cost, budget.limit)
        assert widths is not None, "the walk went on until every budget was met"
        job.progress.say(f"search: {budget.text} is met after {counted(_steps_to(steps, widths), 'step')}")
        moves: list[dict[str, Any]] = []
        if job.config.slim.exchange:
            with naming_memory(_smaller_search(job)):
                widths, moves = _exchanged(job, budget, judge, widths)
            job.progress.say(f"search: {budget.text} was bettered by {len(moves)} exchanges of bins")
        if not world().is_main:
            continue
        supernet = read_checked(job.run.supernet / "metrics.json", FULL_METRICS)
        if _is_another(job, directory, widths):
            job.progress.say(f"search: {budget.text} is another net than before; what was made of that is removed")
            known = {"budget": budget.text, **job.figures(widths), "accuracy": {}}
            write_json(directory / "metrics.json", known)  # first: a kill leaves no mixture
            remove_net(job.run, budget.text)
        write_whole(directory / "widths.json", widths.to_json())
        found = _net_at(job, budget.text, widths)
        accuracy = {"supernet": supernet["accuracy"], "found": _tested(job, found)}
        accuracy = known.get("accuracy", {}) | accuracy  # one taken from the path may have been retrained before
        metrics = known | {"budget": budget.text, **job.figures(widths), "accuracy": accuracy}
        write_json(directory / "metrics.json", metrics | ({"exchanges": moves} if moves else {}))


def _is_found(job: Job, budget: Budgeted) -> bool:
    """Are the widths of a budget there, and the accuracy of its net?"""
    is_there = (job.run.subnet(budget.text) / "widths.json").exists()
    return is_there and "found" in _metrics(job, budget.text).get("accuracy", {})


def _lose_found(job: Job) -> None:
    """Before a search that begins anew: what an earlier one found is to be found again, also after a kill."""
    for budget in job.budgets:
        metrics = _metrics(job, budget.text)
        job.run.exchange_log(budget.text).unlink(missing_ok=True)
        if metrics:
            accuracy = {kind: value for kind, value in metrics["accuracy"].items() if kind not in ("found", "held_out")}
            metrics = {key: value for key, value in metrics.items() if key not in ("steps", "exchanges")}
            write_json(job.run.subnet(budget.text) / "metrics.json", metrics | {"accuracy": accuracy})


def _is_another(job: Job, directory: Path, widths: Widths) -> bool:
    """Does a net of other widths lie there?"""
    path = directory / "widths.json"
    return path.exists() and read_widths(path, job.space) != widths


def _step_rule(job: Job) -> str:
    """The rule of a search that goes on is the one it began with, whatever budgets were added since."""
    wanted = job.config.slim.step_rule
    begun = next((line["rule"] for line in read_lines(job.run.slim_log, STEP) if "rule" in line), wanted)
    if begun != wanted:
        job.progress.say(f"search: goes on by the rule it began with, {begun}; slim.rule=auto would now be {wanted}")
    return str(begun)


def _in_precision(
    job: Job, net: Supernet, images: list[tuple[Tensor, Tensor]]
) -> tuple[Supernet, list[tuple[Tensor, Tensor]]]:
    """The net and the images of the search, in bf16 if that is asked for and changes no more than chance does."""
    if job.config.slim.precision == "fp32":
        return net, images
    low = lowered(net)
    moved = agreed(lambda: rounding_of(net, low, images, SCORES[job.config.slim.score]))
    by = f"rounding moves differences between nets by {moved.rounding:.2g}, the choice of images by {moved.chance:.2g}"
    job.progress.say(f"search: in {'bf16' if moved.is_harmless else 'fp32, for in bf16'} {by}")
    if not moved.is_harmless:
        return net, images
    return low, [(lowered_inputs(inputs), targets) for inputs, targets in images]


def _load_race(job: Job, judge: Judge, steps: int) -> None:
    """Let a search go on as if it had never stopped; where that is not known, its next step looks at all images."""
    if not steps or not isinstance(judge, RacingJudge):
        return
    files = [job.run.race(step) for step in range(1, steps + 1)]
    if not agreed(lambda: all(file.exists() for file in files)):
        missing = f"what the race learned in {steps} steps is not there: the next one looks at all images"
        job.progress.say(f"search: {missing}")
        return
    for path, (learned, _) in zip(files, agreed(lambda: [load_tensors(file) for file in files]), strict=True):
        with naming(path):
            judge.learn(learned)


def _exchanged(job: Job, budget: Budgeted, judge: Judge, widths: Widths) -> tuple[Widths, list[dict[str, Any]]]:
    """`widths` after exchanges of bins, and these; each is on disk before the next, and is not searched again."""
    log, start = job.run.exchange_log(budget.text), widths
    made, widths = agreed(lambda: read_exchanges(log, job.space, budget, start))
    for move in exchange_bins(job.space, judge, budget.cost, widths, budget.limit):
        changed = {name: move.widths[name] for name in (move.wider, move.narrower) if name is not None}
        made.append({"wider": move.wider, "narrower": move.narrower, "widths": changed, "score": move.score})
        if world().is_main:
            log.parent.mkdir(parents=True, exist_ok=True)
            append_record(log, made[-1])
        widths = move.widths
    return widths, made


def _take_ratios(job: Job) -> None:
    """The nets at the width ratios, with the weights they share; an I-Net has none yet."""
    supernet = read_checked(job.run.supernet / "metrics.json", FULL_METRICS)
    widths = widths_of_ratios(job.space, job.config.ratios)
    for budget, ratio in zip(job.budgets, sorted(job.config.ratios, reverse=True), strict=True):
        directory, chosen = job.run.subnet(budget.text), widths[budget.text]
        files = ("metrics.json", "widths.json", *(() if job.config.system == "i-net" else ("model.safetensors",)))
        if all((directory / name).exists() for name in files):
            continue
        if (same := next(name for name, each in widths.items() if each == chosen)) != budget.text:
            job.progress.say(f"{budget.text}: the same net as {same} (space.bins and space.divisor round widths)")
        accuracy = {"supernet": supernet["accuracy"]}
        write_whole(directory / "widths.json", chosen.to_json())
        if job.config.system != "i-net":
            net = _net_at(job, budget.text, chosen)
            accuracy["found"] = _tested(job, net)
            job.save(directory, net, job.space, chosen)
            job.progress.say(f"{budget.text}: {accuracy['found']:.1%} on the test images")
        known = _metrics(job, budget.text)
        accuracy = known.get("accuracy", {}) | accuracy
        metrics = known | {"budget": budget.text, "ratio": ratio, **job.figures(chosen), "accuracy": accuracy}
        write_json(directory / "metrics.json", metrics)


@dataclass(frozen=True)
class _Plan:
    """A net to be trained by itself: the one found for a budget, or the uniform one beside it."""

    kind: str  # "retrained" or "uniform", as the accuracy is called
    budget: str
    directory: Path
    space: ChannelSpace
    widths: Widths


def retrain_stage(job: Job) -> None:
    """Train the nets found, and uniform ones of equal MACs; leaves `model.safetensors` and both accuracies.

    Of the systems without a search, only I-Nets are trained here.
    """
    if job.config.system not in ("autoslim", "i-net"):
        return
    plans = agreed(lambda: [plan for budget in job.budgets for plan in _plans(job, budget.text)])
    is_joint = job.config.retrain.jointly and job.config.system == "autoslim"
    for kind in ("retrained", "uniform") if is_joint else ():
        _train_jointly(job, kind, [plan for plan in plans if plan.kind == kind])
    for plan in plans:
        path = job.run.seeded(plan.budget, job.seed) / "metrics.json"
        metrics: dict[str, Any] = agreed(partial(_figures_by_seed, job, path))
        is_taken = job.config.system == "autoslim" and job.seed == job.config.seed and plan.kind == "retrained"
        if is_taken and "found" not in metrics["accuracy"] and world().is_main:  # later, from the path of the search
            metrics["accuracy"]["found"] = _tested(job, _net_at(job, plan.budget, plan.widths))
            write_json(path, metrics)
        if agreed(partial(_is_retrained, job, plan, metrics)):
            continue
        net = _switch_of(job, plan) if is_joint else _retrained(job, plan)
        if not world().is_main:
            continue
        metrics["accuracy"][plan.kind] = _tested(job, net)
        write_json(path, metrics)
        job.progress.say(f"{_stage_of(job, plan)}: {metrics['accuracy'][plan.kind]:.1%} on the test images")


def _is_retrained(job: Job, plan: _Plan, metrics: Mapping[str, Any]) -> bool:
    """Is its accuracy known, and are its weights there, if a later stage needs them? It needs none of other seeds."""
    is_needed = plan.kind == "retrained" and job.seed == job.config.seed
    is_kept = not is_needed or (plan.directory / "model.safetensors").exists()
    return plan.kind in metrics["accuracy"] and is_kept


def _stage_of(job: Job, plan: _Plan) -> str:
    """What a training is called in the log."""
    return f"{plan.kind} {plan.budget}" + (f" seed {job.seed}" if job.seed != job.config.seed else "")


def _figures_by_seed(job: Job, path: Path) -> dict[str, Any]:
    """What is known of a net as the seed of the job trains it."""
    if job.seed == job.config.seed:
        return read_checked(path, NET_METRICS)
    return read_checked(path, SEED_METRICS) if path.exists() else {"seed": job.seed, "accuracy": {}}


def _plans(job: Job, budget: str) -> list[_Plan]:
    directory, home = job.run.subnet(budget), job.run.seeded(budget, job.seed)
    metrics = read_checked(_need(directory / "metrics.json", "slim"), NET_METRICS)
    widths = read_widths(_need(directory / "widths.json", "slim"), job.space)
    plans = [_Plan("retrained", budget, home, job.space, widths)]
    if job.config.retrain.uniform and job.config.system == "autoslim":
        ratio, uniform = uniform_like(job.every, MacCost(job.every), metrics["macs"])
        figures = {"macs": job.figures(uniform, job.every)["macs"], "ratio": round(ratio, 4)}
        if metrics.get("uniform") != figures and home == directory:  # else another process may write there
            write_json(directory / "metrics.json", metrics | {"uniform": figures})
        plans.append(_Plan("uniform", budget, home / "uniform", job.every, uniform))
    return plans


def export_stage(job: Job) -> None:
    """Measure latency and write ONNX files, compared with PyTorch on real images."""
    example = job.example()
    images = next(iter(job.batches(job.data.test.subset(torch.arange(min(8, len(job.data.test)))), 8)))[0]
    supernet = job.run.supernet / "metrics.json"
    metrics = read_checked(_need(supernet, "train"), FULL_METRICS)
    if "latency_ms" not in metrics:
        metrics |= _measured(job, extract(job.model, job.space, job.space.full()))
        write_json(supernet, metrics)
    wants_onnx = has_onnx() if job.config.export.onnx == "auto" else job.config.export.onnx
    if job.config.export.onnx == "auto" and not wants_onnx:
        job.progress.say("export: no ONNX files, for autoslim[onnx] is not installed")
    with job.progress.bar("export", len(job.budgets)) as advance:
        for index, budget in enumerate(job.budgets):
            directory = job.run.subnet(budget.text)
            metrics = read_checked(_need(directory / "metrics.json", "slim"), NET_METRICS)
            net = load_subnet(_need(directory / "model.safetensors", "retrain").parent, _builder(job)).to(job.device)
            if "latency_ms" not in metrics:
                metrics |= _measured(job, net)
                write_json(directory / "metrics.json", metrics)
            if wants_onnx and not ("onnx" in metrics and (directory / "model.onnx").exists()):
                net = net.cpu()
                export_onnx(net, example.cpu(), directory / "model.onnx")
                difference = verify_onnx(directory / "model.onnx", net, images.cpu())
                metrics["onnx"] = {"max_relative_difference": difference}
                write_json(directory / "metrics.json", metrics)
            advance(index + 1, budget.text)


def _measured(job: Job, net: nn.Module) -> dict[str, float]:
    """The real latency of a net in the runtime of the run, end to end."""
    latency = job.config.latency
    samples = latencies(net, job.example(), latency.runtime, latency.threads)
    return {"latency_ms": statistics.median(samples), "latency_spread_ms": spread(samples)}


def report_stage(job: Job) -> dict[str, Any]:
    """Write `results.json` and `report.html`; returns the results."""
    run = job.run
    _need(run.supernet / "metrics.json", "train")
    for budget in job.budgets:
        _need(run.subnet(budget.text) / "metrics.json", "slim")
    results = results_so_far(job)
    write_json(run.results, results)
    if job.config.export.report == "auto" and not has_plotly():
        job.progress.say("report: no report.html, for autoslim[report] is not installed")
    elif job.config.export.report is not False:
        write_whole(run.report, render_report(_report_record(job, results)))
    return results


def results_so_far(job: Job) -> dict[str, Any]:
    """The sum of a run as far as it is: of the budgets those whose nets were found."""
    subnets = []
    supernet = job.run.supernet / "metrics.json"
    for budget in job.budgets:
        if not (metrics := _metrics(job, budget.text)):
            continue
        accuracy = {kind: metrics["accuracy"].get(kind) for kind in ("supernet", "found", "retrained", "uniform")}
        subnets.append({**metrics, "accuracy": accuracy, "latency_ms": metrics.get("latency_ms")})
        if seeds := _over_seeds(job, budget.text, accuracy):
            subnets[-1]["seeds"] = seeds
        if job.seed != job.config.seed:
            subnets[-1] |= _figures_by_seed(job, job.run.seeded(budget.text, job.seed) / "metrics.json")
    return {
        "model": job.config.model,
        "system": job.config.system,
        "latency": {"runtime": job.config.latency.runtime, "threads": _threads(job)},
        "full": read_checked(supernet, FULL_METRICS) if supernet.exists() else None,
        "subnets": [{**subnet, "uniform": subnet.get("uniform")} for subnet in subnets],
    }


def _over_seeds(job: Job, budget: str, accuracy: Mapping[str, float | None]) -> dict[str, Any]:
    """Mean and standard deviation of the accuracy of nets that were retrained by several seeds, by kind."""
    found: dict[str, dict[str, float]] = {}
    by_seed = {seed: read_checked(path, SEED_METRICS)["accuracy"] for seed, path in job.run.seeds(budget).items()}
    for seed, known in {job.config.seed: accuracy, **by_seed}.items():
        for kind in ("retrained", "uniform"):
            if (value := known.get(kind)) is not None:
                found.setdefault(kind, {})[str(seed)] = value
    return {
        kind: {"mean": statistics.mean(each.values()), "std": statistics.stdev(each.values()), "accuracies": each}
        for kind, each in found.items()
        if len(each) > 1
    }


STAGES: dict[str, Callable[[Job], Any]] = {
    "train": train_stage,
    "slim": slim_stage,
    "retrain": retrain_stage,
    "export": export_stage,
    "report": report_stage,
}

_BY_MAIN = ("export", "report")


def run_stages(job: Job, *only: str) -> dict[str, Any] | None:
    """Some stages or all in their order, on every rank; on rank 0 the results of the run, as far as they are known."""
    for name, stage in STAGES.items():
        if not only or name in only:
            if world().is_main or name not in _BY_MAIN:
                stage(job)
            wait_for_all()
    return results_so_far(job) if world().is_main else None


# --- pieces ------------------------------------------------------------------------------------------------------


def _train(
    job: Job,
    stage: str,
    net: nn.Module,
    recipe: Recipe,
    step: Step,
    directory: Path,
    accuracies: Callable[[], Mapping[str, Any]],
    about: Mapping[str, Any] | None = None,
) -> None:
    """Run the epochs that are missing, with a line in `train.jsonl` and a checkpoint after each, and some in between.

    Asked to stop, it finishes the step and writes a checkpoint in the middle of the epoch. Checkpoints hold what is
    to be known `about` the net, too.
    """
    batches = job.batches(job.data.train, recipe.batch_size, recipe)
    training = Training(net, recipe, len(batches), seed=job.seed)
    checkpoint = directory / "checkpoint.safetensors"
    kept = agreed(lambda: load_tensors(checkpoint) if checkpoint.exists() else None)
    if kept is not None:
        tensors, record = kept
        with naming(checkpoint):
            training.load_state(tensors, record.get("epoch", -1), record)
        where = f"epoch {training.epoch}" + (f" and {record['steps']} steps" if record.get("steps") else "")
        job.progress.say(f"{stage}: continues after {where}")
    if world().is_main:
        job.run.drop_epochs(stage, training.epoch)  # written just before a kill, but the checkpoint was not

    saved, wait = time.monotonic(), 60 * (recipe.checkpoint_minutes or math.inf)

    def save() -> None:
        nonlocal saved
        if world().is_main:
            save_tensors(checkpoint, training.state(), {"stage": stage, **training.record(), **(about or {})})
        saved = time.monotonic()

    total = recipe.epochs * training.steps_per_epoch
    with job.progress.bar(stage, total) as advance, _naming(checkpoint), interruption.waiting():

        def on_step(loss: float) -> None:
            advance(training.steps, f"epoch {training.epoch + 1}/{recipe.epochs}, loss {loss:.3f}")
            if time.monotonic() - saved > wait:
                save()

        while not training.is_done:
            log = training.run_epoch(
                batches,
                step,
                on_step,
                stop=lambda: interruption.is_asked,
                on_skip=lambda text: job.progress.say(f"{stage}: {text}"),
            )
            if log is None:
                save()
                raise interruption.stop()
            training.show_average(True)
            measured = accuracies()
            training.show_average(False)
            if world().is_main:
                job.run.log_epoch({"stage": stage, **asdict(log), **measured})
            save()
        if agreed(lambda: interruption.is_asked):  # since the last step; elsewhere it would be forgotten
            raise interruption.stop()
    training.finish()


def _retrained(job: Job, plan: _Plan) -> nn.Module:
    """The net of a plan, trained by the recipe, or as it was saved when that was done before."""
    config = job.config
    recipe = config.retrain
    if config.system == "i-net":  # trained by the recipe of the others' training, from pretrained weights if there are
        recipe = RetrainRecipe(**_shared(config.train), init="scratch" if config.pretrained is None else "supernet")
    if agreed((plan.directory / "model.safetensors").exists):
        _drop_checkpoint(plan.directory)
        return load_subnet(plan.directory, _builder(job)).to(job.device)
    origin = job.model if recipe.init == "supernet" else fresh_model(config, job.seed)
    net = extract(origin, plan.space, plan.widths).to(job.device)
    if recipe.init == "supernet":
        in_smaller_batches(
            lambda size: recalibrate_batchnorm(net, job.calibration(size)), job.within(250), "recalibrating BatchNorm"
        )
    teacher = None
    if recipe.distill > 0:
        teacher = _net_at(job, "full", job.space.full()).eval()
    step = plain_step(net, recipe, None, teacher, recipe.distill)
    held_out = job.held_out()
    stage = _stage_of(job, plan)
    _train(job, stage, net, recipe, step, plan.directory, lambda: {"accuracy": _held_out_accuracy(net, held_out)})
    job.save(plan.directory, net, plan.space, plan.widths)
    _drop_checkpoint(plan.directory)
    return net


# in smaller batches where memory does not suffice, for what does not depend on them


def _tested(job: Job, net: nn.Module) -> float:
    """Accuracy on the test images."""
    return in_smaller_batches(lambda size: evaluate(net, job.test(size)), job.within(500), "evaluating the test images")


def _held_out_accuracy(net: nn.Module, images: Sequence[tuple[Tensor, Tensor]]) -> float:
    largest = max(len(targets) for _, targets in images)
    return in_smaller_batches(
        lambda size: evaluate(net, parts_of(images, size)), largest, "evaluating the held-out images"
    )


def _net_at(job: Job, name: str, widths: Widths) -> nn.Module:
    """`net_at` on the calibration images."""
    return in_smaller_batches(
        lambda size: net_at(job.net, name, widths, job.calibration(size)), job.within(250), "recalibrating BatchNorm"
    )


def _smaller_search(job: Job) -> str:
    """What to do where batches of the search do not fit; BatchNorm looks at them, so they are the user's to choose."""
    size, begun = job.fit.batch_size, job.run.slim_log
    how = f"; the search judges nets on batches of {size}: set slim.batch_size={max(2, size // 2)} or slim.memory_gb"
    return how + (f", and delete {begun}: its scores are of other batches" if begun.exists() else "")


def _drop_checkpoint(directory: Path) -> None:
    if world().is_main:
        (directory / "checkpoint.safetensors").unlink(missing_ok=True)


def _train_jointly(job: Job, kind: str, plans: Sequence[_Plan]) -> None:
    """Train an S-Net of all plans of a kind by the recipe, unless none of them is left to do, or it was done before.

    One that lacks a budget, for that came later, is trained anew with all: its switches share their weights.
    """
    recipe, directory = job.config.retrain, job.run.joint(kind)
    left = agreed(lambda: [each for each in plans if not _is_retrained(job, each, _metrics(job, each.budget))])
    if not left:
        return
    before = agreed(lambda: _switches_in(directory / "model.safetensors"))
    lacking = [each.budget for each in left if before.get(each.budget) != dict(each.widths)]
    if not lacking:
        _drop_checkpoint(directory)
        return
    if before:
        job.progress.say(f"{kind} jointly: anew with all budgets, for what was trained lacks {', '.join(lacking)}")
    switches = {each.budget: dict(each.widths) for each in plans}
    if agreed(lambda: _switches_in(directory / "checkpoint.safetensors")) not in ({}, switches):
        _drop_checkpoint(directory)  # of other switches
    space = plans[0].space
    origin = job.model if recipe.init == "supernet" else fresh_model(job.config)
    whole = extract(origin, space, space.full()).to(job.device)  # a copy: the supernet stays as it is
    net = SwitchableNet(whole, space, {each.budget: each.widths for each in plans})
    step, accuracies = switch_step(net, recipe), _accuracies_of_switches(net, job.held_out())
    _train(job, f"{kind} jointly", net, recipe, step, directory, accuracies, {"switches": switches})
    if world().is_main:
        for plan in plans:  # before the new net is there: a kill must not leave figures of the one before beside it
            metrics = _metrics(job, plan.budget)
            if metrics["accuracy"].pop(kind, None) is not None:
                write_json(job.run.subnet(plan.budget) / "metrics.json", _without_onnx(metrics, kind))
    job.save(directory, net)
    _drop_checkpoint(directory)


def _without_onnx(metrics: dict[str, Any], kind: str) -> dict[str, Any]:
    """Figures without what was said of an ONNX file, whose weights are those of a net trained before."""
    return {key: value for key, value in metrics.items() if key != "onnx" or kind != "retrained"}


def _switches_in(path: Path) -> dict[str, dict[str, int]]:
    """Names and widths of the switches in a file of tensors; nothing if it is not there or does not say."""
    return dict(load_tensors(path)[1].get("switches", {})) if path.exists() else {}


def _switch_of(job: Job, plan: _Plan) -> nn.Module:
    """The net of a plan, out of the S-Net that `_train_jointly` left."""
    switchable = load_subnet(job.run.joint(plan.kind), _builder(job)).to(job.device)
    assert isinstance(switchable, SwitchableNet)
    net = switchable.subnet(plan.budget)
    job.save(plan.directory, net, plan.space, plan.widths)
    return net


def _shared(recipe: Recipe) -> dict[str, Any]:
    """What any training has in common with this one."""
    return {field.name: getattr(recipe, field.name) for field in fields(Recipe)}


def read_exchanges(
    log: Path, space: ChannelSpace, budget: Budgeted, widths: Widths
) -> tuple[list[dict[str, Any]], Widths]:
    """The exchanges written so far, and `widths` after them; `RunError` if they are not of this net."""
    made = read_lines(log, MOVE)
    for number, record in enumerate(made, start=1):
        wider, changed = record["wider"], record["widths"]
        following = Widths({**widths, **changed})
        is_wider = wider in space.groups and space.widened(widths, wider) == widths.replaced(wider, following[wider])
        is_choice = all(name in space.groups and width in space.groups[name].choices for name, width in changed.items())
        if not (is_wider and is_choice and budget.cost(following) <= budget.limit):
            raise RunError(f"{log}, line {number} does not follow from the net found; delete it to search again")
        widths = following
    return made, widths


@contextmanager
def _naming(checkpoint: Path) -> Iterator[None]:
    """A failed training says what is left of it."""
    try:
        yield
    except TrainError as error:
        left = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "no epoch was finished before"
        raise TrainError(f"{error}; {left}") from error
    except RuntimeError as error:
        if (ended := worker_ended(error)) is not None:
            raise ended from error
        raise


def _builder(job: Job) -> Callable[[], nn.Module]:
    return lambda: fresh_model(job.config)


def _threads(job: Job) -> int:
    return job.config.latency.threads or job.config.threads or torch.get_num_threads()


def _metrics(job: Job, budget: str) -> dict[str, Any]:
    """What is known of the net of a budget so far."""
    path = job.run.subnet(budget) / "metrics.json"
    return read_checked(path, NET_METRICS) if path.exists() else {}


def _share_done(job: Job, widths: Widths, group: str) -> float:
    """How far the walk is to the budget that is farthest away, counting the candidates of the step."""
    shares = []
    for budget in job.budgets:
        most = budget.cost(job.space.full())
        shares.append(1.0 if most <= budget.limit else (most - budget.cost(widths)) / (most - budget.limit))
    within = list(job.space.groups).index(group) / len(job.space.groups)
    steps = sum(len(g.choices) for g in job.space.groups.values())
    return min(1.0, min(shares) + within / steps)


def _steps_to(steps: Sequence[SlimStep], widths: Widths) -> int:
    return next((number for number, step in enumerate(steps, start=1) if step.widths == widths), 0)


def _need(path: Path, stage: str) -> Path:
    if not path.exists():
        raise RunError(f"{path} is missing: first run `autoslim {stage}` on this run directory")
    return path


def _path_record(job: Job) -> list[dict[str, Any]]:
    """Every step of the search with what its net costs."""
    records = read_lines(job.run.slim_log, STEP)
    steps = read_path(job.run, job.space, job.costs["macs"])
    return [record | job.figures(step.widths) for record, step in zip(records, steps, strict=True)]


def _report_record(job: Job, results: Mapping[str, Any]) -> dict[str, Any]:
    run, config, data = job.run, job.config, job.data
    trainings: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(run.train_log, EPOCH):
        trainings.setdefault(line["stage"], []).append(
            {
                "epoch": line["epoch"],
                "loss": line["losses"].get("widest", line["losses"].get("loss")),
                "accuracy": line.get("accuracy"),
                "seconds": line["seconds"],
            }
        )
    subnets = []
    for budget, subnet in zip(job.budgets, results["subnets"], strict=True):
        directory = run.subnet(budget.text)
        names = ("model.safetensors", "model.onnx", "widths.json", "metrics.json")
        subnets.append(
            {
                **subnet,
                "widths": dict(read_widths(_need(directory / "widths.json", "slim"), job.space)),
                "directory": str(directory),
                "files": [name for name in names if (directory / name).exists()],
            }
        )
    return {
        **run.provenance,
        "name": run.name,
        "model": config.model,
        "system": config.system,
        "device": config.device,
        "threads": config.threads,
        "runtime": config.latency.runtime,
        "seed": config.seed,
        "data": {
            "source": config.data.source,
            "train": len(data.train),
            "holdout": len(data.holdout),
            "test": len(data.test),
            "classes": data.num_classes,
        },
        "config_yaml": config.to_yaml(),
        "metric": "macs",
        "named_metrics": named_metrics(budget.text for budget in job.budgets),
        "full": results["full"],
        "slimmable_macs": slimmable_share(job.space),
        "groups": [asdict(group) for group in job.space.groups.values()],
        "subnets": subnets,
        "path": _path_record(job),
        "score_name": _SCORE_NAMES[config.slim.score],
        "training": [{"stage": stage, "epochs": epochs} for stage, epochs in trainings.items()],
        "frozen": [asdict(note) for note in job.space.notes],
    }


assert set(_SCORE_NAMES) == set(SCORES)
