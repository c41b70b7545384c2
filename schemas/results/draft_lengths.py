"""How many tokens to draft: what each shorter block gave, what a round of it costs, and the speeds to expect."""

from dataclasses import dataclass

from dflash_offline.schemas.results.rounds import Acceptance


@dataclass(frozen=True, kw_only=True)
class DraftLength:
    """What blocks of one length gave, each drafted by a pass of its own: a shorter block sees fewer masks."""

    num_speculative_tokens: int
    """Tokens drafted in a round."""
    acceptance: Acceptance
    acceptance_by_kind: dict[str, Acceptance]
    tokens_per_s: float | None = None
    """Of decoding here, a prompt at a time; None where cached answers were walked."""


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Seconds that the steps of a round took here, with so many sequences in a batch."""

    concurrency: int
    context_tokens: int
    """Of each sequence, before the step."""
    plain_s: float
    """The target reads one token of each sequence."""
    draft_s: tuple[float, ...]
    """The draft's pass over a block with 1, 2, ... drafted tokens of each sequence."""
    verify_s: tuple[float, ...]
    """The target reads such a block of each sequence."""

    @property
    def round_s(self) -> tuple[float, ...]:
        """Both of them."""
        return tuple(draft + verify for draft, verify in zip(self.draft_s, self.verify_s, strict=True))


@dataclass(frozen=True, kw_only=True)
class ServedCost:
    """What a round took on a live server, with so many requests under way."""

    concurrency: int
    num_speculative_tokens: int
    round_s: float
    plain_step_s: float | None
    """A token's time on the plain server, if one was measured."""


@dataclass(frozen=True, kw_only=True)
class ExpectedSpeeds:
    """What drafting 1, 2, ... tokens a round should give so many sequences at a time."""

    concurrency: int
    costs: str
    """What the seconds of a round follow from."""
    round_s: tuple[float, ...]
    tokens_per_s: tuple[float, ...]
    """Of all sequences together: sequences * acceptance length / seconds of a round."""
    speedup: tuple[float, ...] | None
    """Times plain decoding; None where that was not timed."""
    num_speculative_tokens: int
    """The fastest: what to draft."""
    by_kind: dict[str, int]
    """The fastest for the prompts of each kind alone."""


@dataclass(frozen=True, kw_only=True)
class DraftLengths:
    """What an evaluation found of all lengths from one drafted token to the trained block's."""

    lengths: tuple[DraftLength, ...]
    costs: tuple[StepCosts, ...]
    """Measured here; nothing without a target."""
    expected: tuple[ExpectedSpeeds, ...]
    """For each concurrency whose costs are known."""
    notes: tuple[str, ...] = ()
    """What a reader must know, or could do to know more."""
