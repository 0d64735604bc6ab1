"""What a network can be run by, and how long it takes there: whole passes, and each operator where it can be told."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoslim.errors import LatencyError, nearest
from autoslim.export import export_onnx
from autoslim.lending import Lender, cloned
from autoslim.slicing import copy_module, extract
from autoslim.space import Axis, ChannelSpace, Widths
from autoslim.tables import LatencyOperator
from autoslim.tracing import split_input


@dataclass(frozen=True)
class Runtime:
    """A way to run a network: the packages it needs, and the extra of ours that installs them."""

    name: str
    packages: tuple[str, ...] = ()
    extra: str = ""

    def version(self) -> str:
        """Versions of what runs the network."""
        names = ("torch", self.name) if self.name in self.packages else ("torch",)
        return ", ".join(f"{name} {metadata.version(name)}" for name in names)


RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime("torch"),
        Runtime("torch.compile"),
        Runtime("onnxruntime", ("onnx", "onnxscript", "onnxruntime"), "onnx"),
        Runtime("openvino", ("onnx", "onnxscript", "onnxruntime", "openvino"), "openvino"),
    )
}


ON_CPU = ("onnxruntime", "openvino")  # whatever device the network is on


def on_cpu(thing: Any) -> Any:
    """A network, tensor or tuple of tensors on the CPU; the network itself is left where it is."""
    if isinstance(thing, nn.Module):
        is_there = all(tensor.device.type == "cpu" for tensor in (*thing.parameters(), *thing.buffers()))
        return thing if is_there else copy_module(thing, lambda name, tensor: tensor.cpu())
    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, thing)


def find_runtime(name: str) -> Runtime:
    """The runtime of a name; `LatencyError` if there is none, or naming the extra if it is not installed."""
    if name not in RUNTIMES:
        raise LatencyError(f"no runtime {name!r}; {nearest(name, RUNTIMES)}")
    runtime = RUNTIMES[name]
    missing = [package for package in runtime.packages if find_spec(package) is None]
    if missing:
        raise LatencyError(f"runtime {name!r} needs {' and '.join(missing)}: pip install 'autoslim[{runtime.extra}]'")
    return runtime


@contextmanager
def torch_threads(threads: int | None) -> Iterator[int]:
    """Let torch use so many threads, and as many as before afterwards; gives the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield threads or before
    finally:
        torch.set_num_threads(before)


class Prepared:
    """A network made ready in a runtime for one input; `passes` times whole passes, `operators` their parts.

    A network that writes into its input gets a new copy for each pass, or values would run away; the time for that does
    not count.
    """

    def __init__(
        self, runtime: str, net: nn.Module, example_input: Any, threads: int, onnx: bytes | None = None
    ) -> None:
        if runtime in ON_CPU:
            net, example_input = on_cpu(net), on_cpu(example_input)
        self.runtime, self.net, self.threads = runtime, net, threads
        with torch.inference_mode(False):  # tensors of that mode do not tell whether they are written to
            self.inputs, self._lender = cloned(split_input(example_input)), Lender()
        tensors = [leaf for leaf in tree_leaves(self.inputs) if isinstance(leaf, Tensor)]
        self.on_cuda = any(tensor.is_cuda for tensor in (*net.parameters(), *tensors))
        net.eval()
        if runtime in ON_CPU:
            if len(tensors) != 1 or self.inputs[1]:
                raise LatencyError(f"{runtime} is measured for networks of one tensor")
            self.onnx = onnx or onnx_bytes(net, tensors[0])
            self.feed = tensors[0].numpy()
        self._run = _RUNS[runtime](self)

    @contextmanager
    def lent(self) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
        """Arguments for one pass inside, which is one for inference."""
        with torch.inference_mode(False), self._lender.lent(self.inputs) as own, torch.inference_mode():
            yield own

    def passes(self, repeats: int, warmup: int = 2, seconds: float = 1.0) -> list[float]:
        """Milliseconds of each of `repeats` passes, fewer (but 3) once `seconds` are over."""
        found: list[float] = []
        with torch_threads(self.threads):
            for _ in range(warmup):
                self._pass()
            started = time.perf_counter()
            while len(found) < repeats and (len(found) < 3 or time.perf_counter() - started < seconds):
                found += self._pass()
        return found

    def _pass(self) -> list[float]:
        clock = _Clock(self.on_cuda)
        with self.lent() as (args, kwargs):
            clock.mark()
            self._run(*args, **kwargs)
            clock.mark()
        return clock.between()

    def operators(self, operators: Sequence[LatencyOperator], repeats: int) -> list[list[float]]:
        """Milliseconds of each operator, for each of some passes; empty if the runtime does not tell."""
        with torch_threads(self.threads):
            if self.runtime == "torch":
                return _torch_operators(self, operators, repeats)
            if self.runtime == "onnxruntime":
                return _onnx_operators(self, operators, repeats)
        return []


