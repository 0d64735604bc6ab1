"""One network as all of its subnets, and the training step that makes them good at once (US-Net, AutoSlim)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from autoslim.errors import SpaceError, TrainError
from autoslim.lending import Lender, with_tensors
from autoslim.losses import Backward, Loss, plain_backward, soft_cross_entropy
from autoslim.slicing import alone, check_model, gradients_in_place, run_subnet
from autoslim.space import ChannelSpace, Widths
from autoslim.tracing import split_input

if TYPE_CHECKING:
    from autoslim.switchable import SwitchableNet

M = TypeVar("M", bound=nn.Module)

NO_REPLICAS = (
    "nn.DataParallel gives replicas whose tensors cannot be cut; use DistributedDataParallel, a process for each GPU"
)


class Supernet(nn.Module):
    """A second handle on the user's model that runs at any widths: `supernet(x, widths)`.

    It shares the model's own modules, parameters and buffers, so `state_dict` keys, `parameters()`, `to` and `train`
    are the user's. Without widths, or at full widths, it is the user's model exactly. At other widths running
    statistics of the model are left alone; BatchNorm in evaluation mode then uses slices of the widest net's, which
    suit no other width: see `recalibrate_batchnorm` and `Judge`. Of several threads one waits for the other; plain nets
    of `extract` run side by side.
    """

    _model: nn.Module

    def __init__(self, model: nn.Module, space: ChannelSpace) -> None:
        super().__init__()
        check_model(model, space)
        # the same dictionaries, not copies: this module and the model are one tree with two roots
        self._parameters = model._parameters
        self._buffers = model._buffers
        self._modules = model._modules
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        object.__setattr__(self, "_model", model)  # kept out of the tree: it is the tree
        self.space = space
        self.lender = Lender()
        self._full = space.full()

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self._model

    def forward(self, inputs: Any, widths: Mapping[str, int] | None = None, *, updates_statistics: bool = True) -> Any:
        """Run at `widths` (default: the widest). `inputs`: a tensor, a tuple of arguments or a mapping of keywords.

        Without `updates_statistics` the widest net in training mode leaves running statistics alone, as others always
        do. Raises `SpaceError` for widths that the space does not have.
        """
        args, kwargs = split_input(inputs)
        model = self._model
        if widths is None or (widths == self._full and updates_statistics):
            with nullcontext() if torch.compiler.is_compiling() else alone:  # which cannot be compiled
                return model(*args, **kwargs)
        if not isinstance(widths, Mapping):
            raise SpaceError(f"widths are a mapping of groups to channels, as space.uniform(0.5) gives, got {widths!r}")
        return run_subnet(model, self.space, widths, args, kwargs)

    # what models say of themselves: a module that keeps BatchNorm frozen overrides `train`, and so on

    @property
    def training(self) -> bool:
        """The mode of the model; of nn.Module an attribute."""
        return self._model.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_model" in vars(self):  # not yet while nn.Module is made
            self._model.training = mode

    def train(self, mode: bool = True) -> Supernet:
        """Set the mode of the model."""
        self._model.train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Supernet:
        self._model._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the model."""
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load that of the model."""
        return self._model.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:  # of a module that this is a part of
        self._model._load_from_state_dict(*args)

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise SpaceError(NO_REPLICAS)


def sandwich_backward(
    supernet: Supernet | DistributedDataParallel,
    images: Any,
    targets: Any,
    *,
    loss: Loss,
    rng: random.Random,
    num_random: int = 2,
    distill: bool | Loss = True,
    ratios: tuple[float, float] | None = None,
    backward: Backward = plain_backward,
) -> dict[str, float]:
    """Forward and backward of one sandwich step (US-Net, section 3.2-3.3); gradients add up, no optimizer step.

    The widest net learns from `loss(output, targets)`; the narrowest and `num_random` nets of random widths learn from
    its detached output: by soft cross-entropy, or by `distill(output, teacher_output)`, or, with `distill=False`, from
    `loss` too. The four losses are summed with weight 1, each backward frees its graph before the next forward. `rng`
    draws the widths: one for each group (AutoSlim), or, with `ratios=(low, high)`, one ratio between them for the whole
    net (US-Net); its widest and narrowest nets then are those of these ratios. `backward(loss)` sends a loss back: give
    `accelerator.backward`, or `lambda loss: scaler.scale(loss).backward()`. Returns the losses by name.

    In several processes `supernet` may be `DistributedDataParallel(supernet)`: its gradients are averaged once, during
    the last backward pass. Give each process an `rng` of its own. Raises `SpaceError` for any other model.
    """
    if not isinstance(num_random, int) or num_random < 0:
        raise SpaceError(f"num_random must be a whole number of at least 0, got {num_random!r}")
    own = unwrapped(supernet, Supernet)
    space = own.space
    if not isinstance(rng, random.Random):
        raise SpaceError(f"rng draws the widths: give random.Random(0), got {rng!r}")
    _check_range(ratios)
    widest = None if ratios is None else space.uniform(ratios[1])
    students: dict[str, Widths] = {"narrowest": space.smallest() if ratios is None else space.uniform(ratios[0])}
    for index in range(num_random):
        widths = space.sample(rng) if ratios is None else space.uniform(rng.uniform(*ratios))
        students[f"random_{index + 1}"] = widths
    passes: dict[str, Arguments] = {"widest": ((widest,), {})}
    for name, widths in students.items():  # one that is as wide as the widest by chance leaves no trace either
        passes[name] = (widths,), {"updates_statistics": False} if widths == space.full() else {}
    return backward_in_turn(runs_of(supernet, own, images, passes), targets, loss, distill, backward)


def unwrapped(net: nn.Module, kind: type[M]) -> M:
    """The net itself, of the `kind` that is needed, or what DistributedDataParallel wraps; `SpaceError` if another."""
    own = net.module if isinstance(net, DistributedDataParallel) else net
    if not isinstance(own, kind):
        raise SpaceError(
            f"expected a {kind.__name__}, or one in DistributedDataParallel, got {type(net).__name__}"
            + (f" of {type(own).__name__}" if own is not net else "")
        )
    return own


Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # behind the inputs


def runs_of(
    net: nn.Module, own: Supernet | SwitchableNet, inputs: Any, passes: Mapping[str, Arguments]
) -> dict[str, Callable[[], Any]]:
    """A forward pass of `own` for each arguments, only the last by way of `net`, which may wrap it.

    DistributedDataParallel averages in the backward pass after its forward pass, all that has added up until then. A
    model that writes into its inputs gets them anew in each pass.
    """

    def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with own.lender.lent(inputs) as lent:
            return module(lent, *args, **kwargs)

    *before, last = passes
    return {name: partial(run, own, *passes[name]) for name in before} | {last: partial(run, net, *passes[last])}


def _check_range(ratios: object) -> None:
    if ratios is None:
        return
    is_pair = isinstance(ratios, Sequence) and len(ratios) == 2 and all(isinstance(ratio, Real) for ratio in ratios)
    if not is_pair or not 0 < ratios[0] <= ratios[1] <= 1:  # type: ignore[index]
        raise SpaceError(f"ratios must be two that ascend and lie in (0, 1], as (0.25, 1.0), got {ratios!r}")


def backward_in_turn(
    nets: Mapping[str, Callable[[], Any]],
    targets: Any,
    loss: Loss,
    distill: bool | Loss,
    backward: Backward = plain_backward,
) -> dict[str, float]:
    """Run nets that share their weights, each forward and backward before the next; gradients add up.

    The first learns from `loss(output, targets)`, the others from its detached output, unless `distill` is False: see
    `sandwich_backward`. Returns the losses by name.
    """
    if not isinstance(distill, bool) and not callable(distill):
        raise TrainError(
            f"distill is True, False or a function of two outputs, such as autoslim.alpha_divergence; got {distill!r}"
        )
    imitate: Loss = soft_cross_entropy if distill is True else distill if callable(distill) else loss
    teach, lesson = loss, targets
    losses: dict[str, Tensor] = {}
    for name, run in nets.items():
        with gradients_in_place():
            output = run()
        value = teach(output, lesson)
        backward(value)
        losses[name] = value.detach()
        if distill and lesson is targets:
            teach, lesson = imitate, with_tensors(output, Tensor.detach)
        del output, value  # nothing of a net is kept while the next one runs,
        torch.clear_autocast_cache()  # nor its weights in lower precision, which narrower nets cannot use
    return {name: float(value) for name, value in losses.items()}  # last: on a GPU each number waits for all before it
