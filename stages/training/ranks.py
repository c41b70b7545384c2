"""Data-parallel ranks under torchrun, their sums, and the draft that they hold. A process alone is rank 0 of 1.

torch's `fully_shard` reduces the gradients beside the backward pass, whether every rank holds the whole draft or a part
of it. Its parameters, gradients and moments are then `DTensor`s: `part` is what this rank holds of one, `whole` all of
it.
"""

import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dflash_offline.schemas.errors import DflashError
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.target.model import choose_device

_PATIENCE = timedelta(minutes=30)
"""How long ranks wait for each other before the first step: as long as torch's own calls do."""


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

    def meet(self) -> None:
        """Return once every rank has called this."""
        self.add(torch.zeros(1, device=self.device)).item()  # on a GPU, only reading the value waits for it


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, by nccl on GPUs (one a rank) and by gloo on CPUs.

    Where one of them ends amid the block, one of the others raises `DflashError`, and the rest end without a word.
    """
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
    store, rank, count = next(dist.rendezvous("env://"))
    store = _met(store, rank, count)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=count,
        device_id=chosen if on_gpu else None,
    )
    try:
        yield Ranks(rank=rank, count=count, device=chosen)
    except BaseException as error:
        is_first_to_end = _is_first_to_end(store)
        if lost := _lost_connection(error):
            if not is_first_to_end:
                raise SystemExit(1) from error
            raise DflashError(
                f"Another of the {count} ranks has ended, or cannot be reached: {lost}. torchrun prints which, "
                f"and why if the rank could. Repeat the command to go on from the last checkpoint; with `torchrun "
                f"--max-restarts 3` that is done for you."
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def share_of_step(run: Path, begun: dict[str, Any] | None, ranks: Ranks) -> int:
    """Return how many of a step's micro-batches each rank adds where nothing was asked for: one, or as begun."""
    if begun is None:
        return 1
    per_step: int = begun["accumulation_times_ranks"]
    if per_step % ranks.count:
        raise DflashError(
            f"{run} takes {per_step} micro-batches a step, which {ranks.count} ranks cannot share alike. Start as many "
            f"ranks as divide {per_step}, or name a new --out."
        )
    return per_step // ranks.count