class _Clock:
    """Moments, and the milliseconds between them; on a GPU by its own events."""

    def __init__(self, on_cuda: bool) -> None:
        self.on_cuda = on_cuda
        self.moments: list[Any] = []

    def mark(self, *_: Any) -> None:
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.moments.append(event)
        else:
            self.moments.append(time.perf_counter())

    def between(self) -> list[float]:
        pairs = list(zip(self.moments, self.moments[1:], strict=False))
        if self.on_cuda:
            torch.cuda.synchronize()
            return [start.elapsed_time(end) for start, end in pairs]
        return [(end - start) * 1e3 for start, end in pairs]


# --- how each runtime runs a network -----------------------------------------------------------------------------


def _eager(prepared: Prepared) -> Callable[..., Any]:
    return prepared.net


def _compiled(prepared: Prepared) -> Callable[..., Any]:
    torch.compiler.reset()  # else torch gives up compiling after eight nets of the same class
    compiled = torch.compile(prepared.net)
    with torch_threads(prepared.threads):
        with prepared.lent() as (args, kwargs):
            prepared.net(*args, **kwargs)  # what fails here is the network's own
        try:
            with prepared.lent() as (args, kwargs):
                compiled(*args, **kwargs)
        except Exception as error:  # whatever a compiler may raise: its classes are private to torch
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LatencyError(
                f"runtime 'torch.compile' cannot compile this network here ({first}); it needs a C++ compiler such as "
                "g++ on a CPU, and triton on a GPU; or choose torch, onnxruntime or openvino"
            ) from error
    return compiled


def _onnxruntime(prepared: Prepared) -> Callable[..., Any]:
    session = _session(prepared)
    feed = {session.get_inputs()[0].name: prepared.feed}
    return lambda *_: session.run(None, feed)


