"""An H100 that is not there, for the compiler alone: torch.compile lowers for it what is given fake tensors on it.

Importing this changes torch for the whole process, which is to be one of its own and to end by `os._exit`: autograd's
thread for the device is never joined. Where the process has TRITON_INTERPRET=1, the wrappers that inductor writes run
on the CPU, their Triton kernels in Triton's interpreter, on the values that `held` keeps beside fake tensors.
"""

import ctypes
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def _load_device() -> None:
    """Compile and load what autograd asks of a CUDA device; before torch is, because torch asks once."""
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    torch_folder = Path(spec.origin).parent
    libraries = torch_folder / "lib"
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "fake_h100.so"
        flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", f"-L{libraries}"]
        source = Path(__file__).with_suffix(".cpp")
        subprocess.run(["g++", *flags, source, "-o", built, "-lc10", "-ltorch_cpu"], check=True)
        ctypes.CDLL(str(libraries / "libtorch_cpu.so"))
        ctypes.CDLL(str(built))


_load_device()
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._dynamo import device_interface  # noqa: E402
from torch._inductor import config, output_code  # noqa: E402
from torch._inductor.async_compile import AsyncCompile  # noqa: E402
from torch._inductor.fx_passes import joint_graph  # noqa: E402
from torch._inductor.runtime import triton_helpers  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # noqa: E402
from triton import language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

GPU = torch.device("cuda", 0)
TARGET = GPUTarget("cuda", 90, 32)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
)
mode = FakeTensorMode(allow_non_fake_inputs=True)
_held: dict[int, tuple[Tensor, Any]] = {}


def put(values: Tensor) -> FakeTensor:
    """Return a fake tensor on the GPU; it and every view of it stand for these values."""
    with mode:
        fake = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=GPU)
    if INTERPRETED:
        assert fake.stride() == values.stride() and values.storage_offset() == 0
        storage = fake.untyped_storage()
        with unset_fake_temporarily():
            _held[storage._cdata] = (values.detach(), storage)  # kept, for its address to stay its own
    return fake


def held(fake: Tensor) -> Tensor:
    """Return the values that a fake tensor stands for."""
    with unset_fake_temporarily():
        if not INTERPRETED:
            return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=VALUES)
        values, _ = _held[fake.untyped_storage()._cdata]
        return values.as_strided(fake.shape, fake.stride(), fake.storage_offset())


kernels: set[tuple[str, str]] = set()
"""Name and source of every Triton kernel that inductor wrote."""


class _Unrun:
    """A kernel that is not run: what it would write has no values."""

    def run(self, *_: Any, **__: Any) -> None: ...


def _note_kernel(compiler: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> Any:
    kernels.add((name, source))
    return _load(compiler, name, source, device_str) if INTERPRETED else _Unrun()


def _run(graph: output_code.CompiledFxGraph, inputs: list[Any]) -> Any:
    """Run inductor's wrapper on what its fake inputs stand for; returns fakes for what it returns."""
    given = [held(one) if isinstance(one, FakeTensor) else one for one in inputs]
    inputs.clear()
    with unset_fake_temporarily():
        made = _call(graph, given)
    return [put(one) if isinstance(one, Tensor) else one for one in made]


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
VALUES = torch.device("cpu" if INTERPRETED else "meta")
"""Where the values of fake tensors are; without the interpreter nothing is computed."""
_load, _call = AsyncCompile.triton, output_code.CompiledFxGraph.__call__
_cuda = torch.library.Library("aten", "IMPL")


def _pretend() -> None:
    joint_graph.lazy_init(GPU)  # makes real tensors on a GPU where there is one
    for name, stand_in in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _device: None,
        "synchronize": lambda _device=None: None,
        "get_device_properties": lambda _device=None: PROPERTIES,
        "get_device_capability": lambda _device=None: (PROPERTIES.major, PROPERTIES.minor),
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_rng_state": lambda _device=None: torch.empty(0),
        "set_rng_state": lambda _state, _device=None: None,
        "_exchange_device": lambda _index: 0,
        "_maybe_exchange_device": lambda _index: 0,
    }.items():
        setattr(torch.cuda, name, stand_in)
        if hasattr(device_interface.CudaInterface, name):
            setattr(device_interface.CudaInterface, name, staticmethod(stand_in))
    torch.version.cuda = "13.0"
    device_interface.caching_worker_current_devices["cuda"] = 0
    device_interface.caching_worker_device_properties["cuda"] = [PROPERTIES]
    driver.set_active(SimpleNamespace(get_current_target=lambda: TARGET, get_current_device=lambda: 0))
    triton_helpers.set_driver_to_gpu = lambda: None
    if INTERPRETED:  # which has no library of device functions
        triton_helpers.libdevice = SimpleNamespace(exp=lambda x: tl.exp(x), rsqrt=lambda x: tl.rsqrt(x))
    torch._C._cuda_getCurrentRawStream = lambda _device: 0
    torch._C._dynamo.guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device=VALUES
    )
    # Constants are folded by making them on their device.
    _cuda.impl("empty.memory_format", lambda size, dtype=None, **_: torch.empty(size, dtype=dtype), "CUDA")
    _cuda.impl(
        "empty_strided", lambda size, stride, dtype=None, **_: torch.empty_strided(size, stride, dtype=dtype), "CUDA"
    )
    AsyncCompile.triton = _note_kernel
    output_code.CompiledFxGraph.__call__ = _run
    config.force_disable_caches = True
    config.use_static_triton_launcher = False


_pretend()
