"""Pretrained weights: by the name that torchvision or timm give them, or from a file; and how they enter a network."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from autoslim.errors import ConfigError, nearest
from autoslim.models import FAMILIES

_SHOWN = 3  # names of tensors in a message
_TENSOR_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
_NESTED = ("state_dict", "model", "model_state_dict", "net", "weights")  # where training scripts keep the weights
_DEPTH = 4  # of dictionaries in one another; a file may have one that holds itself
_PATIENCE = 15  # seconds
_HEAD_STD = 0.01  # of a new class head's weights: some libraries draw 0.2, whose first losses ruin features


@dataclass(frozen=True)
class Loaded:
    """What `load_pretrained` did, by name of the tensors in the network; `unused` are names in the source."""

    source: str
    taken: tuple[str, ...]
    reinitialised: tuple[str, ...] = ()
    classes: tuple[int, int] | None = None  # of the source and of the network, if they differ
    unused: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people: what was loaded and what stayed as it was, and what was left over, a line each."""
        first = f"{len(self.taken)} of {len(self.taken) + len(self.reinitialised)} tensors from {self.source}"
        if self.reinitialised:
            sizes = f" ({self.classes[0]} classes there, {self.classes[1]} here)" if self.classes else " (not there)"
            first += f"; the class head is re-initialised{sizes}: {_some(self.reinitialised)}"
        return [
            first,
            *([f"not used, for the network has none of that name: {_some(self.unused)}"] * bool(self.unused)),
        ]


def load_pretrained(
    model: nn.Module,
    weights: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    name: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
) -> Loaded:
    """Put pretrained weights into `model`, in place; no code of theirs is run.

    `weights` is a file (safetensors, or a state dict as torch saves it, read with `weights_only=True`; what training
    scripts put around it, a dictionary or a prefix such as "module.", is taken off), a state dict, or, where `name` is
    torchvision:NAME or timm:NAME, "default" or the name the library has for weights (IMAGENET1K_V2, a tag of timm).

    A class head of another size keeps the weights that `model` has, and so does one of `num_classes` outputs that the
    source lacks; but where they are large they are scaled down, to a standard deviation of 0.01, or the first steps of
    training would mend the head at the cost of what was loaded. Raises `ConfigError` in one line for a source that
    cannot be read or downloaded, and for any other tensor that is missing or has another shape. Tensors that the model
    has not are left out: see `Loaded`.
    """
    if isinstance(weights, Mapping):
        source, tensors = "the tensors given", dict(weights)
    else:
        source, tensors = _find(os.fspath(weights), name, dict(model_args or {}))
    tensors = _without_prefix(model, tensors)
    names = _names(model)
    found = {first: next((n for n in alias if n in tensors), None) for first, (_, alias) in names.items()}
    taken = {first: (names[first][0], tensors[n]) for first, n in found.items() if n is not None}
    missing = [n for n in names if n not in taken and not n.endswith("num_batches_tracked")]
    known = {n for _, alias in names.values() for n in alias}
    unused = tuple(n for n in tensors if n not in known)
    if not taken:
        raise ConfigError(
            f"{source} has no tensor of the network: it has {_some(tensors)}, the network {_some(names)}; "
            f"rename them first"
            if tensors
            else f"{source} holds no tensor at all; save model.state_dict()"
        )
    misshapen = [n for n, (own, tensor) in taken.items() if own.shape != tensor.shape]
    head = _head_of_other_size(model, {n: taken[n] for n in misshapen}, num_classes)
    if head is None:
        first = misshapen[0]
        own, tensor = taken[first]
        raise ConfigError(
            f"{source} is of another network: {_count(misshapen)} another shape there, the first: {first!r} is "
            f"{tuple(tensor.shape)} there and {tuple(own.shape)} here"
        )
    absent_head = [n for n in missing if _is_head(model, n, missing, num_classes)] if not head else []
    missing = [n for n in missing if n not in absent_head]
    if missing:
        left = f"; it has {_some(unused)} instead" if unused else ""
        raise ConfigError(f"{source} lacks {len(missing)} tensors of the network: {_some(missing)}{left}")
    fitting = {n: pair for n, pair in taken.items() if n not in misshapen}
    _copy(fitting, source)
    reinitialised = (*misshapen, *absent_head)
    for n in reinitialised:
        _scale_down(names[n][0])
    return Loaded(source, tuple(fitting), reinitialised, head or None, unused)


