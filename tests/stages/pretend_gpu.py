"""A GPU that is not there: tensors that say they are on it, hold their values on the CPU, and are as strict.

Values on the GPU and on the CPU cannot be mixed, and where the host would wait for the GPU is noted. A copy between
pinned memory and the GPU that nobody waits for is done when its stream is: what reads it before finds other values.
"""

import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dflash_offline.stages.target import model as loading

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
_READ = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
}
"""What returns a number, or a tensor whose size only the GPU knows."""
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Stream:
    """Work for the GPU, in order."""

    def __init__(self) -> None:
        self.queued: list[Callable[[], object]] = []
        self.is_behind = True
        """Whether work was given to the main stream since this one last waited for it."""
        self.live_bytes = self.most_bytes = 0
        """Of memory that was asked for while this was the current stream: held now, and at most."""

    def wait_stream(self, _other: "Stream") -> None:
        """Let what comes wait for what the other one has."""
        self.is_behind = False

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Return what waits for all that is queued."""
        event = event or Event()
        event.synchronize = self.synchronize  # type: ignore[method-assign]
        return event

    def synchronize(self) -> None:
        """Do all that is queued."""
        while self.queued:
            self.queued.pop(0)()


class Event:
    """A place in a stream."""

    def __init__(self, *, blocking: bool = False) -> None:
        self.blocking = blocking
        """Whether who waits for it leaves the core to others."""

    def synchronize(self) -> None:
        """Do all that is queued before it, in the stream that recorded it."""


class GpuTensor(Tensor):
    """Says that it is on a GPU; torch's own code takes it for one on the CPU."""

    gpu: "PretendedGpu"
    held: Tensor
    """Its values."""
    used_by: list[Stream]
    """Streams that must be done before its memory is another's."""
    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cpu, is_cuda = GPU, False, True  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor, gpu: "PretendedGpu") -> "GpuTensor":
        """Return a tensor of these values."""
        with torch.inference_mode(False):  # views of what is not of that mode are not either
            made: GpuTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
            )
        made.gpu, made.held, made.used_by = gpu, held, []
        gpu.note_memory(made)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of what is on a pretended GPU, where there is none")

    @property
    def data(self) -> Tensor:
        """The tensor without its history."""
        return self.detach()

    @data.setter
    def data(self, other: "GpuTensor") -> None:
        self.held = other.held

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the tensor on another device or in another dtype."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        converted = self if dtype in (None, self.dtype) else aten._to_copy(self, dtype=dtype)
        if device is None or device.type == "cuda":
            return converted
        return self.gpu.copy(torch.empty_like(converted.held), converted, non_blocking)

    def cpu(self) -> Tensor:
        """Return the values on the CPU."""
        return self.to("cpu")

    def float(self) -> Tensor:
        """Return it as float32."""
        return self.to(torch.float32)

    def tolist(self) -> Any:
        """Return the values."""
        return self.cpu().tolist()

    def numpy(self) -> Any:
        """Refuse, as a GPU's tensor does."""
        raise TypeError("can't convert a tensor on a GPU to numpy")

    def record_stream(self, stream: Any) -> None:
        """Note a stream that uses the memory."""
        self.used_by.append(stream)

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Fill the gradients; the tensors that it makes on the way are on the GPU."""
        with self.gpu.by_default():
            super().backward(*args, **kwargs)


class PretendedGpu(TorchDispatchMode):
    """Runs what is on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.main = self.current = Stream()
        self.others: list[Stream] = []
        self.waits: list[str] = []
        """The functions of the package in which the host waited, or that called what did."""
        self._pinned: dict[int, Tensor] = {}
        self._blocks: dict[int, tuple[Stream, list[int]]] = {}
        self._is_default = False

    def new_stream(self, _device: torch.device) -> Stream:
        """Return a stream beside the main one."""
        self.others.append(Stream())
        return self.others[-1]

    @property
    def reserved_bytes(self) -> int:
        """What torch's allocator would have taken: what a stream freed is used again by that stream alone."""
        return sum(stream.most_bytes for stream in (self.main, *self.others))

    def note_memory(self, tensor: GpuTensor) -> None:
        """Count the tensor's memory for the current stream, until the last tensor that is in it is gone."""
        storage = tensor.held.untyped_storage()
        address, num_bytes = storage.data_ptr(), storage.nbytes()
        stream, users = self._blocks.setdefault(address, (self.current, [0]))
        if not users[0]:
            stream.live_bytes += num_bytes
            stream.most_bytes = max(stream.most_bytes, stream.live_bytes)
        users[0] += 1

        def drop() -> None:
            users[0] -= 1
            if not users[0]:
                stream.live_bytes -= num_bytes
                del self._blocks[address]

        weakref.finalize(tensor, drop).atexit = False

    @contextmanager
    def within(self, stream: Stream | None) -> Iterator[None]:
        """Give what comes to the stream; None changes nothing."""
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def by_default(self) -> Iterator[None]:
        """Make new tensors on the GPU."""
        self._is_default = True
        try:
            yield
        finally:
            self._is_default = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode they come whole
                return func.decompose(*args, **kwargs)
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        asked = torch.device(kwargs.pop("device", None) or "cpu")
        pinned = kwargs.pop("pin_memory", False)
        if func is aten.copy_.default and len({isinstance(one, GpuTensor) for one in given}) == 2:
            return self.copy(*args, **kwargs)
        if func is aten._to_copy.default and asked.type == "cuda" and not isinstance(args[0], GpuTensor):
            unwaited = kwargs.pop("non_blocking", False)
            target = GpuTensor(torch.empty_like(args[0], **kwargs), self)
            return self.copy(target, args[0], unwaited)
        if func is aten.is_pinned.default:
            return self.is_pinned(args[0])
        if func is aten._pin_memory.default:
            return self._pin(args[0].clone())
        on_gpu = asked.type == "cuda" or any(isinstance(one, GpuTensor) for one in given)
        if not on_gpu and not (self._is_default and not given):
            made = func(*args, **kwargs)
            return self._pin(made) if pinned else made
        self._refuse_mixed(func, args, given)
        if func in _READ:
            self._wait()
        for stream in self.others:
            stream.is_behind = True
        made = func(*_held(args), **_held(kwargs))
        same = {id(one.held): one for one in given if isinstance(one, GpuTensor)}
        return tree_map(lambda one: same.get(id(one), self._on_gpu(one)) if isinstance(one, Tensor) else one, made)

    def _on_gpu(self, held: Tensor) -> GpuTensor:
        return GpuTensor(held, self)

    def _refuse_mixed(self, func: Any, args: Any, given: list[Tensor]) -> None:
        """Raise `RuntimeError` where a GPU would: single numbers may be the CPU's, and so may indices, at a price."""
        indices = [one for one in args[1] if one is not None] if func in _INDEXING else []
        if any(one.dtype == torch.bool or not isinstance(one, GpuTensor) for one in indices):
            self._wait()
        apart = [one for one in given if not isinstance(one, GpuTensor) and one.dim()]
        if any(all(one is not index for index in indices) for one in apart):
            raise RuntimeError(f"{func} got tensors of the GPU and of the CPU")

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor  # kept, for its address to stay its own
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Say whether it is memory of the CPU that the GPU copies from and to by itself."""
        return not isinstance(tensor, GpuTensor) and tensor.untyped_storage().data_ptr() in self._pinned

    def copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Copy from the CPU to the GPU or back; returns the target."""
        if self.current is not self.main and self.current.is_behind and isinstance(source, GpuTensor):
            raise RuntimeError("a stream copies what the main one may not have written yet")
        to, values = _held((target, source))
        host = source if isinstance(target, GpuTensor) else target
        if not (non_blocking and self.is_pinned(host)):
            self._wait()
            to.copy_(values)
        elif self.current is self.main and isinstance(target, GpuTensor):
            to.copy_(values)  # what reads it comes behind it
        else:
            to.reshape(-1).view(torch.uint8).fill_(0xA5)
            self.current.queued.append(lambda: to.copy_(values))
        return target

    def _wait(self) -> None:
        self.main.synchronize()
        self.current.synchronize()
        stages = [frame.name for frame in traceback.extract_stack() if "/dflash_offline/stages/" in frame.filename]
        self.waits.append(stages[-1] if stages else "")


