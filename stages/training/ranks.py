"""Data-parallel ranks under torchrun, and their sums. A process alone is rank 0 of 1."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dflash_offline.schemas.errors import DflashError
from dflash_offline.stages.target.model import choose_device

_LARGE = 1 << 20
"""Elements from which on a gradient is reduced by itself."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes, logs and shows progress."""
        return self.rank == 0

    def add(self, tensor: Tensor) -> Tensor:
        """Make the tensor the sum of all ranks' and return it."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make every gradient the sum of all ranks'; a rank without one adds zero, so that none waits for it.

        Large gradients are reduced in place, all small ones in one flat tensor: a reduction of few bytes costs as much.
        """
        if self.count == 1:
            return
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        small = [gradient for gradient in gradients if gradient.numel() < _LARGE]
        large = [gradient for gradient in gradients if gradient.numel() >= _LARGE]
        together = torch.cat([gradient.flatten() for gradient in small])
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in (*large, together)]:
            if work is not None:
                work.wait()
        for gradient, part in zip(small, together.split([gradient.numel() for gradient in small]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def meet(self) -> None:
        """Return once every rank has called this."""
        self.add(torch.zeros(1, device=self.device)).item()  # on a GPU, only reading the value waits for it


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, by nccl on GPUs (one a rank) and by gloo on CPUs."""
    chosen = choose_device(device)
    count = int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1
    if count == 1:
        yield Ranks(rank=0, count=1, device=chosen)
        return
    on_gpu = chosen.type == "cuda"
    if on_gpu and ":" in device:
        raise DflashError(
            f"device is {device!r}, but torchrun started {count} ranks, and each takes a GPU by its own number. "
            f"Use --device cuda, and choose the GPUs with CUDA_VISIBLE_DEVICES."
        )
    _refuse_other_launcher(["RANK", "MASTER_PORT", *(["LOCAL_RANK"] if on_gpu else [])], count)
    if on_gpu:
        chosen, gpus = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.cuda.device_count()
        if chosen.index >= gpus:
            raise DflashError(
                f"torchrun started rank {chosen.index} on this machine, which has {gpus} GPUs; expected one each. Give "
                f"it --nproc-per-node {gpus}, or train with --device cpu."
            )
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=chosen if on_gpu else None)
    try:
        yield Ranks(rank=dist.get_rank(), count=count, device=chosen)
    finally:
        dist.destroy_process_group()


def _refuse_other_launcher(needed: Iterable[str], count: int) -> None:
    """Raise `DflashError` naming what torchrun sets for each rank and this rank does not have."""
    if missing := [name for name in needed if name not in os.environ]:
        raise DflashError(
            f"WORLD_SIZE says that {count} ranks train together, but {', '.join(missing)} is not set; expected what "
            f"torchrun sets for each rank. Start the ranks with torchrun, or set it as torchrun does."
        )
