"""Data-parallel training over the processes that torchrun starts, or one process; and the signals that stop them."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


class DistributedContext(NamedTuple):
    """This process's place among `world_size` processes; the defaults describe a single process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """The main process writes checkpoints, logs and the weights file."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """With several processes on GPUs, each gets the GPU of its local rank."""
        several_gpus = device.type == "cuda" and self.world_size > 1
        return torch.device("cuda", self.local_rank) if several_gpus else device

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network with its gradients averaged over the processes."""
        if self.world_size == 1:
            return network
        on_gpu = next(network.parameters()).device.type == "cuda"
        # It also copies the main process's initial weights to all others.
        return DistributedDataParallel(network, device_ids=[self.local_rank] if on_gpu else None)

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Sums over the processes. Every process must call it, so it is a barrier, too."""
        if self.world_size == 1:
            return list(values)
        # NCCL communicates between GPUs only.
        device = torch.device("cuda", self.local_rank) if distributed.get_backend() == "nccl" else torch.device("cpu")
        # float64: a sum of losses over an epoch loses digits in float32.
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        distributed.all_reduce(sums)
        return sums.tolist()


@contextmanager
def init_distributed(device: torch.device) -> Iterator[DistributedContext]:
    """Joins the process group of torchrun's environment, with NCCL for GPUs and gloo for CPUs."""
    if "WORLD_SIZE" not in os.environ:
        yield DistributedContext()
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    join(device, local_rank)
    try:
        yield DistributedContext(distributed.get_rank(), distributed.get_world_size(), local_rank)
    finally:
        distributed.destroy_process_group()


def join(
    device: torch.device,
    local_rank: int,
    set_device: Callable[[torch.device], None] = torch.cuda.set_device,
    init_process_group: Callable[..., None] = distributed.init_process_group,
) -> None:
    """Without `set_device` every process would use the first GPU, and the first collective would not return."""
    if device.type != "cuda":
        init_process_group("gloo")
        return
    own = torch.device("cuda", local_rank)
    set_device(own)
    init_process_group("nccl", device_id=own)


class StopSignals:
    """Records Ctrl-C and SIGTERM in `received`; the loop reads it between steps, where the state is consistent."""

    def __enter__(self) -> "StopSignals":
        self.received = 0  # no signal; signal numbers are positive, so their sum over processes is, too
        self._previous = {number: signal.signal(number, self._record) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        self.received = number
