"""Several processes on one job, as torchrun starts them: every rank runs the same code, rank 0 decides and writes.

Gradients are averaged by DistributedDataParallel, once per step, when all nets of a sandwich have gone back; what must
be agreed on beside them (losses, a signal to stop) rides in the same all-reduce.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from autoslim.errors import AutoSlimError, ConfigError, DataError, RunError, counted
from autoslim.interruption import Stopped
from autoslim.launch import Launch, launched

T = TypeVar("T")
_PATIENCE = timedelta(hours=3)  # rank 0 evaluates and exports alone while the others wait
_SAME_TIME = 10.0  # seconds; so far apart may ranks find the same mistake, and torchrun kills after 30
_TO_CONNECT = timedelta(seconds=30)  # before a mistake is said without asking the others
_TO_HEAR = 5.0  # seconds that a store which ends with rank 0 is kept for the others
_ONE_BUCKET = 1 << 20  # MB; gradients are there all at once, so there is nothing to gain from several
_POLL = 0.1  # seconds; a wait inside torch would let no signal through

_kept: list[Any] = []  # the store of this process once it is open: the process group does not outlive it


@dataclass(frozen=True)
class World:
    """This process, `rank`, among the `size` that work together."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Rank 0 alone writes files and speaks."""
        return self.rank == 0


def world() -> World:
    """The process group of this process; one of its own if there is none."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


class LostContact(RunError):
    """Another process of the job is gone."""


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that a launcher started (gloo on CPU, nccl on CUDA); alone, or in a group already, do nothing.

    Raises `ConfigError` if this process has no such device, and `RunError` if another one has failed before it joined.
    """
    launch = launched()
    if launch.size == 1 or (dist.is_available() and dist.is_initialized()):
        yield world()
        return
    if not dist.is_available():
        raise RunError("this build of PyTorch has no torch.distributed; start one process only")
    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(_own_gpu(device, launch))
        backend = "cpu:gloo,cuda:nccl"
    with _contact():
        store = _store(launch, _PATIENCE)
        _call_roll(store, launch)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=_PATIENCE)
    yield world()
    dist.destroy_process_group()


def _store(launch: Launch, patience: timedelta) -> Any:
    """What all processes of the job can read and write."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if not _kept:
        store, _, _ = next(rendezvous("env://", timeout=patience))
        # torchrun with a fixed port keeps its store when it starts lost processes again, and in it the addresses of
        # those before: every attempt has names of its own
        _kept.append(PrefixStore(f"attempt_{launch.attempt}", store))
    return _kept[0]


def _call_roll(store: Any, launch: Launch) -> None:
    """Return when all ranks are about to join; `RunError` if one of them never will."""
    store.add("here", 1)
    end = time.monotonic() + _PATIENCE.total_seconds()
    while store.add("here", 0) < launch.size:
        if store.check(["claimed"]):
            raise RunError("another process of this job has failed")
        if time.monotonic() > end:
            raise RunError(f"of {launch.size} processes only {store.add('here', 0)} came")
        time.sleep(_POLL)


@contextmanager
def one_voice(error: BaseException) -> Iterator[bool]:
    """Is it for this process to say what ended the job? One does, and the others go on when it has.

    torchrun ends all processes as soon as one has ended, so nobody may leave before the right line is out. Whoever
    comes first speaks, after giving rank 0 time to find the same mistake; but nobody waits when a process is lost, for
    it may have been rank 0. What a signal stopped rank 0 says, unless it is gone.
    """
    launch = launched()
    is_stop = isinstance(error, Stopped | KeyboardInterrupt)
    if is_stop and not launch.is_main and not _kept:
        yield False  # nobody knows this process yet
        return
    seconds = 0.0 if launch.is_main or isinstance(error, LostContact) else _SAME_TIME
    try:
        store = _store(launch, _TO_CONNECT)
        _wait_until(lambda: store.check(["claimed"]), seconds)
        is_first = store.add("claimed", 1) == 1
    except Exception:  # of torch, if it cannot be imported, or of sockets: rather twice than never
        yield launch.is_main or not is_stop
        return
    yield is_first
    with suppress(RuntimeError):  # whoever held the store is gone
        if is_first:
            store.set("said", "")
        else:
            _wait_until(lambda: store.check(["said"]), _SAME_TIME)
        store.add("heard", 1)
        if launch.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _wait_until(lambda: store.add("heard", 0) >= launch.size, _TO_HEAR)


def _wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(_POLL)


def usable_device(name: str, asked: str | None = None) -> torch.device:
    """The device of a name; `ConfigError`, with the name that was `asked` for, if nothing can be computed there."""
    try:
        device = torch.device(name)
        float(torch.zeros(1, device=device))  # the meta device makes tensors, and has no numbers in them
    except (RuntimeError, AssertionError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"device {asked or name!r} cannot be used: {first}; cpu always works") from error
    return device


def _own_gpu(device: str, launch: Launch) -> torch.device:
    """The GPU of this process."""
    count = torch.cuda.device_count()
    if device == "cuda" and 0 < count <= launch.local_rank:
        raise ConfigError(
            f"device 'cuda' cannot be used: {launch.local_size} processes were started on this machine, and there "
            f"{'is' if count == 1 else 'are'} {counted(count, 'GPU')}; start one process for each GPU"
        )
    return usable_device(local_device(device), device)


def local_device(device: str) -> str:
    """`device`, with this process's own GPU for "cuda"."""
    launch = launched()
    return f"cuda:{launch.local_rank}" if device == "cuda" and launch.size > 1 else device