def scaled_gradients_norm(
    parameters: Iterable[nn.Parameter], weight: Tensor, clip: float, sharing: Ranks | None
) -> Tensor:
    """Make the summed gradients those of the mean loss, clipped; returns their norm before clipping.

    `weight` is the loss's denominator; `sharing` are the ranks that hold a part of each gradient, None if each of them
    holds all.
    """
    gradients = [part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    scale = 1.0 / (weight + 1e-6)
    # In float64 the order does not show in which ranks add their parts: one float32 rounding turns bfloat16 weights.
    squares = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square().sum()
    norm = (sharing.add(squares) if sharing else squares).sqrt() * scale
    torch._foreach_mul_(gradients, (scale * (clip / (norm + 1e-6)).clamp(max=1.0)).float())
    return norm


def _met(store: dist.Store, rank: int, count: int) -> dist.Store:
    """Wait for all ranks, and return the part of the store that none but those which are here now have written to.

    torchrun keeps one store while it starts ranks again, and each node counts its restarts for itself. What ranks left
    there that have died since is no word of those in their place: who connects by it waits for ever.
    """
    return dist.PrefixStore(_meeting(store, count) if rank == 0 else _come(store, rank), store)


def _meeting(store: dist.Store, count: int) -> str:
    """Return a name that no ranks had before, once each of the others has it."""
    meeting, missing, until = secrets.token_hex(8), set(range(1, count)), time.monotonic() + _PATIENCE.total_seconds()
    while missing := {other for other in missing if not store.check([f"{meeting}/came/{other}"])}:
        if time.monotonic() > until:
            raise DflashError(
                f"{len(missing)} of {count} ranks did not come within {_PATIENCE}, the first of them rank "
                f"{min(missing)}. See whether it was started, and whether its node reaches MASTER_ADDR."
            )
        for other in missing:
            if store.check([f"here/{other}"]):  # perhaps of one that has died: its successor writes it again
                store.set(f"meeting/{store.get(f'here/{other}').decode()}", meeting)
        time.sleep(0.01)
    return meeting


def _come(store: dist.Store, rank: int) -> str:
    """Return the name that rank 0 gives the ranks which are here now."""
    name = secrets.token_hex(8)
    store.set(f"here/{rank}", name)
    try:
        store.wait([f"meeting/{name}"], _PATIENCE)
    except dist.DistStoreError as error:
        raise DflashError(
            f"Rank 0 did not come within {_PATIENCE}. See whether it was started, and why not."
        ) from error
    meeting = store.get(f"meeting/{name}").decode()
    store.set(f"{meeting}/came/{rank}", "")
    return meeting


def _is_first_to_end(store: dist.Store) -> bool:
    """Return whether no other rank has ended in an error; also if none can be asked."""
    try:
        return store.add("ended", 1) == 1
    except RuntimeError:
        return True


def _lost_connection(error: BaseException | None) -> str:
    """Return in what words the connection to another rank ended, if that ended the work, or came before what did."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        error = error.__context__
    return ""


def _refuse_other_launcher(needed: Iterable[str], count: int) -> None:
    """Raise `DflashError` naming what torchrun sets for each rank and this rank does not have."""
    if missing := [name for name in needed if name not in os.environ]:
        raise DflashError(
            f"WORLD_SIZE says that {count} ranks train together, but {', '.join(missing)} is not set; expected what "
            f"torchrun sets for each rank. Start the ranks with torchrun, or set it as torchrun does."
        )


def distribute(draft: DraftModel, ranks: Ranks, *, sharded: bool, bfloat16: bool) -> None:
    """Move a draft, which all ranks hold alike, to their devices; from then on gradients are sums over the ranks.

    If `sharded`, a rank keeps a part of every parameter, gradient and moment, and gathers a layer's parameters while it
    computes with them; else it keeps them whole. What layers compute with is bfloat16 where autocast would make it so:
    rounded before it is gathered, and the same. Gradients are added in float32.
    """
    if ranks.count == 1:
        draft.to(ranks.device)
        return
    shape, names = ((ranks.count,), ("shard",)) if sharded else ((ranks.count, 1), ("replicate", "shard"))
    mesh = dist.device_mesh.init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    rounded = MixedPrecisionPolicy(torch.bfloat16 if bfloat16 else None, torch.float32, cast_forward_inputs=False)
    for module in (draft.fc, *draft.layers):
        fully_shard(module, mesh=mesh, mp_policy=rounded)
    # Norms and what a variant adds, which is also used beside the draft's own forward pass, stay whole within a step.
    fully_shard(draft, mesh=mesh, reshard_after_forward=False)
    for module in _shards(draft):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def gathered_bytes(draft: DraftModel, ranks: Ranks, *, bfloat16: bool) -> int:
    """Return the bytes of the weights that a step computes with beside those that this rank holds, counted.

    A process alone has autocast's copies of all. Of several, each gathers `fc` and the layers one after the other, the
    next one early: of two of them there are weights, gradients and their float32 sums, and of all else, which stays
    gathered, weights and gradients.
    """
    total, size = sum(p.numel() for p in draft.parameters()), 2 if bfloat16 else 4
    if ranks.count == 1:
        return total * size if bfloat16 else 0
    units = [sum(p.numel() for p in module.parameters()) for module in (draft.fc, *draft.layers)]
    return (total - sum(units)) * 8 + 2 * max(units) * (2 * size + 4)


def reduce_gradients(draft: nn.Module, now: bool) -> None:
    """Have the next backward pass reduce gradients, its own and those before it; or only add its own to them."""
    if isinstance(draft, FSDPModule):
        draft.set_requires_gradient_sync(now)


@contextmanager
def whole_draft(draft: nn.Module) -> Iterator[None]:
    """Hold all parameters whole on every rank while the block runs, within which no rank waits for another."""
    for module in _shards(draft):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in _shards(draft):
            module.set_reshard_after_forward(module is not draft, recurse=False)
            module.reshard()


def _shards(draft: nn.Module) -> list[FSDPModule]:
    return [module for module in draft.modules() if isinstance(module, FSDPModule)]


def part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that ranks hold in parts; every rank calls this for the same ones."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor of a parameter's shape, or a number beside it, as its ranks hold the parameter."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor
