"""Networks on disk: plain tensors with their widths, ONNX and torch.export programs. Nothing is ever unpickled."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import tempfile
import textwrap
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoslim.calibrate import evaluating
from autoslim.distributed import samples_of
from autoslim.errors import AutoSlimError, ExportError, RunError, SpaceError
from autoslim.files import write_whole
from autoslim.models import build_model
from autoslim.slicing import copy_module, extract
from autoslim.space import ChannelSpace, Widths, a_space, as_widths
from autoslim.switchable import SwitchableNet
from autoslim.tracing import split_input
from autoslim.train import load_unshared, unshared

_CHECKSUM = "checksum"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Tensors and a JSON record in one safetensors file, which appears whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one key: safetensors writes several in any order, and the same net must be the same bytes
    text = json.dumps({**record, _CHECKSUM: _checksum(plain, record)})
    write_whole(path, save(plain, {"autoslim": text}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote; `RunError` naming the file if it is damaged or no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            record = dict(json.loads((file.metadata() or {})["autoslim"]))
            # copies: those of safetensors lie in the file, which may be replaced, or be gone, while they are used
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        said = record.pop(_CHECKSUM, None)  # older files have none
        if said is not None and said != _checksum(tensors, record):
            raise ValueError("its checksum is another one")
    except FileNotFoundError:
        raise RunError(f"there is no file {path}") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise RunError(f"{path} is damaged ({text}); delete it to compute it again") from error
    return tensors, record


def _checksum(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> str:
    """Of names, types, shapes and values, in any order, and of the record: bits that flip on a disk leave no trace."""
    total = zlib.crc32(json.dumps(record).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def save_subnet(
    directory: str | Path,
    subnet: nn.Module,
    space: ChannelSpace | None = None,
    widths: Mapping[str, int] | None = None,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> None:
    """Write `model.safetensors` and `widths.json` of an extracted subnet, or of a whole `SwitchableNet`.

    `model` is the string that names the original network (`torchvision:resnet50`, `package.module:function`), with
    `model_args`; without it `load_subnet` has to be given the original network. Space and widths of a `SwitchableNet`
    are its own; its `widths.json` holds them by name of the switch. Raises `ExportError` for a net of other widths.
    """
    record: dict[str, Any] = {"model": model, "model_args": dict(model_args or {})}
    if isinstance(subnet, SwitchableNet):
        space = subnet.space
        record["switches"] = {name: dict(as_widths(each)) for name, each in subnet.switches.items()}
        record["private"] = subnet.is_private
        text = json.dumps(record["switches"], indent=2)
    elif space is None or widths is None:
        raise ExportError(
            "save_subnet needs the space and the widths of the subnet: save_subnet(path, net, space, widths)"
        )
    else:
        widths = as_widths(widths)
        a_space(space).check(widths)
        _check_extracted(subnet, space, widths)
        record["widths"] = dict(widths)
        text = widths.to_json()
    record["space"] = json.loads(space.to_json())
    directory = Path(directory)
    write_whole(directory / "widths.json", text)  # first: the tensors say that the net is there
    save_tensors(directory / "model.safetensors", unshared(subnet), record)


def _check_extracted(subnet: nn.Module, space: ChannelSpace, widths: Widths) -> None:
    """`ExportError` unless the tensors have the shapes that they have at these widths: the file could not be read."""
    actual = dict(subnet.named_parameters()) | dict(subnet.named_buffers())
    for name, _ in subnet.named_parameters():
        if name not in space.parameters:
            raise ExportError(f"save_subnet: {name!r} is no parameter of the network that the space was traced from")
    for name, axes in (*space.parameters.items(), *space.buffers.items()):
        is_free = name in space.buffers and not any(axis.groups for axis in axes)  # see `check_model`
        expected = tuple(axis.kept(widths) for axis in axes)
        given = tuple(actual[name].shape) if name in actual else None
        if not is_free and given != expected:
            raise ExportError(
                f"save_subnet: {name!r} has shape {given or 'none'} here and {expected} at these widths; give the net "
                "that extract(model, space, widths) made, with the same space and widths"
            )


def load_subnet(directory: str | Path, model: nn.Module | Callable[[], nn.Module] | str | None = None) -> nn.Module:
    """The plain module or `SwitchableNet` saved in `directory`, bit-exact, in evaluation mode.

    `model` is the original network, which stays as it is, a function that builds it, or its name; by default it is the
    name saved with the subnet, which imports the module that defines it and runs that function. Nothing is unpickled.
    """
    path = Path(directory) / "model.safetensors"
    tensors, record = load_tensors(path)
    try:
        space = ChannelSpace.from_json(json.dumps(record["space"]))
        name, args = record["model"], record["model_args"]
        switches = {key: Widths(each) for key, each in record.get("switches", {}).items()}
        widths = Widths(record["widths"]) if not switches else None
        private = bool(record.get("private"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} holds no subnet: {error} is missing") from error
    except SpaceError as error:
        raise RunError(f"{path} holds no subnet: {error}") from error
    if not isinstance(name, (str, type(None))) or not isinstance(args, dict):
        raise RunError(f"{path} holds no subnet: its network is {name!r} with arguments {args!r}")
    if model is None:
        if name is None:
            raise ExportError(f"{path} does not name its network; call load_subnet(directory, model=my_network)")
        model = name
    if isinstance(model, str):
        model = build_model(model, args)
    original = model() if callable(model) and not isinstance(model, nn.Module) else model
    if not isinstance(original, nn.Module):
        raise ExportError(f"load_subnet needs the original network or a function that builds it, got {original!r}")
    try:
        subnet = (
            SwitchableNet(copy_module(original, lambda _, tensor: tensor.clone()), space, switches, private=private)
            if widths is None
            else extract(original, space, widths)
        )
        for parameter_name, tensor in tensors.items():  # half-precision nets come back as they were
            _match_dtype(subnet, parameter_name, tensor)
        load_unshared(subnet, tensors)
    except AutoSlimError as error:
        raise type(error)(f"{path}: {error}") from error
    return subnet.eval()


def _match_dtype(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    try:
        own = getattr(module.get_submodule(path), leaf)
    except AttributeError:
        return  # load_unshared names what does not fit
    if isinstance(own, Tensor) and own.dtype != tensor.dtype:
        own.data = own.data.to(tensor.dtype)


def has_onnx() -> bool:
    """Are the packages of the extra `autoslim[onnx]` installed?"""
    from importlib.util import find_spec

    return all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def export_onnx(model: nn.Module, example_input: Any, path: str | Path) -> None:
    """Write `model` as ONNX with a free batch size; the file appears whole or not at all.

    `example_input`: a tensor, a tuple of arguments or a mapping of keywords; tensors as long as the first one are
    batches, all of one size. A single input is called "images", several have the names of their arguments. Needs
    `autoslim[onnx]`. Raises `ExportError` in one line for a network that torch cannot export.
    """
    if not has_onnx():
        raise ExportError("ONNX export needs onnx, onnxscript and onnxruntime: pip install 'autoslim[onnx]'")
    count = samples_of(example_input)

    def is_batch(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == count

    def twice(leaf: Any) -> Any:  # torch takes a size of 1 for a constant
        return torch.cat([leaf, leaf]) if count == 1 and is_batch(leaf) else leaf

    given = _bound(model, example_input)
    size = torch.export.Dim("batch")
    names = [name for name, value in _named(given.arguments) if isinstance(value, Tensor)]

    def write(beside: Path) -> None:
        torch.onnx.export(
            model,
            tree_map(twice, given.args),
            beside,
            kwargs=tree_map(twice, given.kwargs),
            dynamo=True,
            verbose=False,
            input_names=["images"] if len(names) == 1 else names,
            output_names=["logits"],
            dynamic_shapes=tree_map(lambda leaf: {0: size} if is_batch(leaf) else None, dict(given.arguments)),
            external_data=False,
        )

    write_whole(Path(path), _exported(model, "model.onnx", write, "to ONNX"))


def _bound(model: nn.Module, inputs: Any) -> inspect.BoundArguments:
    """What each parameter of `forward` is given, in their order; `ExportError` if it takes others."""
    args, kwargs = split_input(inputs)
    try:
        return inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ExportError(f"{type(model).__name__} does not take the example input: {error}") from error


def _named(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every leaf of some arguments, with a name: of those in a tuple or a mapping with their number."""
    for name, value in given.items():
        leaves = tree_leaves(value)
        is_one = len(leaves) == 1 and leaves[0] is value
        yield from ((name if is_one else f"{name}_{number}", leaf) for number, leaf in enumerate(leaves))


