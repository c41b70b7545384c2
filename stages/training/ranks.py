"""Data-parallel ranks under torchrun, and their sums. A process alone is rank 0 of 1."""

import os
from collections.abc import Iterable, Iterator, Sequence
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

    @contextmanager
    def adding_gradients(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Make every gradient the sum of all ranks' while the block runs the last backward pass of a step.

        A large gradient is reduced, in place, as soon as it and all before it in a fixed order are complete, beside the
        rest of the backward pass; all small ones in one flat tensor at the end: a reduction of few bytes costs as much.
        A rank without a gradient adds zero. Where the block raises, nothing more is reduced.
        """
        if self.count == 1:
            yield
            return
        reduction = _Reduction(parameters)
        hooks = [parameter.register_post_accumulate_grad_hook(reduction.complete) for parameter in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        reduction.finish()

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


class _Reduction:
    """The reductions of one step's gradients, in the same order on every rank whatever order they are made in."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        # Last layers first, as a backward pass makes them.
        self._large = [parameter for parameter in reversed(parameters) if parameter.numel() >= _LARGE]
        self._small = [parameter for parameter in parameters if parameter.numel() < _LARGE]
        self._complete: set[nn.Parameter] = set()
        self._works: list[dist.Work | None] = []

    def complete(self, parameter: nn.Parameter) -> None:
        """Note that a gradient is complete, and reduce what is next and complete."""
        self._complete.add(parameter)
        while len(self._works) < len(self._large) and self._large[len(self._works)] in self._complete:
            self._reduce_next()

    def finish(self) -> None:
        """Reduce all that is left, and return once every gradient is the sum."""
        while len(self._works) < len(self._large):
            self._reduce_next()
        small = [_gradient(parameter) for parameter in self._small]
        if small:
            together = torch.cat([gradient.flatten() for gradient in small])
            self._works.append(dist.all_reduce(together, async_op=True))
        for work in self._works:
            if work is not None:
                work.wait()
        if small:
            parts = together.split([gradient.numel() for gradient in small])
            for gradient, part in zip(small, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def _reduce_next(self) -> None:
        self._works.append(dist.all_reduce(_gradient(self._large[len(self._works)]), async_op=True))


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
