"""Several processes started by `torchrun`: PyTorch's DistributedDataParallel; ours is only its set-up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from toast_onnx.errors import BackendError
from toast_onnx.require import require_torch


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: its number.
        count: how many there are.
        device: where it computes.
    """

    rank: int
    count: int
    device: Any

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0


@contextmanager
def processes(device: str | None) -> Iterator[Processes]:
    """Join the group that `torchrun` describes in the environment; alone where it does not.

    Args:
        device: `cpu`, `cuda` or `cuda:N`; None takes the process's own GPU where there is one.

    Raises:
        BackendError: CUDA was asked for and is not there.
    """
    torch = require_torch()
    count, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise BackendError("PyTorch finds no CUDA device; use --device cpu, or install the driver and a CUDA build")
        name = f"cuda:{local}" if name == "cuda" else name
        torch.cuda.set_device(torch.device(name))
    if count == 1:
        yield Processes(0, 1, torch.device(name))
        return
    torch.distributed.init_process_group("nccl" if name.startswith("cuda") else "gloo")
    try:
        yield Processes(torch.distributed.get_rank(), count, torch.device(name))
    finally:
        torch.distributed.destroy_process_group()


def wrapped(module: Any, group: Processes) -> Any:
    """The module in DistributedDataParallel, which averages gradients; itself where the process is alone."""
    if group.count == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    # Static buffers need no broadcast, and weights that only unused outputs read get no gradient.
    return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)


def agree(value: float, group: Processes) -> float:
    """The first process's number, in all of them."""
    if group.count == 1:
        return value
    torch = require_torch()
    shared = torch.tensor([value], dtype=torch.float64, device=group.device)
    torch.distributed.broadcast(shared, 0)
    return float(shared.item())


def any_of(flag: bool, group: Processes) -> bool:
    """Whether the flag is set in any process."""
    if group.count == 1:
        return flag
    torch = require_torch()
    shared = torch.tensor([float(flag)], device=group.device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return bool(shared.item())
