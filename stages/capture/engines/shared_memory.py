"""Memory that the processes of an engine share with the one that encodes: it has no name, and goes with its users."""

import mmap
import os
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class SharedMemory:
    """A file without a name, in memory; whoever has its path maps what it needs, and it is gone with the last of them.

    Nothing is left behind however a process ends.
    """

    def __init__(self, path: str | None = None) -> None:
        """Make new memory, or open that of another process by its `path`."""
        self._fd = os.memfd_create("dflash") if path is None else os.open(path, os.O_RDWR)
        self._parts: list[tuple[int, int, mmap.mmap]] = []
        self._pinned = False

    @property
    def path(self) -> str:
        """What other processes of this user open, as long as this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @property
    def num_bytes(self) -> int:
        """Bytes that there are by now."""
        return os.fstat(self._fd).st_size

    def grow(self, num_bytes: int) -> int:
        """Add bytes at the end; returns where they begin."""
        begin, page = self.num_bytes, mmap.ALLOCATIONGRANULARITY
        os.ftruncate(self._fd, begin + -(-num_bytes // page) * page)
        return begin

    def pin(self) -> None:
        """Have what is mapped from now on registered with the GPU, which then copies to it without a detour."""
        self._pinned = True

    def view(self, begin: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor over the bytes from `begin`, which one call of `grow` gave."""
        for first, end, part in self._parts:
            if first <= begin < end:
                return torch.frombuffer(part, dtype=dtype, count=prod(shape), offset=begin - first).view(*shape)
        self._parts.append(self._map(max((end for _, end, _ in self._parts), default=0)))
        return self.view(begin, shape, dtype)

    def close(self) -> None:
        """Give the memory up; what this process still has a view of stays until that is gone."""
        if self._pinned:
            for _, _, part in self._parts:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(_address(part)))
        self._parts = []
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _map(self, first: int) -> tuple[int, int, mmap.mmap]:
        end = self.num_bytes
        part = mmap.mmap(self._fd, end - first, offset=first)
        if self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(_address(part), end - first, 0))
        return first, end, part


def _address(part: mmap.mmap) -> int:
    return torch.frombuffer(part, dtype=torch.uint8).data_ptr()
