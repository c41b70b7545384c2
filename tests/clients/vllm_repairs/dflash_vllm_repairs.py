"""A plugin of vLLM that puts two faults of its CPU build right from outside; GPU builds have neither.

vLLM finds it by its entry point where this folder is on PYTHONPATH. The folder also holds the record of a distribution
named `vllm`, which the command `vllm serve` asks for and the CPU build's package does not bring.

    python dflash_vllm_repairs.py RESULT

RESULT becomes JSON: for each fault, by its name, whether the installed vLLM still has it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

VERSION = "0.32.0"
"""The release of vLLM that it is for; another one is refused, so that its repairs are looked at again."""


def repair() -> None:
    """Put both faults right in this process."""
    import vllm
    from vllm import _custom_ops as ops
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model
    from vllm.v1.sample import rejection_sampler

    if vllm.__version__ != VERSION:
        raise RuntimeError(f"These repairs are for vLLM {VERSION}, and this is {vllm.__version__}.")

    def normalize_context_k(self: Any, keys: torch.Tensor) -> torch.Tensor:
        """Return the keys [layers, tokens, heads, head size], each layer's under its own norm."""
        normed = torch.empty_like(keys)
        for i in range(keys.shape[0]):
            ops.rms_norm(normed[i], keys[i], self._k_norm_weights[i], self._rms_norm_eps)
        return normed

    def expand(
        x: torch.Tensor, ends: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        """Return each request's value once for every token of it; `ends` are the requests' ends among the tokens."""
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        values = torch.where(x == replace_from, replace_to, x).to(x.dtype)
        return values.repeat_interleave(counts, output_size=num_tokens)

    DFlashQwen3Model._normalize_context_k = normalize_context_k
    rejection_sampler.expand_batch_to_tokens = expand


def layers_share_a_norm() -> bool:
    """Say whether the kernel that norms all layers' keys at once gives every layer the first one's weights."""
    from vllm import _custom_ops as ops

    keys, weights = torch.ones(2, 3, 4, 8), torch.stack((torch.ones(8), torch.full((8,), 2.0)))
    normed = torch.empty_like(keys)
    ops.rms_norm(normed, keys, weights, 1e-6)
    return bool(normed[1].allclose(normed[0]))


def temperatures_are_lost() -> bool:
    """Say whether temperatures, expanded from requests to their tokens, come out as something else."""
    from vllm.platforms import current_platform
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    current_platform.register_triton_kernel_overrides()
    given, ends = torch.tensor([0.7, 0.0]), torch.tensor([2, 5], dtype=torch.int32)
    torch.full((5,), 123.0)  # freed memory, which an output that is never written then shows
    found = expand_batch_to_tokens(given, ends, 5, replace_from=0, replace_to=1)
    return not found.allclose(torch.tensor([0.7, 0.7, 1.0, 1.0, 1.0]))


if __name__ == "__main__":
    import vllm

    result = {"version": vllm.__version__, "norm": layers_share_a_norm(), "temperature": temperatures_are_lost()}
    Path(sys.argv[1]).write_text(json.dumps(result))
