"""Simulated serving: the acceptance length that serving would see, from cached features and without the target.

Axes: B rows, S positions, N anchors, K block size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dflash_offline.stages.trainer import DFlashTrainerModule
from dflash_offline.stages.training.loader import Batch
from dflash_offline.stages.training.sums import no_sums, sums_of

AT_ONCE = {"cpu": 128, "gpu": 512}
"""Blocks of a row that are drafted at once."""


@dataclass
class ServingSums:
    """Tokens and rounds of the simulated serving so far."""

    tokens: float = 0
    rounds: float = 0
    samples: float = 0
    mean_sum: float = 0

    @property
    def totals(self) -> tuple[float, ...]:
        """The sums, for ranks to add up."""
        return (self.tokens, self.rounds, self.samples, self.mean_sum)

    def add(self, turns: list[list[int]]) -> None:
        """Add one document: the tokens that each round of each of its turns produced."""
        rounds = [produced for turn in turns for produced in turn]
        if rounds:
            self.tokens += sum(rounds)
            self.rounds += len(rounds)
            self.samples += 1
            self.mean_sum += sum(rounds) / len(rounds)

    @property
    def pooled(self) -> float:
        """tau: tokens produced over rounds, pooled over all samples."""
        return self.tokens / max(self.rounds, 1)

    @property
    def mean_of_samples(self) -> float:
        """Mean of the samples' own tau."""
        return self.mean_sum / max(self.samples, 1)


def turns(loss_mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return (first, last) position of every supervised run; the last is the end-of-turn token."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loss_mask, [False]]).astype(np.int8)))
    return [(int(begin), int(end) - 1) for begin, end in edges.reshape(-1, 2)]


def simulate_turn(first: int, last: int, prefix: NDArray[np.int64]) -> list[int]:
    """Return the tokens that each round produces in one assistant turn.

    A round drafts from anchor p, `prefix[p]` slots are right, and the target adds one token; the next anchor is
    that token. A turn ends with its end-of-turn token at `last`.
    """
    produced, anchor = [], first
    while anchor < last:
        produced.append(min(int(prefix[anchor]) + 1, last - anchor))
        anchor += produced[-1]
    return produced


@torch.no_grad()
def draft_everywhere(
    module: DFlashTrainerModule, batch: Batch, anchors_at_once: int | None = None
) -> tuple[NDArray[np.int64], Tensor]:
    """Return how many drafted tokens a block anchored at each position gets right, int64 [1 + P, B, S]; and sums.

    Behind those of the tokens that are served stand those of the P other paths that the draft's variant measures. 0
    where the position cannot anchor. A block is drafted at every supervised position, whole as in serving, also where
    the text ends within it; by default as many in a row at once as keep the device busy. The batch's own anchors are
    among these positions, so that its sums, as a forward pass over it gives them, need no drafting of their own.
    """
    anchors_at_once = anchors_at_once or AT_ONCE["cpu" if batch.input_ids.is_cpu else "gpu"]
    num_rows, seq_len = batch.input_ids.shape
    paths = 1 + len(module.variant.paths)
    prefix = torch.zeros(paths, num_rows, seq_len, dtype=torch.int64, device=batch.input_ids.device)
    is_anchor = torch.zeros_like(prefix[0]).scatter_add_(1, batch.anchors, batch.keep_mask.long()) > 0
    sums = no_sums(module.variant, module.block_size, prefix.device)
    context = module.project_context(batch.input_ids, batch.hidden_states, batch.document_ids)
    for anchors, keep in _every_anchor(batch.loss_mask, anchors_at_once, module.compiled):
        is_trained = is_anchor.gather(1, anchors) & keep
        lengths, metrics = module.serve(
            batch.input_ids, context, batch.loss_mask, batch.document_ids, anchors, keep, is_trained, batch.final
        )
        prefix.scatter_add_(2, anchors.expand(paths, -1, -1), lengths)
        sums += sums_of(metrics)
    return prefix.cpu().numpy(), sums


def _every_anchor(loss_mask: Tensor, at_once: int, alike: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every supervised position, `at_once` a row; `alike` pads the last chunk, so that nothing recompiles."""
    counts = loss_mask.sum(dim=1)
    most = int(counts.max())
    order = torch.argsort((~loss_mask).to(torch.int8), dim=1, stable=True)[:, :most]
    order = F.pad(order, (0, -most % at_once if alike else 0))
    keep = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    order = order * keep
    for begin in range(0, order.shape[1], at_once):
        yield order[:, begin : begin + at_once], keep[:, begin : begin + at_once]


def simulate_serving(module: DFlashTrainerModule, batch: Batch) -> tuple[list[list[list[list[int]]]], Tensor]:
    """Return the tokens produced by each round of each assistant turn of each document; and the step's sums.

    The documents are those of the served draft, then again those of each other path that its variant measures.
    """
    prefixes, sums = draft_everywhere(module, batch)
    masks = batch.loss_mask.cpu().numpy()
    walks = [
        [
            [simulate_turn(first, last, prefix[row, start:stop]) for first, last in turns(masks[row, start:stop])]
            for row, start, stop in batch.spans
        ]
        for prefix in prefixes
    ]
    return walks, sums
