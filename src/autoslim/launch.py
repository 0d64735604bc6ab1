"""What a launcher such as torchrun says in the environment: which of how many processes this one is. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from autoslim.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """This process among those that work together: `rank` of `size`, of which `local_size` on this machine.

    `attempt` counts how often the launcher has started them again.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    attempt: int = 0

    @property
    def is_main(self) -> bool:
        """Rank 0 alone writes files and speaks."""
        return self.rank == 0


def launched() -> Launch:
    """From RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without WORLD_SIZE a process is alone."""
    if "WORLD_SIZE" not in os.environ:
        return Launch()
    try:
        size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        local = int(os.environ.get("LOCAL_RANK", "0"))
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return Launch(rank, size, local, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), attempt)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, and RANK is missing or no number ({error}); start with "
            "torchrun, or unset WORLD_SIZE"
        ) from error
