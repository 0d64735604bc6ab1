"""One string names a model: `torchvision:resnet50`, `timm:...`, `autoslim:mobilenet_v1`, or the user's own function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from torch import nn

from autoslim.errors import ConfigError, nearest
from autoslim.importing import describe, is_installed, load_object
from autoslim.published import published_net


def build_model(name: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The network that `name` stands for, built with keyword `arguments`, with fresh weights.

    `torchvision:NAME`, `timm:NAME`, `autoslim:NAME`, `autoslim:published/NAME`, or one of the user's own,
    `package.module:function` and `path/to/file.py:function`, where
    the function (or class) returns an `nn.Module`. Raises `ConfigError` with what would work.
    """
    arguments = dict(arguments or {})
    family, colon, short = name.partition(":")
    if not colon:
        raise ConfigError(
            f"model {name!r}: write autoslim:mobilenet_v1, torchvision:resnet50, timm:..., package.module:function or "
            f"path/to/file.py:function"
        )
    builder = FAMILIES[family](short) if family in FAMILIES else load_object(name)
    if isinstance(builder, nn.Module):
        if arguments:
            raise ConfigError(f"model {name!r} is a finished module and takes no model_args; name a function instead")
        return builder
    if not callable(builder):
        raise ConfigError(f"model {name!r} is {type(builder).__name__}, no function that returns a torch.nn.Module")
    if family not in FAMILIES:
        _check_builds(name, builder)
    _check_arguments(name, builder, arguments)
    try:
        model = builder(**arguments)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # a network's own sys.exit() would end us as if all were well
        raise ConfigError(f"model {name!r} cannot be built: {describe(error)}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {name!r} gives {type(model).__name__}, no torch.nn.Module")
    return model


def has_numbers(model: nn.Module) -> bool:
    """Has it weights, or, where it was built on the meta device, their shapes only?"""
    return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def check_numbers(name: str, model: nn.Module) -> None:
    """`ConfigError` for a network that can be looked at, but not run."""
    if not has_numbers(model):
        raise ConfigError(
            f"model {name!r} has weights on the meta device, which are shapes without numbers; it cannot be run: "
            "build it on the CPU"
        )


def _check_builds(name: str, builder: Callable[..., Any]) -> None:
    """`ConfigError` for a function of an installed package, unless it says that it gives a module.

    A configuration or a saved net may be a stranger's, and chooses the arguments: what it can call builds networks.
    """
    if not is_installed(builder):
        return
    given: Any = builder
    if not inspect.isclass(builder):
        try:
            given = get_type_hints(builder).get("return")
        except Exception:  # of names that are there for type checking only
            given = None
    if not inspect.isclass(given) or not issubclass(given, nn.Module):
        raise ConfigError(
            f"model {name!r} does not say that it gives a torch.nn.Module, and of installed packages nothing else is "
            "called; call it in a function of your own: path/to/file.py:function"
        )


def _check_arguments(name: str, builder: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(builder).parameters
    except (TypeError, ValueError):
        return
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for key in arguments:
        if key not in parameters:
            raise ConfigError(f"model {name!r} takes no argument {key!r}; {nearest(key, parameters)}")


def _autoslim(name: str) -> Callable[..., Any]:
    from autoslim import zoo

    if name.startswith("published/"):
        net = published_net(name.removeprefix("published/"))

        def build(num_classes: int = 1000, in_channels: int = 3, stem_stride: int = 2) -> nn.Module:
            channels, builder = [*net.channels[:-1], num_classes], getattr(zoo, net.builder)
            return builder(channels=channels, in_channels=in_channels, stem_stride=stem_stride)  # type: ignore[no-any-return]

        return build
    known = {
        key: value
        for key, value in vars(zoo).items()
        if inspect.isfunction(value)
        and value.__module__.startswith(zoo.__name__)
        and not key.startswith("_")
        and inspect.signature(value).return_annotation in ("nn.Module", nn.Module)
    }
    if name not in known:
        raise ConfigError(f"no network autoslim:{name}; {nearest(name, known)}")
    return known[name]


def _torchvision(name: str) -> Callable[..., Any]:
    try:
        from torchvision import models
    except ImportError:
        raise ConfigError("torchvision is not installed: pip install 'autoslim[vision]'") from None
    if name not in models.list_models():
        raise ConfigError(f"no network torchvision:{name}; {nearest(name, models.list_models())}")
    return lambda **arguments: models.get_model(name, weights=None, **arguments)


def _timm(name: str) -> Callable[..., Any]:
    try:
        import timm
    except ImportError:
        raise ConfigError("timm is not installed: pip install 'autoslim[timm]'") from None
    if not timm.is_model(name):
        raise ConfigError(f"no network timm:{name}; {nearest(name, timm.list_models())}")
    return lambda **arguments: timm.create_model(name, pretrained=False, **arguments)


FAMILIES: dict[str, Callable[[str], Callable[..., Any]]] = {
    "autoslim": _autoslim,
    "torchvision": _torchvision,
    "timm": _timm,
}