def agreed(compute: Callable[[], T]) -> T:
    """What rank 0 computes, on every rank: for whatever depends on files. The others compute nothing.

    A mistake of rank 0 is raised on all of them.
    """
    here = world()
    if here.size == 1:
        return compute()
    box: list[Any] = [None, None]
    failed: AutoSlimError | None = None
    if here.is_main:
        try:
            box[0] = compute()
        except AutoSlimError as error:
            failed, box[1] = error, str(error)
    with _contact():
        dist.broadcast_object_list(box, src=0)
    if failed is not None:
        raise failed
    if box[1] is not None:
        raise AutoSlimError(box[1])
    return box[0]  # type: ignore[no-any-return]


def wait_for_all() -> None:
    """Go on when every rank is here."""
    if world().size > 1:
        with _contact():
            dist.barrier()


def gathered(value: T) -> list[T]:
    """The value of every rank, in their order, on every rank."""
    here = world()
    if here.size == 1:
        return [value]
    values: list[Any] = [None] * here.size
    with _contact():
        dist.all_gather_object(values, value)
    return values


def take_from_main(tensors: Mapping[str, Tensor]) -> None:
    """Give every rank the tensors of rank 0, in place."""
    if world().size > 1:
        with _contact(), torch.no_grad():
            for tensor in tensors.values():
                whole = tensor.contiguous()
                dist.broadcast(whole, src=0)
                if whole.data_ptr() != tensor.data_ptr():
                    tensor.copy_(whole)


class GradientAverage:
    """Averages the gradients that the backward passes of a step have added up, over all ranks: one all-reduce a step.

    Each rank has computed the mean over its own share of a batch; afterwards every rank has the mean over the whole
    batch. `parameters` are those of a network; what of them is frozen at a step is left alone. Alone this does nothing.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._key: tuple[int, ...] = ()
        self._reducer: DistributedDataParallel | None = None
        self._carried: _Carried | None = None

    def average(self, samples: int, numbers: Sequence[float] = ()) -> list[float]:
        """Make the gradients their mean, and return that of `numbers`, both weighted by the `samples` of each rank.

        A parameter without a gradient on every rank keeps none. Raises `RunError` if another process is lost.
        """
        if world().size == 1:
            return list(numbers)
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        tail = [float(parameter.grad is not None) for parameter in trained] + [*numbers, 1.0]
        with _contact(), torch.no_grad():
            carried, reducer = self._made_for(trained, len(tail))
            carried.numbers.grad = torch.tensor(tail, dtype=carried.numbers.dtype).to(carried.numbers.device)
            torch._foreach_mul_(_gradients(carried), samples)
            with torch.enable_grad():
                reducer().backward()
            count = float(carried.numbers.grad[-1])
            torch._foreach_div_(_gradients(carried), count)
            means: list[float] = carried.numbers.grad.tolist()
        for parameter, present in zip(trained, means, strict=False):
            if present <= 0:
                parameter.grad = None
        return means[len(trained) : -1]

    def _made_for(self, trained: list[nn.Parameter], count: int) -> tuple[_Carried, DistributedDataParallel]:
        """Made at the first step, when it is known how many numbers there are, and when other parameters are frozen."""
        key = (count, *map(id, trained))
        if self._carried is None or self._reducer is None or key != self._key:
            self._key, self._carried = key, _Carried(trained, count)
            self._reducer = DistributedDataParallel(self._carried, bucket_cap_mb=_ONE_BUCKET)
        return self._carried, self._reducer


class _Carried(nn.Module):
    """What DistributedDataParallel carries in a step: parameters, and numbers as the gradient of one more.

    It reduces in the backward pass of its module, whatever gradients are there by then. A step is several passes, of
    nets that need not be a forward pass of the module (some use a part of the parameters, or of their outputs), so the
    pass that it sees comes after them all, reaches every parameter, and adds nothing.
    """

    def __init__(self, parameters: list[nn.Parameter], count: int) -> None:
        super().__init__()
        self.carried = nn.ParameterList(parameters)
        device = parameters[0].device if parameters else torch.device("cpu")
        is_double = any(parameter.dtype == torch.float64 for parameter in parameters)
        self.numbers = nn.Parameter(torch.zeros(count, dtype=torch.float64 if is_double else torch.float32).to(device))

    def forward(self) -> Tensor:
        return cast(Tensor, _Nothing.apply(*self.parameters()))


class _Nothing(torch.autograd.Function):
    """A number that depends on all that it is given, with no gradient for any of it."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return tuple(None for _ in range(ctx.count))


def _gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def samples_of(inputs: Any) -> int:
    """How many samples a batch of inputs holds: the length of its first tensor."""
    return next((leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim), 1)


def share_of(batch: Any, here: World) -> Any:
    """This rank's part of a batch: every `size`-th sample of each tensor in it, beginning with its own."""
    if here.size == 1:
        return batch
    count = samples_of(batch)
    if count < here.size:
        raise DataError(f"a batch of {count} cannot be shared by {here.size} processes; raise batch_size")
    return tree_map(
        lambda leaf: leaf[here.rank :: here.size] if isinstance(leaf, Tensor) and leaf.ndim else leaf, batch
    )


@contextmanager
def _contact() -> Iterator[None]:
    """A lost process is a line for people, not a traceback of sockets."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # DistBackendError and the like are RuntimeErrors
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LostContact(
            f"lost contact with the other processes of this job ({first[:160]}); one was killed or failed: run the "
            "same command again to go on from the last checkpoint (torchrun --max-restarts does it by itself)"
        ) from error
