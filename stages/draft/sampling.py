"""How a token is chosen from logits, and which drafted tokens may stay so that the answer is the target's own.

Greedy: a drafted token stays if it is the target's best. Sampling (Leviathan et al., arXiv 2211.17192): a drafted token
x, proposed from q, stays with probability min(1, p(x) / q(x)), p the target's; the first one that does not is replaced
by a draw from max(p - q, 0), scaled to 1. What comes out is distributed as p, whatever q is. Two proposals are common:
x drawn from the draft's own distribution, which is then q, and the draft's best token, where q has all on x.
"""

# Axes: Q tokens of one block, V vocabulary. The batch axis is 1 throughout.

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Proposal = Literal["greedy", "drawn"]
"""How tokens are drafted where the target's are drawn: the draft's best ones, or drawn from the draft likewise."""


class Chooser(Protocol):
    """Chooses tokens in one decoding."""

    def choose(self, logits: Tensor) -> Tensor:
        """Return one token for each row of logits, int64 [...] of [..., V]."""

    def draft(self, logits: Tensor) -> Tensor:
        """Return the drafted tokens, int64 [1, Q - 1] of [1, Q - 1, V]; `verify` is told of the same block."""

    def verify(self, block: Tensor, logits: Tensor) -> tuple[int, list[int]]:
        """Return how many drafted tokens of the block [1, Q] stay, and those followed by the target's own next one.

        `logits` [1, Q, V] are the target's after each token of the block.
        """


class Greedy:
    """The best token each time."""

    def choose(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1)

    def draft(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1)

    def verify(self, block: Tensor, logits: Tensor) -> tuple[int, list[int]]:
        # One transfer a round; the comparison of two short lists costs nothing.
        (drafted, answer) = torch.cat((block, logits.argmax(dim=-1))).tolist()
        agreed = 0
        while agreed < len(answer) - 1 and drafted[agreed + 1] == answer[agreed]:
            agreed += 1
        return agreed, answer[: agreed + 1]


@dataclass(frozen=True, kw_only=True)
class SamplingRule:
    """Which distribution a token is drawn from."""

    temperature: float
    """Logits are divided by it; above 0."""
    top_p: float = 1.0
    """The likeliest tokens that together have this much stay; 1 for all."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distribution of each row, float32 [..., V]."""
        probabilities = (logits.float() / self.temperature).softmax(dim=-1)
        if self.top_p >= 1:
            return probabilities
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token stays if those before it have not reached top_p; the first always does.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= self.top_p, 0.0)
        kept = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        return kept / kept.sum(dim=-1, keepdim=True)


class Sampler:
    """Draws each token, and keeps drafted ones by rejection sampling; the same seed gives the same answer."""

    def __init__(self, rule: SamplingRule, seed: int, device: torch.device, *, proposal: Proposal = "drawn") -> None:
        self._rule, self._proposal = rule, proposal
        self._generator = torch.Generator(device).manual_seed(seed)
        self._drafted_from: Tensor | None = None

    def choose(self, logits: Tensor) -> Tensor:
        return self._draw(self._rule.probabilities(logits))

    def draft(self, logits: Tensor) -> Tensor:
        if self._proposal == "greedy":
            best = logits.argmax(dim=-1)
            self._drafted_from = F.one_hot(best, logits.shape[-1]).float()
            return best
        self._drafted_from = self._rule.probabilities(logits)
        return self._draw(self._drafted_from)

    def verify(self, block: Tensor, logits: Tensor) -> tuple[int, list[int]]:
        wanted = self._rule.probabilities(logits[0])
        drafted = block[0, 1:]
        agreed = 0
        if len(drafted):
            assert self._drafted_from is not None, "a block is verified after it was drafted"
            chosen = drafted[:, None]
            p, q = wanted[:-1].gather(1, chosen)[:, 0], self._drafted_from[0].gather(1, chosen)[:, 0]
            draws = torch.rand(len(drafted), generator=self._generator, device=p.device)
            agreed = int((draws * q < p).int().cumprod(dim=0).sum())
        last = wanted[agreed]
        if agreed < len(drafted):
            assert self._drafted_from is not None
            left = (last - self._drafted_from[0, agreed]).clamp(min=0)
            # Nothing is left only where p and q agree to rounding; then p itself is right.
            last = torch.where(left.sum() > 0, left, last)
        return agreed, [*drafted[:agreed].tolist(), int(self._draw(last[None] / last.sum()))]

    def _draw(self, probabilities: Tensor) -> Tensor:
        rows = probabilities.flatten(0, -2)
        drawn = torch.multinomial(rows, 1, generator=self._generator)
        return drawn.view(probabilities.shape[:-1])