def _exported(model: nn.Module, name: str, write: Callable[[Path], None], how: str) -> bytes:
    """What `write` leaves in a file of that name, with the network in evaluation mode; `ExportError` if it fails."""
    try:
        with evaluating(model), tempfile.TemporaryDirectory() as scratch, _silence():
            beside = Path(scratch) / name
            write(beside)
            return beside.read_bytes()
    except Exception as error:  # whatever an exporter may raise: its classes are private to torch
        raise ExportError(f"{type(model).__name__} cannot be exported {how}: {_root(error)}") from error


@contextmanager
def _silence() -> Iterator[None]:
    """Hold back what torch says while it exports: deprecations of its own, and the whole graph when it fails."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _root(error: BaseException) -> str:
    """Why an export failed, in one line: torch wraps the reason in errors of many lines about torch."""
    while error.__cause__ is not None:
        error = error.__cause__
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        text = "what it does depends on the values of a tensor (an if, a loop or a size), and a graph cannot"
    else:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
        text = f"{type(error).__name__}: {plain[0]}" if plain else type(error).__name__
        text = textwrap.shorten(text, 300, placeholder=" ...")
    own = [
        f"{Path(frame.filename).name}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<", *_EXPORTERS))
    ]
    return f"{text} (at {own[-1]})" if own else text


_EXPORTERS = tuple(f"{Path(root).parent}{os.sep}" for root in (torch.__file__, __file__))  # no code of users


def verify_onnx(path: str | Path, model: nn.Module, images: Any, tolerance: float = 1e-3) -> float:
    """The largest difference between onnxruntime and the model on real inputs, relative to the largest output.

    Raises `ExportError` if it exceeds `tolerance`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    bound = _bound(model, images)
    tensors = [leaf for _, leaf in _named(bound.arguments) if isinstance(leaf, Tensor)]
    feed = {given.name: tensor.cpu().numpy() for given, tensor in zip(session.get_inputs(), tensors, strict=True)}
    actual = torch.from_numpy(session.run(None, feed)[0])
    with evaluating(model), torch.no_grad():
        expected = model(*bound.args, **bound.kwargs).cpu()
    difference = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not difference <= tolerance:
        raise ExportError(f"{path}: onnxruntime differs from PyTorch by {difference:.2g} of the largest output")
    return difference


def export_program(model: nn.Module, example_input: Any, path: str | Path) -> None:
    """Write `model` as a `torch.export` program (.pt2) for a fixed input shape; `ExportError` if torch cannot.

    `example_input`: a tensor, a tuple of arguments or a mapping of keywords.
    """
    args, kwargs = split_input(example_input)

    def write(beside: Path) -> None:
        torch.export.save(torch.export.export(model, args, kwargs), beside)

    write_whole(Path(path), _exported(model, "model.pt2", write, "by torch.export"))
