"""Random numbers that depend on stated seeds and never on the state of a global generator."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(*seeds: int) -> int:
    """A seed of its own, 64 bits, for each tuple of seeds."""
    return int(np.random.SeedSequence([seed % 2**64 for seed in seeds]).generate_state(1, np.uint64)[0])


def generator(*seeds: int) -> torch.Generator:
    """A generator of its own for each tuple of seeds."""
    return torch.Generator().manual_seed(derived_seed(*seeds))


@contextmanager
def preserved() -> Iterator[None]:
    """The global generators of torch (CPU), Python and numpy afterwards are as they were before."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


def reseed(*seeds: int, all_generators: bool = False) -> None:
    """Set the global generator of torch (CPU), from which its transforms draw, or Python's and numpy's as well."""
    seed = derived_seed(*seeds)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
    if all_generators:
        random.seed(seed)
        np.random.seed(seed % 2**32)
