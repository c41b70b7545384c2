"""Memory that a thread keeps for the next time.

Fresh arrays of megabytes cost more than what is computed in them: the system hands out their pages one by one, and
for all threads of a process in turn.
"""

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_local = threading.local()


def scratch(use: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return an array of undefined content, this thread's own until it asks again for the same use."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    buffer: NDArray[np.uint8] | None = getattr(_local, use, None)
    if buffer is None or len(buffer) < num_bytes:
        buffer = np.empty(num_bytes, np.uint8)
        setattr(_local, use, buffer)
    return buffer[:num_bytes].view(dtype).reshape(shape)
