"""A backend of Triton that compiles nothing, for a process whose kernels Triton's own interpreter runs on the CPU.

Triton's wheel has backends for GPUs alone, and vLLM leaves Triton, and with it its newer model runner, aside where none
of them is at hand. Triton finds this one by its entry point where this folder is on PYTHONPATH; with TRITON_INTERPRET=1
every kernel is then interpreted, and nothing here is asked to compile.
"""

VERSION = "3.8.0"
"""The release of Triton whose abstract classes it fills; another one is refused, so that it is looked at again."""
