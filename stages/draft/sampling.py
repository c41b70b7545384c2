"""How a token is chosen from logits, and which drafted tokens may stay so that the answer is the target's own.

Greedy: a drafted token stays if it is the target's best. Sampling (Leviathan et al., arXiv 2211.17192): a drafted token
x, proposed from q, stays with probability min(1, p(x) / q(x)), p the target's; the first one that does not is replaced
by a draw from max(p - q, 0), scaled to 1. What comes out is distributed as p, whatever q is. Two proposals are common:
x drawn from the draft's own distribution, which is then q, and the draft's best token, where q has all on x.
"""

# Axes: Q tokens of one block, V vocabulary, k candidates of a slot. The batch axis is 1 throughout.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Proposal = Literal["greedy", "drawn"]
"""How tokens are drafted where the target's are drawn: the draft's best ones, or drawn from the draft likewise."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How a block's tokens are chosen one after another; functions of the slot's number and the token before, [1]."""

    scores: Callable[[int, Tensor], Tensor]
    """Scores [1, k] of a slot's candidates."""
    count: int
    """Slots."""
    ids: Tensor | None = None
    """Each slot's candidates, int64 [count, k]; None where they are the vocabulary."""
    goes_on: Callable[[int, Tensor], bool] | None = None
    """Whether the slot is drafted at all; where it is not, the block ends before it. It may depend on nothing that is
    chosen later, so that what comes out stays the target's own. None to draft all of them."""


class Chooser(Protocol):
    """Chooses tokens in one decoding."""

    def choose(self, logits: Tensor) -> Tensor:
        """Return one token for each row of logits, int64 [...] of [..., V]."""

    def draft(self, logits: Tensor) -> Tensor:
        """Return the drafted tokens, int64 [1, Q - 1] of [1, Q - 1, V]; `verify` is told of the same block."""

    def walk(self, steps: Steps, anchor: Tensor) -> Tensor:
        """Return the drafted tokens, int64 [1, Q - 1], each chosen among its slot's candidates after the one before it.

        `anchor`, int64 [1], is the token before the first.
        """

    def verify(self, block: Tensor, logits: Tensor) -> tuple[int, list[int]]:
        """Return how many drafted tokens of the block [1, Q] stay, and those followed by the target's own next one.

        `logits` [1, Q, V] are the target's after each token of the block.
        """


def _walk(steps: Steps, anchor: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
    tokens, previous = [], anchor
    for slot in range(steps.count):
        if steps.goes_on is not None and not steps.goes_on(slot, previous):
            break
        place = pick(steps.scores(slot, previous))
        previous = place if steps.ids is None else steps.ids[slot, place]
        tokens.append(previous)
    return torch.stack(tokens, dim=1) if tokens else anchor.new_empty((1, 0))


@dataclass(frozen=True)
class DenseProposal:
    """What a block's tokens were drawn from: a distribution over the vocabulary for each slot."""

    q: Tensor
    """float32 [Q - 1, V]."""

    def of(self, tokens: Tensor) -> Tensor:
        """Return the probability of each drafted token, [Q - 1]."""
        return self.q.gather(1, tokens[:, None])[:, 0]

    def left(self, p: Tensor, slot: int) -> Tensor:
        """Return max(p - q, 0) of a slot, [V]."""
        return (p - self.q[slot]).clamp(min=0)


@dataclass(frozen=True)
class SparseProposal:
    """What a block's tokens were drawn from: for each slot a distribution over a few tokens, none of them twice."""

    ids: Tensor
    """int64 [Q - 1, k]."""
    q: Tensor
    """float32 [Q - 1, k]."""

    def of(self, tokens: Tensor) -> Tensor:
        """Return the probability of each drafted token, [Q - 1]."""
        return (self.q * (self.ids == tokens[:, None])).sum(dim=-1)

    def left(self, p: Tensor, slot: int) -> Tensor:
        """Return max(p - q, 0) of a slot, [V]."""
        return p.index_add(0, self.ids[slot], -self.q[slot]).clamp(min=0)


class Greedy:
    """The best token each time."""

    def choose(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1)

    def draft(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1)

    def walk(self, steps: Steps, anchor: Tensor) -> Tensor:
        return _walk(steps, anchor, lambda row: row.argmax(dim=-1))

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
    top_k: int = 0
    """So many of the likeliest tokens stay, and those as likely as the last of them; 0 for all."""
    min_p: float = 0.0
    """Tokens stay that have this share of the likeliest one's probability; 0 for all."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distribution of each row, float32 [..., V].

        What does not stay is left out in vLLM's order: by `min_p`, by `top_k`, and of the rest by `top_p`.
        """
        probabilities = (logits.float() / self.temperature).softmax(dim=-1)
        if self.min_p > 0:
            least = self.min_p * probabilities.amax(dim=-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        if 0 < self.top_k < logits.shape[-1]:
            last = probabilities.topk(self.top_k, dim=-1).values[..., -1:]
            probabilities = probabilities.masked_fill(probabilities < last, 0.0)
        if self.min_p > 0 or self.top_k > 0:
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
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
        self._drafted_from: DenseProposal | SparseProposal | None = None

    def choose(self, logits: Tensor) -> Tensor:
        return self._draw(self._rule.probabilities(logits))

    def draft(self, logits: Tensor) -> Tensor:
        if self._proposal == "greedy":
            return self._all_on(logits.argmax(dim=-1))
        q = self._rule.probabilities(logits)
        self._drafted_from = DenseProposal(q[0])
        return self._draw(q)

    def walk(self, steps: Steps, anchor: Tensor) -> Tensor:
        if self._proposal == "greedy":
            return self._all_on(Greedy().walk(steps, anchor))
        rows: list[Tensor] = []

        def pick(row: Tensor) -> Tensor:
            rows.append((row.float() / self._rule.temperature).softmax(dim=-1))
            return self._draw(rows[-1])

        tokens = _walk(steps, anchor, pick)
        if rows:
            q, ids = torch.cat(rows), steps.ids
            self._drafted_from = DenseProposal(q) if ids is None else SparseProposal(ids[: len(q)], q)
        return tokens

    def _all_on(self, tokens: Tensor) -> Tensor:
        """Note that each of these tokens, int64 [1, Q - 1], was certain to be drafted."""
        self._drafted_from = SparseProposal(tokens[0, :, None], torch.ones_like(tokens[0, :, None], dtype=torch.float))
        return tokens

    def verify(self, block: Tensor, logits: Tensor) -> tuple[int, list[int]]:
        wanted = self._rule.probabilities(logits[0])
        drafted = block[0, 1:]
        agreed = 0
        if len(drafted):
            assert self._drafted_from is not None, "a block is verified after it was drafted"
            p, q = wanted[:-1].gather(1, drafted[:, None])[:, 0], self._drafted_from.of(drafted)
            draws = torch.rand(len(drafted), generator=self._generator, device=p.device)
            agreed = int((draws * q < p).int().cumprod(dim=0).sum())
        last = wanted[agreed]
        if agreed < len(drafted):
            assert self._drafted_from is not None
            left = self._drafted_from.left(last, agreed)
            # Nothing is left only where p and q agree to rounding; then p itself is right.
            last = torch.where(left.sum() > 0, left, last)
        return agreed, [*drafted[:agreed].tolist(), int(self._draw(last[None] / last.sum()))]

    def _draw(self, probabilities: Tensor) -> Tensor:
        rows = probabilities.flatten(0, -2)
        drawn = torch.multinomial(rows, 1, generator=self._generator)
        return drawn.view(probabilities.shape[:-1])
