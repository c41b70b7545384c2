"""What a micro-batch keeps in memory: counted for a draft's shape, to choose by and to show before a run."""

# Axes: B rows, S positions, N anchors, K block size, H hidden size, L captured layers.

from dataclasses import dataclass

import torch

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.stages.cores import usable_memory_bytes

USABLE = 0.92
"""Share of a GPU's memory that a step may be counted to fill; the rest is the driver's and lost between blocks."""
HALF = 0.5
"""The budget that is taken where all activations of compiled layers would not fit."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes that a step holds at its peak, counted."""

    block_tokens: int
    """B * N * K."""
    by_block_token: int
    """Bytes kept for the backward pass for each of them, in all layers and for the head."""
    other: int
    """Bytes of everything else: weights, gradients, moments, their copies, head, table and features."""
    device_bytes: int
    """Of the GPU, or of the memory that this process may fill."""

    @property
    def activations(self) -> int:
        """Bytes kept for the backward pass."""
        return self.block_tokens * self.by_block_token

    @property
    def fits(self) -> bool:
        """Whether the step fits its device."""
        return self.activations + self.other <= USABLE * self.device_bytes

    @property
    def most_block_tokens(self) -> int:
        """Block tokens of the largest micro-batch that fits, its context as it is; 0 if none does."""
        return max(0, int((USABLE * self.device_bytes - self.other) / self.by_block_token))


def kept_by_block_token(config: DraftConfig, *, compiled: bool, budget: float, checkpointing: bool) -> int:
    """Return how many numbers a step keeps of each block token for the backward pass.

    Counted in what a layer's operations need again: `compiled`, both norms' outputs, the residual and the layer's
    input (H each), queries and attention's output before and after each reshaping, as many keys and values, and of the
    MLP gate, up and their product; for Qwen3-8B's shape that is what inductor was seen to keep, 144 KiB in bfloat16.
    Uncompiled, each operation keeps its own inputs: 202 KiB. A budget of a half keeps 0.45 of it, checkpointing the
    inputs of layers and, while it computes one again, all of that one. The head keeps each hidden state and its
    gradient.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    if compiled:
        layer = 3 * hidden + 4 * queries + 4 * keys + 3 * inner
        layer = int(layer * (budget if budget == 1 else 0.9 * budget))
    else:
        layer = 6 * hidden + 5 * queries + 5 * keys + 4 * inner
    layers, own = config.num_hidden_layers, config.variant.kept(vars(config), compiled)
    layer += own.by_layer
    kept = layers * hidden + layer if checkpointing else layers * (hidden + layer)
    return kept + 2 * hidden + own.by_slot


def step_flops(config: DraftConfig, context_tokens: int, block_tokens: int, *, teacher: bool = False) -> float:
    """Return the floating-point operations of one micro-batch's matmuls, two a multiply-add, attention's left out.

    Forward, the weights' gradient and the inputs', which `fc` does not need; the head has no gradient of its own. All
    slots of all blocks are counted, supervised or not. With a `teacher` the target's logits are formed, too.
    """
    hidden, sizes = config.hidden_size, vars(config)
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    own = config.variant.work(sizes)
    slots = block_tokens // config.block_size * (config.block_size - config.variant.first_slot)
    by_block_token = 2 * queries * hidden + 2 * keys * hidden + 3 * hidden * config.intermediate_size + own.by_layer
    layers = config.num_hidden_layers * (block_tokens * by_block_token + context_tokens * 2 * keys * hidden)
    fc = context_tokens * len(config.target_layer_ids) * hidden * hidden
    logits = slots * hidden * config.vocab_size
    return 6.0 * (layers + slots * own.by_slot) + 4.0 * (fc + logits) + 2.0 * logits * teacher


def device_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory, or those that this process may fill."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return usable_memory_bytes()