# --- where they come from ----------------------------------------------------------------------------------------


def _find(weights: str, name: str | None, arguments: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """What to call the source, and its tensors."""
    path = Path(weights).expanduser()
    if path.is_file():
        return str(path), read_tensors(path)
    if path.is_dir():
        raise ConfigError(f"pretrained weights {weights!r} are a directory; name the file of tensors in it")
    family, _, short = (name or "").partition(":")
    if path.suffix.lower() in _TENSOR_FILES or "/" in weights or "\\" in weights:
        others = [p.name for p in path.parent.glob("*") if p.suffix.lower() in _TENSOR_FILES]
        hint = f"; {nearest(path.name, others)}" if others else ""
        raise ConfigError(f"pretrained weights: no file {weights!r} in {Path.cwd()}{hint}")
    if family not in ("torchvision", "timm"):
        raise ConfigError(
            f"pretrained weights {weights!r} are no file, and only models of torchvision and timm have weights with a "
            f"name (this one is {name or 'your own'}); give a safetensors or state-dict file"
        )
    FAMILIES[family](short)  # says so if the library is not installed or has no such network
    return (_torchvision if family == "torchvision" else _timm)(short, weights, arguments)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or state-dict file by name, on the CPU; runs no code of it. Raises `ConfigError`.

    Which of the two it is is seen in the file, whatever its name.
    """
    if path.name.lower().endswith(".index.json"):
        raise ConfigError(
            f"pretrained weights {path} are an index: it says which file holds which tensor; join those files to one, "
            "or give a file that holds all tensors"
        )
    if not path.stat().st_size:
        raise ConfigError(f"pretrained weights {path} cannot be read: the file is empty; copy or download it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, several lines about what the one line of the error says
            content = _content(path)
    except Exception as error:  # damaged in one way of many
        raise ConfigError(f"pretrained weights {path} cannot be read: {_why_unread(path, error)}") from error
    tensors = _state_dict(content)
    if not tensors:
        has = f"a dictionary of {_some(map(str, content))}" if isinstance(content, Mapping) else type(content).__name__
        has = "an empty dictionary" if isinstance(content, Mapping) and not content else has
        raise ConfigError(f"pretrained weights {path}: no state dict, but {has}; save model.state_dict()")
    return tensors


def _content(path: Path) -> Any:
    """What is in a file, whatever it is called: safetensors begin with the length of their header, a JSON object."""
    start = _start(path)
    fits = int.from_bytes(start[:8], "little") + 8 <= path.stat().st_size
    is_named_so = path.suffix.lower() == ".safetensors" and not start.startswith(_TORCH)
    if (fits and start[8:9] == b"{") or is_named_so:
        return dict(load_file(path))
    with path.open("rb") as file:  # by its name, torch would take it for safetensors again
        return torch.load(file, map_location="cpu", weights_only=True)


_TORCH = (b"PK", b"\x80")  # as a zip archive begins, and a pickle: torch.save writes the one, and wrote the other


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _why_unread(path: Path, error: Exception) -> str:
    """Why a file gives no tensors, in one line."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, (PermissionError, FileNotFoundError)):
        return error.strerror or text
    if "TorchScript" in str(error):
        return (
            "it is a TorchScript archive, which is a program; save its tensors alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), OTHER_FILE)"
        )
    start = _start(path)
    line = start.partition(b"\n")[0]
    is_text = line.isascii() and line.decode().isprintable() and bool(line.strip())
    if path.suffix.lower() == ".safetensors" and not is_text:
        return f"{text}; copy or download it again"
    if not start.startswith(_TORCH):
        begins = f", but text that begins {line.decode()!r}" if is_text else ""
        return f"it is no file of weights{begins}; give safetensors or what torch.save(model.state_dict(), FILE) writes"
    if "weights_only" in str(error).lower():
        unsafe = re.search(r"(?:GLOBAL|Unsupported (?:global|class)[^\w]*(?:GLOBAL)?) ([\w.]+)", str(error))
        what = f" ({unsafe[1]})" if unsafe else ""
        return f"it is no plain state dict{what}: save model.state_dict() alone, or safetensors"
    if "file not found" in text or "not in a subdirectory" in text:
        return "it is a zip archive, but none that torch.save wrote; save model.state_dict()"
    return f"it is damaged or cut short ({text.partition('. ')[0]}); copy or download it again"


def _state_dict(content: Any, depth: int = _DEPTH) -> dict[str, Tensor]:
    """Its tensors by name; those under a usual key come first, for a checkpoint may have other tensors beside them."""
    if not isinstance(content, Mapping):
        return {}
    for key in _NESTED if depth else ():
        if inner := _state_dict(content.get(key), depth - 1):
            return inner
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _torchvision(model: str, weights: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
    from torchvision import models

    known = models.get_model_weights(model)
    members = {member.name: member for member in known}
    if not members:
        raise ConfigError(f"torchvision has no weights for {model}; give a safetensors or state-dict file")
    member = known.DEFAULT if weights.lower() == "default" else members.get(weights.rpartition(".")[2])
    if member is None:
        raise ConfigError(f"torchvision:{model} has no weights {weights!r}; {nearest(weights, [*members, 'default'])}")
    source = f"torchvision's {model} {member.name}"
    try:
        tensors = member.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:
        raise _no_download(source, member.url, error) from error
    # DenseNet's files are older than the names of its layers
    return source, {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key): t for key, t in tensors.items()}


def _timm(model: str, weights: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
    import timm

    architecture, _, tag = model.partition(".")
    tags = [full.partition(".")[2] for full in timm.models.get_arch_pretrained_cfgs(architecture)]
    wanted = tag if weights.lower() == "default" else weights.removeprefix(f"{architecture}.")
    if wanted and wanted not in tags:
        raise ConfigError(
            f"timm:{architecture} has no weights {wanted!r}; {nearest(wanted, [*filter(None, tags), 'default'])}"
        )
    full = f"{architecture}.{wanted}" if wanted else architecture
    facts: Any = timm.get_pretrained_cfg(full)
    if facts is None or not (facts.hf_hub_id or facts.url or facts.file):
        raise ConfigError(f"timm has no weights for {full}; give a safetensors or state-dict file")
    source = f"timm's {full}"
    repository = facts.hf_hub_id and (facts.hf_hub_id + full if facts.hf_hub_id.endswith("/") else facts.hf_hub_id)
    where = f"https://huggingface.co/{repository}" if repository else facts.url
    try:
        if repository and not _is_cached(repository):
            _reach(where)  # the hub's client tries for a minute
        arguments = {key: value for key, value in arguments.items() if key not in ("num_classes", "pretrained")}
        return source, dict(timm.create_model(full, pretrained=True, **arguments).state_dict())
    except Exception as error:
        raise _no_download(source, where, error) from error


def _is_cached(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)


def _reach(url: str) -> None:
    """Raises `OSError` if nobody answers; an answer of any kind will do."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PATIENCE).close()
    except urllib.error.HTTPError:
        return


def _no_download(source: str, url: str, error: Exception) -> ConfigError:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConfigError(
        f"{source} cannot be downloaded from {url}: {text}; where there is no network, bring that file here and give "
        f"its path instead: --pretrained FILE.safetensors or FILE.pth"
    )


# --- how they fit ------------------------------------------------------------------------------------------------


def _names(model: nn.Module) -> dict[str, tuple[Tensor, list[str]]]:
    """Each tensor of the state dict once, under its first name, with all of its names."""
    names: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            names.setdefault(id(tensor), (tensor, []))[1].append(name)
    return {alias[0]: (tensor, alias) for tensor, alias in names.values()}


def _without_prefix(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what stands before all names of the network ("module.", "model.", "_orig_mod.")."""
    own = set(model.state_dict())
    prefixes = {""} | {key[: -len(name)] for name in [*own][:1] for key in tensors if key.endswith(f".{name}")}

    def matches(prefix: str) -> int:
        return sum(key.startswith(prefix) and key[len(prefix) :] in own for key in tensors)

    best = max(sorted(prefixes, key=len), key=matches)
    return {key.removeprefix(best): tensor for key, tensor in tensors.items()}


def _head_of_other_size(
    model: nn.Module, misshapen: Mapping[str, tuple[Tensor, Tensor]], num_classes: int | None
) -> tuple[int, int] | tuple[()] | None:
    """How many classes there and here; nothing if all tensors fit, None if it is not the head alone that does not.

    A layer with another number of outputs changes the inputs of those that read it. Only the last is read by none.
    """
    sizes = set()
    for name, (own, tensor) in misshapen.items():
        if not own.ndim or own.ndim != tensor.ndim or own.shape[1:] != tensor.shape[1:]:
            return None
        if own.shape[0] != (num_classes or own.shape[0]) or not _may_be_of_head(model, name, own.shape[0], num_classes):
            return None
        sizes.add((tensor.shape[0], own.shape[0]))
    return () if not sizes else sizes.pop() if len(sizes) == 1 else None


def _may_be_of_head(model: nn.Module, name: str, size: int, num_classes: int | None) -> bool:
    """Is this a tensor of a layer of so many outputs that the next one does not read, as it would read a stem's?

    What is in no such layer, as a table of positions or a weight of the network itself, counts by the number of
    classes alone.
    """
    path = name.rpartition(".")[0]
    layers = dict(model.named_modules(remove_duplicate=False))
    while path and not hasattr(layers[path], "out_features") and not hasattr(layers[path], "out_channels"):
        path = path.rpartition(".")[0]  # of a weight that is computed: below its layer
    if not path:
        return num_classes == size
    if _outputs_of(layers[path]) != size:
        return False
    places = list(layers)
    later = (layers[place] for place in places[places.index(path) + 1 :] if not place.startswith(f"{path}."))
    reader = next((module for module in later if next(module.parameters(recurse=False), None) is not None), None)
    return reader is None or size not in {getattr(reader, key, None) for key in _INPUTS}


_INPUTS = ("in_features", "in_channels", "num_features", "num_channels")  # what layers call the size they read


def _outputs_of(layer: nn.Module) -> Any:
    return getattr(layer, "out_features", getattr(layer, "out_channels", None))


def _is_head(model: nn.Module, name: str, missing: Iterable[str], num_classes: int | None) -> bool:
    """Is this a tensor of a layer with an output per class, none of which is there?"""
    path, _, _ = name.rpartition(".")
    layer = model.get_submodule(path)
    own = {f"{path}.{key}" for key, _ in layer.named_parameters(recurse=False)}
    return num_classes is not None and _outputs_of(layer) == num_classes and own <= set(missing)


@torch.no_grad()
def _scale_down(tensor: Tensor) -> None:
    """Weights of a new class head to `_HEAD_STD`, if they are larger; biases stay."""
    if tensor.ndim > 1 and tensor.is_floating_point():
        tensor *= _HEAD_STD / max(float(tensor.std(correction=0)), _HEAD_STD)


def _unlike_weights(own: Tensor, tensor: Tensor) -> str | None:
    """What sort of tensor it is, if its numbers are not there to be copied."""
    if tensor.is_meta:
        return "a meta tensor, a shape without numbers"
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype})"
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout})"
    if tensor.is_complex() and not own.is_complex():
        return f"complex ({tensor.dtype})"
    if own.is_floating_point() and not tensor.is_floating_point():  # quantized by hand, or rounded: its scale is lost
        return f"of no floating-point type ({tensor.dtype})"
    return None


def _copy(pairs: Mapping[str, tuple[Tensor, Tensor]], source: str) -> None:
    for name, (own, tensor) in pairs.items():
        if (sort := _unlike_weights(own, tensor)) is not None:
            raise ConfigError(f"{source}: {name!r} is {sort}; save it as a plain tensor of {own.dtype}")
        numbers = tensor.to(own.dtype) if own.is_floating_point() else tensor  # of 8 bits, torch does not ask them
        if numbers.is_floating_point() and not bool(numbers.isfinite().all()):
            raise ConfigError(f"{source}: {name!r} holds what is no number")
    with torch.no_grad():
        for name, (own, tensor) in pairs.items():
            try:
                own.copy_(tensor)
            except RuntimeError as error:
                raise ConfigError(f"{source}: {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _count(names: list[str]) -> str:
    return f"{len(names)} tensors have" if len(names) > 1 else "a tensor has"
