"""What the machine has: cores, memory, open files, and the driver of its GPUs. Loads no torch."""

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dflash_offline.stages.cores import usable_cores

_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_DRIVER_TIMEOUT_S = 20
_CODEC_S = 0.5
"""Seconds for which encoding is timed, and decoding."""
_CHUNK = (2, 128, 1, 4096)
"""Chunks encoded at once, tokens, layers and width of each."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Cores, memory and limits of this process."""

    cores: int
    """Of the machine."""
    usable_cores: int
    """That this process may use."""
    memory_bytes: int
    """Of the machine."""
    available_bytes: int | None
    """Of them not in use; None where the system does not say."""
    memory_limit_bytes: int | None
    """Of this process's control group; None without one."""
    open_files: int
    """That this process may have, unless it raises its own limit."""
    open_files_most: int
    """To which it may raise it; -1 for any number."""
    driver: str | None
    """Version of NVIDIA's driver; None where nvidia-smi finds no GPU."""

    @property
    def usable_bytes(self) -> int:
        """Memory that this process may fill, at most."""
        return min(self.memory_bytes, self.memory_limit_bytes or self.memory_bytes)


def look_at_machine() -> Machine:
    """Return what this process has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Machine(
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        available_bytes=_available_bytes(),
        memory_limit_bytes=_memory_limit(),
        open_files=soft,
        open_files_most=-1 if hard == resource.RLIM_INFINITY else hard,
        driver=_driver(),
    )


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _memory_limit() -> int | None:
    for path in _MEMORY_LIMITS:
        try:
            limit = int(path.read_text())
        except (OSError, ValueError):  # no control groups, or no limit ("max")
            continue
        if limit < 1 << 60:  # older control groups write a huge number for none
            return limit
    return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=_DRIVER_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = found.stdout.split()
    return lines[0] if found.returncode == 0 and lines else None


@dataclass(frozen=True, kw_only=True)
class CodecRates:
    """How fast one core encodes and decodes features, in bytes of raw bfloat16 a second."""

    encode_bytes_per_s: float
    decode_bytes_per_s: float
    ratio: float
    """Encoded bytes over raw ones of the normal values that were timed; a target's own features differ a little."""


def time_codec() -> CodecRates:
    """Encode and decode chunks of normal bfloat16 values, lossless, with one thread."""
    import numpy as np

    from dflash_offline.stages.store.shard_file import decode_chunks, encode_chunks, room

    values = np.random.default_rng(0).standard_normal(_CHUNK, np.float32)
    codes = (values.view(np.uint32) >> 16).astype(np.uint16)
    chunks = encode_chunks(codes)
    head = room(len(codes))
    data = np.concatenate([np.zeros(head, np.uint8), chunks.data])
    ends = (head + np.cumsum(chunks.sizes)).tolist()
    places = [(end - size, size) for end, size in zip(ends, chunks.sizes, strict=True)]
    out = np.empty((_CHUNK[1], len(codes), _CHUNK[3]), np.uint16)
    return CodecRates(
        encode_bytes_per_s=codes.nbytes * _turns_per_s(lambda: encode_chunks(codes)),
        decode_bytes_per_s=codes.nbytes * _turns_per_s(lambda: decode_chunks(data, places, out, len(out))),
        ratio=len(chunks.data) / codes.nbytes,
    )


def _turns_per_s(turn: Callable[[], object]) -> float:
    turns, began = 0, time.perf_counter()
    while turns == 0 or time.perf_counter() - began < _CODEC_S:
        turn()
        turns += 1
    return turns / (time.perf_counter() - began)