def _session(prepared: Prepared, profile: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = prepared.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(prepared.onnx, options, providers=["CPUExecutionProvider"])


def _openvino(prepared: Prepared) -> Callable[..., Any]:
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": prepared.threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(prepared.onnx), "CPU", options)
    return lambda *_: compiled([prepared.feed])


_RUNS: dict[str, Callable[[Prepared], Callable[..., Any]]] = {
    "torch": _eager,
    "torch.compile": _compiled,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


# --- what each operator takes ------------------------------------------------------------------------------------


def _torch_operators(prepared: Prepared, operators: Sequence[LatencyOperator], repeats: int) -> list[list[float]]:
    """From one layer being called to the next, so that all of a pass is part of some operator."""
    expected = [operator.name for operator in operators]
    modules = dict(prepared.net.named_modules())
    fired: list[str] = []
    clock = _Clock(prepared.on_cuda)

    def hook(name: str) -> Callable[..., None]:
        def called(*_: Any) -> None:
            fired.append(name)
            clock.mark()

        return called

    handles = [
        modules[name].register_forward_pre_hook(hook(name)) for name in dict.fromkeys(expected) if name in modules
    ]
    found = []
    try:
        for _ in range(repeats):
            clock.moments.clear()
            fired.clear()
            with prepared.lent() as (args, kwargs):
                clock.mark()
                prepared.net(*args, **kwargs)
                clock.mark()
            if fired == expected:  # what comes before the first layer belongs to it
                del clock.moments[1]
            elif fired != expected[1:]:
                return []
            found.append(clock.between())
    finally:
        for handle in handles:
            handle.remove()
    return found


def _onnx_operators(prepared: Prepared, operators: Sequence[LatencyOperator], repeats: int) -> list[list[float]]:
    """From the kernel of one layer to that of the next, by onnxruntime's own profile."""
    starts = _onnx_names(prepared.onnx, [operator.name for operator in operators])
    with tempfile.TemporaryDirectory() as scratch:
        session = _session(prepared, Path(scratch) / "profile")
        feed = {session.get_inputs()[0].name: prepared.feed}
        for _ in range(repeats + 1):  # the first one warms up
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    runs = sorted((e for e in events if e.get("name") == "model_run"), key=lambda e: e["ts"])
    kernels = sorted((e for e in events if str(e.get("name")).endswith("_kernel_time")), key=lambda e: e["ts"])
    found = []
    for run in runs[1:]:
        end = run["ts"] + run["dur"]
        moments: dict[int, float] = {}
        for kernel in kernels:
            index = starts.get(kernel["name"].removesuffix("_kernel_time").removesuffix("_nchwc"))
            if index is not None and run["ts"] <= kernel["ts"] < end:
                moments.setdefault(index, kernel["ts"])
        if len(moments) < len(operators):
            return []
        found.append(_shares(moments, run["ts"], end))
    return found


def _shares(moments: dict[int, float], start: float, end: float) -> list[float]:
    """Milliseconds from each operator's first kernel to the next kernel that begins another, in the order they ran."""
    order = sorted(moments, key=lambda index: moments[index])
    bounds = [start, *(moments[index] for index in order[1:]), end]
    times = {index: (after - before) / 1e3 for index, before, after in zip(order, bounds, bounds[1:], strict=False)}
    return [times[index] for index in range(len(times))]


def _onnx_names(content: bytes, layers: Sequence[str]) -> dict[str, int]:
    """Names that the kernel of each layer may have: of its node, and of results up to where they are used twice.

    onnxruntime calls a convolution after the activation that it fused with it.
    """
    import onnx

    graph = onnx.load_from_string(content).graph
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    names: dict[str, int] = {}
    waiting = {layer: [i for i, each in enumerate(layers) if each == layer] for layer in layers}
    for node in graph.node:
        layer = next(
            (name.removesuffix(".weight") for name in node.input if name.removesuffix(".weight") in waiting), ""
        )
        if not waiting.get(layer):
            continue
        index = waiting[layer].pop(0)
        while True:
            for name in (node.name, *node.output):
                names.setdefault(name, index)
            following = users.get(node.output[0], [])
            if len(following) != 1 or following[0].op_type in _MULTIPLY:
                break
            node = following[0]
    return names


_MULTIPLY = ("Conv", "ConvTranspose", "Gemm", "MatMul")


# --- ONNX, exported once and cut for every net -------------------------------------------------------------------


def onnx_bytes(net: nn.Module, example_input: Tensor) -> bytes:
    """A network as ONNX, as `export_onnx` writes it."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        export_onnx(net, example_input, path)
        return path.read_bytes()


class OnnxNets:
    """The subnets of a network as ONNX, each a fraction of a second after the first export, which takes many.

    The exported graph is cut as the model is. Whatever does not compute then what the extracted net does (a size that
    became a constant of the graph, say) is exported by itself.
    """

    def __init__(self, model: nn.Module, space: ChannelSpace, example_input: Tensor) -> None:
        import onnx

        self.space, self.example_input = space, example_input
        self.whole = onnx.load_from_string(onnx_bytes(extract(model, space, space.full()), example_input))
        self.axes = self._axes_of_initializers()
        self.can_cut = True

    def at(self, widths: Widths, net: nn.Module) -> bytes:
        """The net of these widths; `net` is the same, extracted."""
        if self.can_cut:
            content = self._cut(widths)
            if self._computes_the_same(content, net):
                return content
            self.can_cut = False
        return onnx_bytes(net, self.example_input)

    def _axes_of_initializers(self) -> dict[str, tuple[Axis, ...]]:
        known = {**self.space.parameters, **self.space.buffers}
        found = {}
        for tensor in self.whole.graph.initializer:
            shape, axes = tuple(tensor.dims), known.get(tensor.name)
            if axes is not None and tuple(axis.size for axis in axes) == shape:
                found[tensor.name] = axes
        for node in self.whole.graph.node:  # a bias that a normalisation was folded into has a new name
            weight = next((name for name in node.input if name in found), None)
            for tensor in self.whole.graph.initializer:
                if weight and tensor.name in node.input and tensor.name not in known and len(tensor.dims) == 1:
                    outputs = found[weight][0]
                    if tensor.dims[0] == outputs.size:
                        found[tensor.name] = (outputs,)
        return found

    def _cut(self, widths: Widths) -> bytes:
        import onnx
        from onnx import numpy_helper

        cut = onnx.ModelProto()
        cut.CopyFrom(self.whole)
        for tensor in cut.graph.initializer:
            axes = self.axes.get(tensor.name, ())
            if any(axis.groups for axis in axes):
                array = numpy_helper.to_array(tensor)
                for dim, axis in enumerate(axes):
                    if axis.groups:
                        array = array.take(list(axis.positions(widths)), dim)
                tensor.CopyFrom(numpy_helper.from_array(array.copy(), tensor.name))
        groups = {a.module: a.value(widths) for a in self.space.attributes if a.name == "groups"}
        shapes = {name for node in cut.graph.node if node.op_type == "Reshape" for name in node.input[1:]}
        for node in cut.graph.node:
            for attribute in node.attribute:
                if attribute.name == "group" and len(node.input) > 1:
                    attribute.i = groups.get(node.input[1].removesuffix(".weight"), attribute.i)
        for tensor in cut.graph.initializer:
            if tensor.name in shapes:  # (batch, channels): the last size is left open
                array = numpy_helper.to_array(tensor).copy()
                if array.ndim == 1 and len(array) > 1 and not (array[1:] == -1).any():
                    array[0], array[-1] = len(self.example_input), -1
                    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        del cut.graph.value_info[:]
        return bytes(cut.SerializeToString())

    def _computes_the_same(self, content: bytes, net: nn.Module) -> bool:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        image = torch.randn(self.example_input.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        with suppress(Exception), torch.inference_mode():
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            actual = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0])
            expected = net.eval()(image)
            return bool((actual - expected).abs().max() <= 1e-3 * expected.abs().max().clamp_min(1e-6))
        return False
