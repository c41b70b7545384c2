"""AdamW or Muon over float32 weights, the learning-rate schedule, and averaged weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dflash_offline.stages.training.ranks import held_like, part, whole

BETAS = (0.9, 0.95)
MOMENTUM = 0.95
ITERATED_IN = {"cpu": torch.float32}
"""Data type in which Muon orthogonalizes; elsewhere bfloat16, for which most CPUs have no fast matrix product."""


def make_optimizers(
    draft: nn.Module, name: str, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return the optimizers that step together; each group keeps its parameters' names.

    Matrices, which are the weights of linear layers, decay; norms, kernels of convolutions and tables of codes do not.
    "adamw" is fused AdamW. "muon" orthogonalizes the update of every matrix (momentum, then Newton-Schulz) and leaves
    the others to AdamW; its updates are scaled to AdamW's size, so that learning rates carry over.
    """
    linear = {id(module.weight) for module in draft.modules() if isinstance(module, nn.Linear)}
    matrices = {n: p for n, p in draft.named_parameters() if id(p) in linear}
    vectors = {n: p for n, p in draft.named_parameters() if id(p) not in linear}

    def group(members: dict[str, nn.Parameter], decay: float) -> dict[str, object]:
        return {"params": list(members.values()), "names": list(members), "weight_decay": decay}

    groups = [group(vectors, 0.0)] if name == "muon" else [group(matrices, weight_decay), group(vectors, 0.0)]
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)
    if name == "adamw":
        return [adamw]
    decayed = [group(matrices, weight_decay)]
    return [Muon(decayed, lr=learning_rate, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"), adamw]


class Muon(torch.optim.Muon):
    """torch's Muon over whole matrices, also where ranks hold parts of them, and in float32 on a CPU; with its state.

    torch's iterates in bfloat16. A CPU without AVX-512 multiplies such matrices six to forty times slower than float32
    ones, which made a step of the demo's draft four times as long.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step from the gradients that are there, float32 matrices."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                # Ranks that hold parts of a matrix gather it, and all do the same.
                matrix = whole(parameter.grad.lerp(momentum, group["momentum"]))
                matrix = matrix.to(ITERATED_IN.get(matrix.device.type, torch.bfloat16))
                update = held_like(orthogonalized(matrix, group["ns_coefficients"], group["ns_steps"]), parameter)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * _scale(group["adjust_lr_fn"], *parameter.shape))


def _scale(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Return a matrix of the same shape and singular vectors whose singular values are near one.

    With coefficients a, b, c, a step of the Newton-Schulz iteration is X <- aX + (bA + cA^2)X with A = XX^T, from
    X = matrix / |matrix|. Source: Muon (https://kellerjordan.github.io/posts/muon).
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def moment_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """Return the bytes of this rank's moments, float32: AdamW holds two of each of its parameters, Muon one."""
    return sum(
        (4 if isinstance(each, torch.optim.Muon) else 8) * part(parameter).numel()
        for each in optimizers
        for group in each.param_groups
        for parameter in group["params"]
    )


def learning_rate_at(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """Return the rate of a step (from 0): a linear warm-up to `peak`, then a cosine to zero after the last step."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


class WeightAverage:
    """Exponential moving average of a draft's weights, float32."""

    def __init__(self, draft: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: parameter.detach().clone() for name, parameter in draft.named_parameters()}

    def update(self, draft: nn.Module, step: int) -> None:
        """Average in the weights after a step (from 0); the decay starts low, so that the first ones are forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in draft.named_parameters():
            part(self.weights[name]).lerp_(part(parameter.detach()), 1 - decay)

    @contextmanager
    def served(self, draft: nn.Module) -> Iterator[None]:
        """Exchange the draft's weights for the average while the block runs."""
        self._exchange(draft)
        try:
            yield
        finally:
            self._exchange(draft)

    def _exchange(self, draft: nn.Module) -> None:
        for name, parameter in draft.named_parameters():
            trained, averaged = part(parameter.detach()), part(self.weights[name])
            held = trained.clone()
            trained.copy_(averaged)
            averaged.copy_(held)
