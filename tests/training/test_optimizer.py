"""Muon on a CPU: its update by singular values, and beside torch's own, which iterates in bfloat16."""

import pytest
import torch
from torch import Tensor, nn

from dflash_offline.stages.training.optimizer import make_optimizers

RATE, DECAY, MOMENTUM, STEPS = 1e-2, 0.1, 0.95, 3
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def by_singular_values(matrix: Tensor) -> Tensor:
    """Return what the odd polynomial makes of the singular values when it is applied five times."""
    u, s, vh = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_takes_the_steps_of_a_reference_and_nearly_those_of_torch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours = nn.Linear(shape[1], shape[0], bias=False)
    torchs = nn.Linear(shape[1], shape[0], bias=False)
    torchs.load_state_dict(ours.state_dict())
    expected, average = ours.weight.detach().double(), torch.zeros(shape, dtype=torch.float64)
    optimizer, _ = make_optimizers(nn.ModuleDict({"one": ours, "norm": nn.LayerNorm(4)}), "muon", RATE, DECAY)
    other = torch.optim.Muon(torchs.parameters(), lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    for _ in range(STEPS):
        grad = torch.randn(shape)
        ours.weight.grad, torchs.weight.grad = grad, grad.clone()
        optimizer.step()
        other.step()
        average = MOMENTUM * average + (1 - MOMENTUM) * grad.double()
        update = by_singular_values((1 - MOMENTUM) * grad.double() + MOMENTUM * average)
        expected = (1 - RATE * DECAY) * expected - RATE * 0.2 * max(shape) ** 0.5 * update
    torch.testing.assert_close(ours.weight.detach().double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.weight, torchs.weight, atol=3e-3, rtol=0)
    assert optimizer.state_dict()["state"].keys() == other.state_dict()["state"].keys()
