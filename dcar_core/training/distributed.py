"""Data-parallel training in several processes, as torchrun starts them.

- The processes split each batch, gather the features for the loss, and sum the gradients. The result equals that of one
  process up to the order of floating-point additions.
- In a single process every method of `ProcessGroup` returns its input.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dcar_core.util.errors import TrainingError

T = TypeVar("T")

_TIMEOUT = timedelta(hours=2)  # the other processes wait while the leader decodes and encodes the data set


@dataclass(frozen=True)
class ProcessGroup:
    """Process number `rank` of `size` processes."""

    rank: int = 0
    size: int = 1

    @property
    def is_leader(self) -> bool:
        """True for the process that writes files and shows progress."""
        return self.rank == 0

    def gather(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        """Concatenate (sizes[rank], E) of every process to (sum(sizes), E) in rank order, without gradients."""
        if self.size == 1:
            return local
        start, whole = sum(sizes[: self.rank]), local.new_zeros(sum(sizes), *local.shape[1:])
        whole[start : start + len(local)] = local
        return self.sum(whole)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes."""
        for parameter in parameters if self.size > 1 else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.sum(parameter.grad)

    def broadcast(self, value: T) -> T:
        """Return the leader's value in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Run the block in the leader first; the others then find the leader's files on disk."""
        if self.size > 1 and not self.is_leader:
            dist.barrier()
        try:
            yield
        finally:
            if self.size > 1 and self.is_leader:
                dist.barrier()


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def torchrun_group(device: str) -> Iterator[tuple[ProcessGroup, str]]:
    """Yield torchrun's process group and this process's device; without torchrun, a single process and `device`.

    Raises:
        TrainingError: torchrun started more processes than there are GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield SINGLE_PROCESS, device
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.startswith("cuda"):
        if local_rank >= torch.cuda.device_count():
            raise TrainingError(
                f"torchrun started more processes than there are GPUs ({torch.cuda.device_count()}); lower "
                f"--nproc-per-node, or use --device cpu"
            )
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=_TIMEOUT)
    try:
        yield ProcessGroup(rank, size), device
    finally:
        dist.destroy_process_group()
