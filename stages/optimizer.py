"""AdamW over float32 masters, and the learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import nn


def make_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return fused AdamW; matrices decay, norms do not. The groups keep their parameters' names."""
    named = list(parameters)
    matrices = [(name, parameter) for name, parameter in named if parameter.dim() > 1]
    vectors = [(name, parameter) for name, parameter in named if parameter.dim() <= 1]
    groups = [
        {"params": [p for _, p in members], "names": [n for n, _ in members], "weight_decay": decay}
        for members, decay in ((matrices, weight_decay), (vectors, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def learning_rate_at(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """Return the rate of a step (from 0): a linear warm-up to `peak`, then a cosine to zero after the last step."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
