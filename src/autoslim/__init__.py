"""AutoSlim: decides the channel number of every layer of a network for a budget (Yu & Huang 2019).

The public names are imported when first used, so that `import autoslim` (and `autoslim --help`) needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from autoslim._version import __version__ as __version__

if TYPE_CHECKING:
    from autoslim import data as data
    from autoslim import distributed as distributed
    from autoslim import zoo as zoo
    from autoslim.batching import fit_batches as fit_batches
    from autoslim.calibrate import batch_statistics as batch_statistics
    from autoslim.calibrate import recalibrate_batchnorm as recalibrate_batchnorm
    from autoslim.config import Config as Config
    from autoslim.config import load_config as load_config
    from autoslim.cost import Budget as Budget
    from autoslim.cost import JointCost as JointCost
    from autoslim.cost import MacCost as MacCost
    from autoslim.cost import MemoryCost as MemoryCost
    from autoslim.cost import ParamCost as ParamCost
    from autoslim.cost import PeakMemoryCost as PeakMemoryCost
    from autoslim.cost import resolve_budget as resolve_budget
    from autoslim.errors import AutoSlimError as AutoSlimError
    from autoslim.errors import BudgetError as BudgetError
    from autoslim.errors import ConfigError as ConfigError
    from autoslim.errors import DataError as DataError
    from autoslim.errors import ExportError as ExportError
    from autoslim.errors import LatencyError as LatencyError
    from autoslim.errors import RunError as RunError
    from autoslim.errors import SpaceError as SpaceError
    from autoslim.errors import TraceError as TraceError
    from autoslim.errors import TrainError as TrainError
    from autoslim.export import export_onnx as export_onnx
    from autoslim.export import export_program as export_program
    from autoslim.export import load_subnet as load_subnet
    from autoslim.export import save_subnet as save_subnet
    from autoslim.judge import Judge as Judge
    from autoslim.judge import RacingJudge as RacingJudge
    from autoslim.judge import ReuseJudge as ReuseJudge
    from autoslim.judge import evaluate as evaluate
    from autoslim.latency import measure_latency as measure_latency
    from autoslim.latency import measure_latency_table as measure_latency_table
    from autoslim.losses import alpha_divergence as alpha_divergence
    from autoslim.losses import soft_cross_entropy as soft_cross_entropy
    from autoslim.pretrained import Loaded as Loaded
    from autoslim.pretrained import load_pretrained as load_pretrained
    from autoslim.recipe import Recipe as Recipe
    from autoslim.recipe import RetrainRecipe as RetrainRecipe
    from autoslim.recipe import SupernetRecipe as SupernetRecipe
    from autoslim.report import render_report as render_report
    from autoslim.screening import promising as promising
    from autoslim.slicing import active_attributes as active_attributes
    from autoslim.slicing import active_tensors as active_tensors
    from autoslim.slicing import extract as extract
    from autoslim.slicing import run_subnet as run_subnet
    from autoslim.slim import exchange_bins as exchange_bins
    from autoslim.slim import greedy_slim as greedy_slim
    from autoslim.slim import uniform_like as uniform_like
    from autoslim.slim import widths_within as widths_within
    from autoslim.sorting import first_order as first_order
    from autoslim.sorting import sort_channels as sort_channels
    from autoslim.space import ChannelGroup as ChannelGroup
    from autoslim.space import ChannelSpace as ChannelSpace
    from autoslim.space import SlimStep as SlimStep
    from autoslim.space import Widths as Widths
    from autoslim.supernet import Supernet as Supernet
    from autoslim.supernet import sandwich_backward as sandwich_backward
    from autoslim.switchable import SwitchableNet as SwitchableNet
    from autoslim.switchable import switch_backward as switch_backward
    from autoslim.tables import LatencyCost as LatencyCost
    from autoslim.tables import LatencyTable as LatencyTable
    from autoslim.tracing import trace as trace
    from autoslim.train import retrain as retrain
    from autoslim.train import train_supernet as train_supernet

_HOMES = {
    "batching": ("fit_batches",),
    "calibrate": ("batch_statistics", "recalibrate_batchnorm"),
    "config": ("Config", "load_config"),
    "cost": ("Budget", "JointCost", "MacCost", "MemoryCost", "ParamCost", "PeakMemoryCost", "resolve_budget"),
    "errors": (
        "AutoSlimError",
        "BudgetError",
        "ConfigError",
        "DataError",
        "ExportError",
        "LatencyError",
        "RunError",
        "SpaceError",
        "TraceError",
        "TrainError",
    ),
    "export": ("export_onnx", "export_program", "load_subnet", "save_subnet"),
    "judge": ("Judge", "RacingJudge", "ReuseJudge", "evaluate"),
    "latency": ("measure_latency", "measure_latency_table"),
    "losses": ("alpha_divergence", "soft_cross_entropy"),
    "pretrained": ("Loaded", "load_pretrained"),
    "recipe": ("Recipe", "RetrainRecipe", "SupernetRecipe"),
    "report": ("render_report",),
    "screening": ("promising",),
    "slicing": ("active_attributes", "active_tensors", "extract", "run_subnet"),
    "slim": ("exchange_bins", "greedy_slim", "uniform_like", "widths_within"),
    "sorting": ("first_order", "sort_channels"),
    "space": ("ChannelGroup", "ChannelSpace", "SlimStep", "Widths"),
    "supernet": ("Supernet", "sandwich_backward"),
    "switchable": ("SwitchableNet", "switch_backward"),
    "tables": ("LatencyCost", "LatencyTable"),
    "tracing": ("trace",),
    "train": ("retrain", "train_supernet"),
}
_MODULES = ("data", "distributed", "zoo")
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [*_HOME, "__version__", *_MODULES]  # one list of public names, not two


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"autoslim.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"autoslim.{_HOME[name]}"), name)
    raise AttributeError(f"module 'autoslim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
