"""The driver of the backend: one CPU, always there."""

from typing import NoReturn

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpretedDriver(DriverBase):
    """A driver that launches nothing: Triton's interpreter calls the kernels' Python code."""

    @classmethod
    def is_active(cls) -> bool:
        """Return True."""
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Return the type as it is: no C++ is written."""
        return ty

    def get_current_target(self) -> GPUTarget:
        """Return the CPU."""
        return GPUTarget("cpu", 0, 0)

    def get_active_torch_device(self) -> torch.device:
        """Return the CPU."""
        return torch.device("cpu")

    def get_benchmarker(self) -> NoReturn:
        """Refuse: an interpreted kernel's time says nothing."""
        raise RuntimeError("Interpreted kernels are not timed.")
