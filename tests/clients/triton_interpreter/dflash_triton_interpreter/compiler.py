"""The compiler of the backend: it says which target it is for, and refuses to compile."""

from typing import Any, NoReturn

import triton
from triton.backends.compiler import BaseBackend, GPUTarget

from dflash_triton_interpreter import VERSION

if triton.__version__ != VERSION:
    raise RuntimeError(f"This backend is for Triton {VERSION}, and this is {triton.__version__}.")


class InterpretedBackend(BaseBackend):
    """A compiler that is never called where TRITON_INTERPRET is 1."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        """Say whether a target is the CPU."""
        return target.backend == "cpu"

    def hash(self) -> str:
        """Return what tells this backend from others."""
        return VERSION

    def parse_options(self, options: dict[str, Any]) -> NoReturn:
        """Refuse to compile."""
        raise RuntimeError("This backend of Triton compiles nothing: set TRITON_INTERPRET=1.")

    def add_stages(self, stages: dict[str, Any], options: object) -> NoReturn:
        """Refuse to compile."""
        self.parse_options({})

    def load_dialects(self, context: object) -> None:
        """Load none."""

    def get_module_map(self) -> dict[str, Any]:
        """Return none."""
        return {}