def _held(tree: Any) -> Any:
    return tree_map(lambda one: one.held if isinstance(one, GpuTensor) else one, tree)


class _Autocast(torch.autocast):
    """A GPU's, by the CPU's."""

    def __init__(self, _device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    """A machine that has one GPU."""
    pretended = PretendedGpu()

    def set_device(device: torch.device) -> None:
        torch.cuda._utils._get_device_index(device)  # which wants to know which one

    def by_device(lists: Any, *_: Any) -> dict[Any, Any]:
        return {(lists[0][0].device, lists[0][0].dtype): (lists, None)}

    is_enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    for place, name, stand_in in (
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "set_device", set_device),
        (torch.cuda, "get_rng_state", lambda _device: None),
        (torch.cuda, "set_rng_state", lambda _state, _device: None),
        (loading, "find_spec", lambda _name: None),  # accelerate would ask a real GPU for its memory
        (torch.cuda, "Event", Event),
        (torch.cuda, "Stream", pretended.new_stream),
        (torch.cuda, "stream", pretended.within),
        (torch.cuda, "current_stream", lambda _device=None: pretended.current),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "max_memory_allocated", lambda _device=None: 0),
        (torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(total_memory=80 << 30)),
        (torch.accelerator, "synchronize", lambda _device: pretended.main.synchronize()),
        (torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", by_device),
        (torch, "autocast", _Autocast),
        (torch, "is_autocast_enabled", lambda _device="cpu": is_enabled("cpu")),
        (torch, "get_autocast_dtype", lambda _device: dtype("cpu")),
    ):
        monkeypatch.setattr(place, name, stand_in)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes its values on the CPU, and copies them
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # values are an attribute of the parameter
    try:
        with pretended:
            yield pretended
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
