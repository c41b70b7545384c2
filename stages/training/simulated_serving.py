"""Simulated serving: the acceptance length that serving would see, from cached features and without the target.

Axes: B rows, S positions, N anchors, K block size, n predicting slots of a block, T temperatures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.results.expected import TEMPERATURES, expected_metric
from dflash_offline.stages.trainer import DFlashTrainerModule
from dflash_offline.stages.training.loader import Batch
from dflash_offline.stages.training.ranks import Ranks
from dflash_offline.stages.training.sums import means_of, no_sums, sums_of

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


def expected_rounds(first: int, last: int, kept: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return how many rounds one assistant turn is expected to take where tokens are drawn, [T].

    `kept` [T, S, n] is the probability, given the text, that each slot of a block anchored at a position drafted the
    text's token and it stays, those before it having stayed. A round then produces i + 1 tokens with the probability
    that i slots stay and the next does not, so the rounds that are left at each position follow from those behind it.
    """
    num_slots = kept.shape[-1]
    stays = kept[:, first:last].cumprod(axis=-1, dtype=np.float64)
    ends = np.concatenate([np.ones_like(stays[..., :1]), stays], axis=-1)
    ends[..., :-1] -= stays
    rounds = np.zeros((len(kept), last + 1 + num_slots))
    for anchor in range(last - 1, first - 1, -1):
        behind = rounds[:, anchor + 1 : anchor + 2 + num_slots]
        rounds[:, anchor] = 1 + (ends[:, anchor - first] * behind).sum(axis=-1)
    return rounds[:, first]


class Drafted(NamedTuple):
    """What drafting a block at every position of a batch showed."""

    prefix: NDArray[np.int64]
    """Drafted tokens of the block anchored at each position that are right before the first wrong one, [1 + P, B, S].

    Behind those of the tokens that are served stand those of the P other paths that the draft's variant measures; 0
    where the position cannot anchor."""
    sums: Tensor
    """As a forward pass over the batch gives them."""
    kept: NDArray[np.float32] | None
    """What `DFlashTrainerModule.serve` gives of probabilities, [T, B, S, n]; None without final states, or of a variant
    that tells none."""


@torch.no_grad()
def draft_everywhere(module: DFlashTrainerModule, batch: Batch, anchors_at_once: int | None = None) -> Drafted:
    """Return what a block anchored at each position drafts.

    A block is drafted at every supervised position, whole as in serving, also where
    the text ends within it; by default as many in a row at once as keep the device busy. The batch's own anchors are
    among these positions, so that its sums, as a forward pass over it gives them, need no drafting of their own.
    """
    anchors_at_once = anchors_at_once or AT_ONCE["cpu" if batch.input_ids.is_cpu else "gpu"]
    num_rows, seq_len = batch.input_ids.shape
    paths = 1 + len(module.variant.paths)
    prefix = torch.zeros(paths, num_rows, seq_len, dtype=torch.int64, device=batch.input_ids.device)
    is_anchor = torch.zeros_like(prefix[0]).scatter_add_(1, batch.anchors, batch.keep_mask.long()) > 0
    sums = no_sums(module.variant, module.block_size, prefix.device)
    kept: Tensor | None = None
    context = module.project_context(batch.input_ids, batch.hidden_states, batch.document_ids)
    for anchors, keep in _every_anchor(batch.loss_mask, anchors_at_once, module.compiled):
        is_trained = is_anchor.gather(1, anchors) & keep
        lengths, metrics, probabilities = module.serve(
            batch.input_ids, context, batch.loss_mask, batch.document_ids, anchors, keep, is_trained, batch.final
        )
        prefix.scatter_add_(2, anchors.expand(paths, -1, -1), lengths)
        sums += sums_of(metrics)
        if probabilities is not None:
            if kept is None:
                kept = torch.zeros(*probabilities.shape[:2], seq_len, probabilities.shape[-1], device=prefix.device)
            row = torch.arange(num_rows, device=keep.device)[:, None].expand_as(anchors)[keep]
            kept[:, row, anchors[keep]] = probabilities[:, keep]
    return Drafted(prefix.cpu().numpy(), sums, None if kept is None else kept.cpu().numpy())


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


class Walked(NamedTuple):
    """What simulated serving of a batch showed."""

    walks: list[list[list[list[int]]]]
    """Tokens produced by each round of each assistant turn of each document: of the served draft, then again of each
    other path that its variant measures."""
    expected: NDArray[np.float64]
    """Where tokens are drawn at each of `TEMPERATURES`: tokens that the rounds of all turns produce, and the rounds
    they are expected to take, [T, 2]; zeros without final states."""
    sums: Tensor


def simulate_serving(module: DFlashTrainerModule, batch: Batch) -> Walked:
    """Return what serving would do along the answers of a batch."""
    drafted = draft_everywhere(module, batch)
    masks = batch.loss_mask.cpu().numpy()
    walks = [
        [
            [simulate_turn(first, last, prefix[row, start:stop]) for first, last in turns(masks[row, start:stop])]
            for row, start, stop in batch.spans
        ]
        for prefix in drafted.prefix
    ]
    expected = np.zeros((len(TEMPERATURES), 2))
    if (kept := drafted.kept) is not None:
        for row, start, stop in batch.spans:
            expected += expected_of(turns(masks[row, start:stop]), kept[:, row, start:stop])
    return Walked(walks, expected, drafted.sums)


class Validation:
    """The held-out samples of one rank, drafted as in training and walked as in serving."""

    def __init__(self, module: DFlashTrainerModule, device: torch.device) -> None:
        self._module, self._device = module, device
        self._paths = module.variant.paths
        self._servings = [ServingSums() for _ in ("served", *self._paths)]
        self._sums = no_sums(module.variant, module.block_size, device)
        self._expected = np.zeros((len(TEMPERATURES), 2))

    def add(self, batch: Batch) -> None:
        """Add one micro-batch."""
        walked = simulate_serving(self._module, batch)
        self._sums += walked.sums
        self._expected += walked.expected
        for serving, documents in zip(self._servings, walked.walks, strict=True):
            for turns in documents:
                serving.add(turns)

    def row(self, ranks: Ranks, config: DraftConfig, *, with_expected: bool) -> dict[str, Any]:
        """Return the row of metrics over all ranks; `with_expected`, those of drawn tokens, too."""
        totals = torch.tensor([each.totals for each in self._servings], dtype=torch.float64, device=self._device)
        serving, *others = (ServingSums(*each) for each in ranks.add(totals).tolist())
        means = means_of(ranks.add(self._sums).tolist(), config)
        drawn = ranks.add(torch.from_numpy(self._expected).to(self._device)).tolist() if with_expected else []
        return {
            **{f"val_{name}": value for name, value in means.items()},
            "val_serving_walk": serving.pooled,
            "val_serving_walk_mean_of_samples": serving.mean_of_samples,
            **{f"val_serving_walk_{name}": other.pooled for name, other in zip(self._paths, others, strict=True)},
            **{
                f"val_{expected_metric(temperature)}": tokens / rounds
                for temperature, (tokens, rounds) in zip(TEMPERATURES, drawn, strict=False)
                if rounds
            },
        }


def expected_of(turns: list[tuple[int, int]], kept: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the tokens that the rounds of a document's turns produce, and the rounds expected, [T, 2]."""
    tokens = sum(last - first for first, last in turns)
    rounds = sum((expected_rounds(first, last, kept) for first, last in turns), np.zeros(len(kept)))
    return np.stack((np.full(len(kept), tokens), rounds), axis=-1)
