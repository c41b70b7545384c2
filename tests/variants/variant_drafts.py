"""A variant's draft as the project loads it, and what tests of both variants compare it by."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.draft.weights import load_draft
from dflash_offline.stages.trainer import DFlashTrainerModule


class SIZES:
    """What tiny batches and the target's ends are made by."""

    hidden_size, vocab_size, target_layer_ids = 32, 40, (1, 3)


def saved(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> DraftModel:
    """Return the draft that the project loads from a folder as a variant's formulas have it, ready to be trained."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return load_draft(folder).train().requires_grad_()


def check_gradients(loss: Tensor, trainer: DFlashTrainerModule, wanted: Mapping[str, Tensor]) -> None:
    """Compare the gradients of a loss with those of the reference, which has none for what it does not read."""
    names, weights = zip(*trainer.draft_model.named_parameters(), strict=True)
    found = dict(zip(names, torch.autograd.grad(loss, weights, allow_unused=True), strict=True))
    for name, grad in wanted.items():
        given = found[name] if found[name] is not None else torch.zeros_like(grad)
        assert (given - grad).norm() <= 1e-5 * grad.norm(), name
    extra = {name for name, grad in found.items() if name not in wanted and grad is not None and grad.any()}
    assert not extra, "a gradient that the reference does not have"


@torch.no_grad()
def features_of(target: PreTrainedModel, tokens: list[int], layer_ids: list[int]) -> Tensor:
    """Return the outputs of the target's layers, [T, L*H], by running it over the whole text at once."""
    states = target(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    return torch.cat([states[i + 1][0] for i in layer_ids], dim=-1)


def p_value(counts: Counter[tuple[int, ...]], wanted: Mapping[tuple[int, ...], float], draws: int) -> float:
    """Return how probable so large a chi-square is if counts were drawn as wanted; rare cells are merged."""
    assert not counts.keys() - {cell for cell, share in wanted.items() if share > 0}, "drawn, though it cannot be"
    cells, rare = [], [0.0, 0.0]
    for cell, share in wanted.items():
        pair = [float(counts[cell]), draws * share]
        if pair[1] < 8:
            rare = [rare[0] + pair[0], rare[1] + pair[1]]
        else:
            cells.append(pair)
    cells += [rare] if rare[1] > 0 else []
    statistic = sum((found - expected) ** 2 / expected for found, expected in cells)
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)))


def sequences(step: Callable[[tuple[int, ...]], Mapping[int, float]], length: int) -> dict[tuple[int, ...], float]:
    """Return the probability of every sequence, given that of each next token."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        found = {(*path, token): p * q for path, p in found.items() for token, q in step(path).items()}
    return found
