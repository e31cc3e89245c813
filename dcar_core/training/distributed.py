"""Several processes on one batch, as torchrun starts them; alone, every method here does nothing.

The batch is shared out, features are gathered for the loss, and gradients are summed: a run of several processes
learns what a run of one does, up to the order in which floats are added.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dcar_core.util.errors import TrainingError

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """rank: which of `size` processes this is."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """This process writes files and shows progress."""
        return self.rank == 0

    def gather(self, mine: Tensor, sizes: Sequence[int]) -> Tensor:
        """(sizes[rank], E) of every process -> (sum(sizes), E) in the order of the ranks, without gradients."""
        if self.size == 1:
            return mine
        padded = mine.new_zeros(max(sizes), *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def sum(self, value: Tensor) -> Tensor:
        """Over all processes; in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every process ends with the sum of all gradients, in one message."""
        if self.size == 1:
            return
        parameters = list(parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for parameter, total in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
            parameter.grad = total.view_as(parameter).clone()

    def agree(self, value: T) -> T:
        """The leader's value, everywhere."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]

    @contextmanager
    def leader_first(self) -> Any:
        """The leader runs the block before the others, which then find what it left on the disk."""
        if self.size > 1 and not self.leads:
            dist.barrier()
        try:
            yield
        finally:
            if self.size > 1 and self.leads:
                dist.barrier()


ALONE = Group()


@contextmanager
def torchrun_group(device: str) -> Any:
    """The group that torchrun's environment describes and this process's device; alone without torchrun.

    Raises:
        TrainingError: a device that not every process can have.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE, device
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.startswith("cuda"):
        if local >= torch.cuda.device_count():
            raise TrainingError(
                f"torchrun started more processes than there are GPUs ({torch.cuda.device_count()}); lower "
                f"--nproc-per-node, or use --device cpu"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    # The others wait while the leader decodes and encodes the data set once, which can take long.
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    try:
        yield Group(rank, size), device
    finally:
        dist.destroy_process_group()
