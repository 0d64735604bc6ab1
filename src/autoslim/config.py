"""The configuration of a run: strict models, YAML, overrides, and errors that name the nearest right key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from autoslim.batching import Fit, fit_batches
from autoslim.cost import Budget, meaning_of
from autoslim.errors import AutoSlimError, BudgetError, ConfigError, SpaceError, nearest
from autoslim.recipe import RetrainRecipe, SupernetRecipe, problem_in
from autoslim.space import ChannelSpace, name_of_ratio, parse_bins


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _count_or_share(value: Any) -> Any:
    """A whole number counts images, 1 too; neither true nor 1.0, the share of all of them, is meant for that."""
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        raise ValueError("a number of images, as 5000, or a share below 1, as 0.2, is wanted here")
    return value


class DataConfig(_Strict):
    """Images and how they are read; docs/data.md says more.

    `source`: fashion-mnist-mini, an .npz, an image folder, torchvision:NAME, hf:NAME, wds:SHARDS or a Python function.
    `augment`, `mix`: names, comma separated (see `parse_augment`, `parse_mix`); "auto" is what suits the source.
    `center_crop`: share of the shorter side that is kept of held-out and test images (ImageNet: 0.875). Up to
    `memory_gb` gigabytes of decoded images are held in memory, more are streamed by `workers` processes ("auto": one
    for each CPU, up to 8), each with up to `prefetch` batches ready; no result depends on their number.
    """

    source: str = "fashion-mnist-mini"
    image_size: Annotated[int, Field(ge=1)] | None = None
    channels: Literal[1, 3] | None = None
    center_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    holdout: Annotated[
        Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)], BeforeValidator(_count_or_share)
    ] = 0.2
    augment: str = "auto"
    mix: str = "none"
    skip_broken: bool = False
    memory_gb: Annotated[float, Field(ge=0)] = 4.0
    workers: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] = "auto"
    prefetch: Annotated[int, Field(ge=1, le=64)] = 2
    image_column: str | None = None
    label_column: str | None = None
    test_shards: str | None = None

    def reading(self) -> dict[str, Any]:
        """What `load_data` is told besides the source, the hold-out and who reads."""
        names = ("image_size", "channels", "center_crop", "skip_broken", "memory_gb")
        return {name: getattr(self, name) for name in (*names, "image_column", "label_column", "test_shards")}


class SpaceConfig(_Strict):
    """Which widths may be chosen, which layers (globs) are left alone, and what tracing cannot see (see `trace`).

    `bins`: how many, or "size:16" for bins of 16 channels, "paper", "paper-from-zero", "multiples" (the default of the
    systems of uniform widths; see `ChannelSpace.with_choices`), or "measured" for the multiples of `divisor` at which
    the measured latency steps down.
    """

    bins: int | str = 12
    divisor: Annotated[int, Field(ge=1)] = 8
    min_ratio: Annotated[float, Field(gt=0, le=1)] = 1 / 6
    fixed: tuple[str, ...] = ()
    tie: tuple[tuple[str, ...], ...] = ()
    free: tuple[str, ...] = ()

    @field_validator("bins", mode="before")
    @classmethod
    def _bins(cls, bins: Any) -> Any:
        try:
            if bins != "measured":
                parse_bins(bins if isinstance(bins, (int, str)) else repr(bins))
        except SpaceError as error:
            raise SpaceError(f"space.{error} (or 'measured')") from None
        return bins

    def choices(self, space: ChannelSpace) -> ChannelSpace:
        """The widths that may be chosen; where they are to be measured, those to measure."""
        return space.with_choices("size:1" if self.bins == "measured" else self.bins, self.divisor, self.min_ratio)

    def wishes(self) -> dict[str, Any]:
        """What `trace` is told about layers."""
        return {"fixed": self.fixed, "tie": self.tie, "free": self.free}


class SlimConfig(_Strict):
    """The greedy search: budgets, and the held-out images it looks at (all, if `images` is null).

    `rule`: what makes a step the best one (see `greedy_slim`); "auto" is the score alone, as in the paper, and where an
    entry of `budgets` has several limits, the score per cost of the one that binds. `exchange`: move bins between
    groups afterwards, while that helps (see `exchange_bins`). `judge`: "exhaustive" runs every candidate on all images;
    "reuse" gives the same scores, and computes only what is not the same in the candidates of a step, of which it keeps
    up to `keep_gb` gigabytes; "racing" does that and drops candidates, batch by batch, that cannot win any more: a step
    goes wrong by that with a probability below `1 - confidence` (see `RacingJudge`). `memory_gb`: gigabytes that the
    search may take beside the images; batches become smaller than `batch_size`, and less is kept, where they would not
    suffice (see `fit_batches`). `precision`: "bf16" runs the nets of the search in that, unless rounding would move the
    comparison of nets by more than half of what chance does (see `rounding_of`); quick where the device has it, and
    many times slower where not. `screen`: look only at so many candidates of a step, those whose loss rises least by
    the estimate of one backward pass (see `promising`).
    """

    budgets: Annotated[tuple[str, ...], Field(min_length=1)] = ("50%", "25%")
    images: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=2)] = 250
    score: Literal["accuracy", "loss"] = "loss"
    rule: Literal["auto", "score", "score-per-cost"] = "auto"
    exchange: bool = False
    judge: Literal["racing", "reuse", "exhaustive"] = "racing"
    confidence: Annotated[float, Field(gt=0, le=1)] = 0.95
    keep_gb: Annotated[float, Field(ge=0)] = 2.0
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    screen: Annotated[int, Field(ge=1)] | None = None

    @property
    def step_rule(self) -> str:
        """The rule for `greedy_slim`."""
        if self.rule != "auto":
            return self.rule
        return "score-per-cost" if any(len(Budget.parse_all(text)) > 1 for text in self.budgets) else "score"

    def fit(self, space: ChannelSpace) -> Fit:
        """The batches of a search, and what may be kept of a pass; `ConfigError` for too small a `memory_gb`."""
        keep = 0 if self.judge == "exhaustive" else int(self.keep_gb * 1e9)
        if self.memory_gb is None:
            return Fit(self.batch_size, keep)
        screened = self.screen is not None and self.judge != "exhaustive"
        most = self.memory_gb * 1e9
        try:
            return fit_batches(space, most, batch_size=self.batch_size, keep_bytes=keep, screened=screened)
        except ConfigError as error:
            raise ConfigError(f"slim.memory_gb={self.memory_gb:g}: {error}") from None

    @model_validator(mode="after")
    def _screens_what_it_can(self) -> SlimConfig:
        if self.screen is not None and self.judge == "exhaustive":
            raise ConfigError("slim.screen needs slim.judge racing or reuse; exhaustive looks at every candidate")
        return self

    @field_validator("budgets", mode="before")
    @classmethod
    def _texts(cls, budgets: Any) -> Any:
        listed = [budgets] if isinstance(budgets, (str, int, float)) else budgets
        if not isinstance(listed, (list, tuple)):
            return listed
        texts = tuple(str(budget) for budget in listed)
        for text in texts:
            Budget.parse_all(text)
        first: dict[Any, str] = {}
        for text in texts:
            if (meaning := meaning_of(text)) in first:
                raise BudgetError(f"budgets: {text!r} and {first[meaning]!r} are the same; keep one")
            first[meaning] = text
        return texts


class LatencyConfig(_Strict):
    """Where latency is measured: `runtime` and CPU `threads` (null: those of the run) on the device of the run.

    Budgets of `latency_ms` need a table of operators: it is measured on `nets` subnets, or read from the CSV `table`.
    """

    runtime: Literal["torch", "torch.compile", "onnxruntime", "openvino"] = "torch"
    threads: Annotated[int, Field(ge=1)] | None = None
    nets: Annotated[int, Field(ge=4)] = 40
    table: str | None = None


class ExportConfig(_Strict):
    """What is written beside the tensors. "auto": if the extra is installed."""

    onnx: bool | Literal["auto"] = "auto"
    report: bool | Literal["auto"] = "auto"


_UNIFORM = ("us-net", "s-net", "shared-bn", "i-net")
_NOT_ONE_NETWORK = ("s-net", "shared-bn", "i-net")  # BatchNorm of their own for each switch, or no shared weights
_SYSTEMS = ("autoslim", "nonuniform-us-net", *_UNIFORM)
_FINE_TUNING_LR = 0.03  # at 0.1 features do not recover for long (benchmarks/LOG.md)
_WEIGHTS: Mapping[str | bool, str | None] = {True: "default", False: None}  # as timm says it


class Config(_Strict):
    """Everything about a run.

    `system`: which system of the papers is run. All but autoslim, whose widths are found for the budgets of `slim`,
    give nets at the width `ratios`; us-net trains the whole range between the lowest and the highest of them.
    `pretrained`: weights to start from, a safetensors or state-dict file, or, of a model of torchvision or timm,
    "default" (or true) or the name they have there. With them, `train.sort` is l1 (first-order after `plain_epochs`),
    `retrain.init` supernet, and the rate of both 0.03 for SGD, if not given. Raises `ConfigError` for what cannot be.
    """

    model: str
    model_args: dict[str, Any] = {}
    pretrained: Annotated[str, Field(min_length=1)] | None = None
    system: Literal["autoslim", "nonuniform-us-net", "us-net", "s-net", "shared-bn", "i-net"] = "autoslim"
    ratios: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (1.0, 0.75, 0.5, 0.25)
    data: DataConfig = DataConfig()
    space: SpaceConfig = SpaceConfig()
    train: SupernetRecipe = SupernetRecipe()
    slim: SlimConfig = SlimConfig()
    retrain: RetrainRecipe = RetrainRecipe()
    latency: LatencyConfig = LatencyConfig()
    export: ExportConfig = ExportConfig()
    calibration_images: Annotated[int, Field(ge=1)] = 1000
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    device: str = "cpu"
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None

    if not TYPE_CHECKING:  # where fields are the signature

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(_explain(error)) from None

        __init__.__pydantic_base_init__ = True  # for model_validate, which does not come through here

    @model_validator(mode="before")
    @classmethod
    def _defaults_with_pretrained(cls, values: Any) -> Any:
        """What is sensible for trained weights; as values, so that config.yaml states them."""
        if not isinstance(values, Mapping) or not isinstance(values.get("pretrained"), (str, bool)):
            return values
        values = {**values, "pretrained": _WEIGHTS.get(values["pretrained"], values["pretrained"])}
        if values["pretrained"] is not None:
            for section, key, default in (("train", "sort", "l1"), ("retrain", "init", "supernet")):
                if isinstance(given := values.get(section, {}), Mapping):
                    values[section] = {key: default, **given}
                    is_tuned = section == "train" or values[section]["init"] == default
                    if is_tuned and given.get("optimizer", "sgd") == "sgd":  # others want rates of their own
                        values[section].setdefault("lr", _FINE_TUNING_LR)
        return values

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_plain_epochs(cls, values: Any) -> Any:
        """A network that was trained has gradients that tell which channels matter, pretrained or not."""
        train = values.get("train") if isinstance(values, Mapping) else None
        if not isinstance(train, Mapping) or not train.get("plain_epochs"):
            return values
        return {**values, "train": {"sort": "first-order", **train}}

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_alpha_divergence(cls, values: Any) -> Any:
        """Its gradients are to be clipped by value, as its authors do; a value, so that config.yaml states it."""
        train = values.get("train") if isinstance(values, Mapping) else None
        if not isinstance(train, Mapping) or train.get("distill") != "alpha":
            return values
        return {**values, "train": {"clip_value": 1.0, **train}}

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_uniform_widths(cls, values: Any) -> Any:
        """Bins are steps of a search; uniform widths may be any, as the papers' are. A value, for config.yaml too."""
        if not isinstance(values, Mapping) or values.get("system") not in _UNIFORM:
            return values
        space = values.get("space", {})
        return {**values, "space": {"bins": "multiples", **space}} if isinstance(space, Mapping) else values

    @field_validator("system", mode="before")
    @classmethod
    def _known(cls, system: Any) -> Any:
        if isinstance(system, str) and system not in _SYSTEMS:
            likely = system.lower().replace("_", "-").replace(" ", "-")
            raise ConfigError(f"no system {system!r}; {nearest(likely, _SYSTEMS)}")
        return system

    @model_validator(mode="after")
    def _plain_epochs_are_possible(self) -> Config:
        plain = self.train.plain_epochs
        if plain > self.train.epochs:
            raise ConfigError(
                f"train.plain_epochs={plain} is more than train.epochs={self.train.epochs}, which hold them"
            )
        if plain and self.system in _NOT_ONE_NETWORK:
            raise ConfigError(
                f"train.plain_epochs: system {self.system} has no network that could be trained alone first; that is "
                "for autoslim, nonuniform-us-net and us-net"
            )
        return self

    @field_validator("ratios")
    @classmethod
    def _distinct(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if len({name_of_ratio(ratio) for ratio in ratios}) < len(ratios):
            raise ConfigError(f"ratios: {', '.join(f'{ratio:g}' for ratio in ratios)} names one twice")
        return ratios

    def to_yaml(self) -> str:
        """Every value, defaults filled in."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)

    def plain(self) -> dict[str, Any]:
        """As plain JSON types."""
        values: dict[str, Any] = self.model_dump(mode="json")
        return values


def load_config(path: str | Path, overrides: Iterable[str] = (), **extra: Any) -> Config:
    """Read YAML, apply `key.path=value` overrides and `extra` top-level values, validate. Raises `ConfigError`."""
    values = read_yaml(Path(path))
    if isinstance(values.get("provenance"), dict):
        del values["provenance"]  # of the `config.yaml` of a run: where that came from, and no setting
    for text in overrides:
        override(values, text)
    values |= {key: value for key, value in extra.items() if value is not None}
    return make_config(values, str(path))


def make_config(values: Mapping[str, Any], where: str = "configuration") -> Config:
    """Validate plain values; `ConfigError` in one line, with the nearest key for an unknown one."""
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from error
    except AutoSlimError as error:  # of our own validators
        raise type(error)(f"{where}: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; `ConfigError` naming file and line otherwise."""
    try:
        values = _plain_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; {nearest(path.name, others)}" if others else ""
        raise ConfigError(f"no configuration file {str(path)!r}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except _YAML_ERRORS as error:
        raise ConfigError(f"{path} is no valid YAML: {_in_short(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values, such as 'model: torchvision:resnet50'")
    return values


_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError, OverflowError)  # 2001-99-99 is a ValueError
_MOST_VALUES = 100_000


def _plain_yaml(text: str) -> Any:
    """Numbers, texts, lists and mappings, and nothing that a tag would make of them; `ValueError` for a bomb."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _number_of_values(node, {}) > _MOST_VALUES:
            raise ValueError(f"it stands for more than {_MOST_VALUES:,} values")
        _refuse_twins(node, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _number_of_values(node: yaml.Node, known: dict[int, int]) -> int:
    """With each alias written out: a few lines of aliases of aliases stand for billions."""
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # what is met again in itself has no end
        inner = node.value if isinstance(node, (yaml.SequenceNode, yaml.MappingNode)) else ()
        parts = (part for each in inner for part in (each if isinstance(each, tuple) else (each,)))
        known[id(node)] = 1 + sum(_number_of_values(part, known) for part in parts)
    return known[id(node)]


def _refuse_twins(node: yaml.Node, seen: set[int]) -> None:
    """`ValueError` for a key that a mapping has twice: YAML forbids that, but its parser takes the last in silence."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for each in node.value:
        for part in each if isinstance(each, tuple) else (each,):
            _refuse_twins(part, seen)
        if isinstance(each, tuple) and isinstance(each[0], yaml.ScalarNode):
            key, line = each[0].value, each[0].start_mark.line + 1
            if key in lines:
                raise ValueError(f"the key {key!r} stands in line {lines[key]} and again in line {line}; keep one")
            lines[key] = line


def _in_short(error: BaseException) -> str:
    text = "lists in lists without an end" if isinstance(error, RecursionError) else " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def override(values: dict[str, Any], text: str) -> None:
    """Apply one `key.path=value` to plain values, in place; the value is read as YAML."""
    key, equals, given = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r}: write key=value, such as --set train.lr=0.1")
    try:
        value = _plain_yaml(given)
    except _YAML_ERRORS as error:
        raise ConfigError(f"--set {text!r}: {_in_short(error)}") from error
    *parents, last = key.strip().split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {text!r}: {parent!r} holds a value, and nothing below it can be set")
        values = inner
    values[last] = value


def _explain(error: ValidationError) -> str:
    """The first problem, in one line."""
    errors = error.errors()
    first = errors[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys_at(path[:-1])
        return f"no key {'.'.join(path)!r}; {nearest(path[-1], known)}"
    if first["type"] == "missing":
        return f"{'.'.join(path)!r} is missing"
    return problem_in(errors)


def _keys_at(path: list[str]) -> list[str]:
    """The keys known below a path of keys."""
    schema = TypeAdapter(Config).json_schema()
    node: dict[str, Any] = schema
    for part in path:
        node = node.get("properties", {}).get(part, {})
        reference = node.get("$ref", "").rpartition("/")[2]
        node = schema["$defs"].get(reference, node)
    return list(node.get("properties", {}))
