"""Several processes that train one network, as torchrun starts them; one process where it did not."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


class Ranks(NamedTuple):
    """This process among `world` ones."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, kind: torch.device) -> torch.device:
        """Each process on a machine takes a GPU of its own."""
        return torch.device(kind.type, self.local_rank) if kind.type == "cuda" and self.world > 1 else kind

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network with its gradients averaged over the processes."""
        return DistributedDataParallel(network) if self.world > 1 else network

    def total(self, *values: float) -> list[float]:
        """Sums over the processes; every process must ask."""
        if self.world == 1:
            return list(values)
        kind = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        sums = torch.tensor(values, dtype=torch.float64, device=kind)
        distributed.all_reduce(sums)
        return sums.tolist()


@contextmanager
def join(kind: torch.device) -> Iterator[Ranks]:
    """Joins the group that torchrun's environment describes: NCCL for GPUs, gloo for CPUs."""
    if "WORLD_SIZE" not in os.environ:
        yield Ranks()
        return
    distributed.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), int(os.environ["LOCAL_RANK"]))
    finally:
        distributed.destroy_process_group()
