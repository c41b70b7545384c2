"""One prompt decoded by the target alone and with a draft, the ways taking turns at going first."""

import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from dflash_offline.schemas.results.rounds import Rounds
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.stages.conversations.prompts import Prompt
from dflash_offline.stages.draft.decode import (
    LookupDecoding,
    PlainDecoding,
    SpeculativeDecoding,
    plain_decode,
    prompt_lookup_decode,
    speculative_decode,
)
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.draft.sampling import Chooser, Proposal, Sampler, SamplingRule

Timed = TypeVar("Timed", PlainDecoding, SpeculativeDecoding)


@dataclass(frozen=True)
class Case:
    """A prompt and its tokens."""

    prompt: Prompt
    ids: list[int]


@dataclass(frozen=True)
class Outcome:
    """What the ways of decoding gave for one prompt."""

    case: Case
    plain: PlainDecoding
    by_proposal: dict[Proposal, SpeculativeDecoding]
    lookup: LookupDecoding | None

    @property
    def speculative(self) -> SpeculativeDecoding:
        """Decoding with greedily drafted tokens, as clients do if they are not told otherwise."""
        return self.by_proposal["greedy"]


@dataclass(frozen=True)
class Decoder:
    """What prompts are decoded with, and by which settings."""

    config: EvalConfig
    target: Any
    draft: DraftModel
    stops: frozenset[int]

    @property
    def proposals(self) -> tuple[Proposal, ...]:
        """How tokens are drafted: in both ways where tokens are drawn, which are one where they are not."""
        return ("greedy", "drawn") if self.config.temperature else ("greedy",)

    def warm_up(self, case: Case) -> None:
        """Decode a prompt once each way; nothing is kept of it."""
        in_turn(self._ways(case, 0), 0)

    def outcome(self, case: Case, index: int) -> Outcome:
        """Return a prompt's decodings; their seconds are medians over the repeats, the tokens those of the first."""
        config, ways = self.config, self._ways(case, index)
        found = [in_turn(ways, index * config.repeats + i) for i in range(config.repeats)]
        plain, *speculative = (_timed_by_median(each) for each in zip(*found, strict=True))
        lookup = None
        if config.prompt_lookup:
            num_lookup_tokens = self.draft.config.num_draft_tokens
            lookup = prompt_lookup_decode(self.target, case.ids, config.max_new_tokens, self.stops, num_lookup_tokens)
        return Outcome(case, plain, dict(zip(self.proposals, speculative, strict=True)), lookup)

    def speculate(
        self, case: Case, index: int, proposal: Proposal = "greedy", draft: DraftModel | None = None
    ) -> SpeculativeDecoding:
        """Return a prompt decoded with the draft, or with another one."""
        return speculative_decode(
            self.target,
            draft or self.draft,
            case.ids,
            self.config.max_new_tokens,
            self.stops,
            chooser_for(self.config, self.target.device, f"{proposal} {index}", proposal),
            keep_blocks=self.config.keep_rounds,
            confidence_threshold=self.config.confidence_threshold,
        )

    def _ways(self, case: Case, index: int) -> list[Callable[[], Any]]:
        return [partial(self._plain, case, index), *(partial(self.speculate, case, index, p) for p in self.proposals)]

    def _plain(self, case: Case, index: int) -> PlainDecoding:
        chooser = chooser_for(self.config, self.target.device, f"plain {index}")
        return plain_decode(self.target, case.ids, self.config.max_new_tokens, self.stops, chooser)


def chooser_for(
    config: EvalConfig, device: torch.device, decoding: str, proposal: Proposal = "drawn"
) -> Chooser | None:
    """Return what draws the tokens of the decoding of this name, which has draws of its own; None for greedy."""
    if not config.temperature:
        return None
    seed = random.Random(f"{config.seed} {decoding}").getrandbits(62)
    rule = SamplingRule(temperature=config.temperature, top_p=config.top_p)
    return Sampler(rule, seed, device, proposal=proposal)


def in_turn(ways: Sequence[Callable[[], Any]], turn: int) -> list[Any]:
    """Return what each way gives; which one begins changes from turn to turn."""
    order = [(turn + i) % len(ways) for i in range(len(ways))]
    found = {i: ways[i]() for i in order}
    return [found[i] for i in range(len(ways))]


def _timed_by_median(repeats: Sequence[Timed]) -> Timed:
    return replace(repeats[0], seconds=statistics.median(done.seconds for done in repeats))


def rounds_of(case: Case, done: SpeculativeDecoding) -> Rounds:
    """Return the rounds of a prompt's answer."""
    return Rounds(kind=case.prompt.kind, produced=done.produced, proposed=done.proposed, kept=done.kept)


def tokens_per_s(decodings: Iterable[PlainDecoding | SpeculativeDecoding]) -> float | None:
    """Return the tokens after the first of each answer over the seconds of decoding them; None where there is none."""
    timed = [(len(d.tokens) - 1, d.seconds) for d in decodings]
    tokens, seconds = sum(n for n, _ in timed), sum(s for _, s in timed)
    return tokens / seconds if tokens and seconds > 0 else None
