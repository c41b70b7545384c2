"""eval.json: what an evaluation of a draft found, and the settings it ran under."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from dflash_offline.schemas.checked import Count, FilePath, Seconds, Size, checked, unlike
from dflash_offline.schemas.results.draft_lengths import DraftLengths
from dflash_offline.schemas.results.expected import ExpectedAcceptance
from dflash_offline.schemas.results.rounds import Acceptance
from dflash_offline.schemas.sealed import parse_json, read_bounded
from dflash_offline.schemas.settings.evaluate import EvalConfig

_MOST_BYTES = 1 << 30
"""Of a saved result; with every prompt's rounds it holds every token."""
NOT_LOSSLESS = "NOT LOSSLESS: the draft changed an answer, which greedy verification never does."

PROPOSALS = {"greedy": "taken greedily, as vLLM does", "drawn": "drawn from the draft"}
"""The ways of drafting where tokens are drawn; vLLM has the second too, by `draft_sample_method` probabilistic."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where the answer with the draft leaves the target's own."""

    prompt: str
    """File and line."""
    position: int
    """Index in the answer, from 0: of a token, or of a character where a server gives no tokens."""
    plain_token: int | None
    """The target's own; None where its answer has ended."""
    speculative_token: int | None
    """The one decoded with the draft; None where that answer has ended."""
    gap: float | None
    """Logits between the best token and the worse of these two, by one plain forward; None if an answer has ended."""
    tolerance: float | None
    """The gap that rounding alone can explain."""
    tie: bool
    """Whether rounding alone explains the difference."""


class _Group(TypedDict):
    pooled: float | None
    prompts: Count


class _All(_Group):
    mean: float | None


class _Trained(TypedDict):
    run: NotRequired[str | None]
    step: NotRequired[Count | None]


class _Config(TypedDict):
    temperature: NotRequired[float | None]
    prompts: NotRequired[FilePath | None]
    limit: NotRequired[Size | None]
    seed: NotRequired[int]
    max_new_tokens: NotRequired[Size]


class _Proposal(TypedDict):
    name: Literal["greedy", "drawn"]
    acceptance: _All


class _PromptSet(TypedDict):
    name: str
    dataset: str


class _Pass(TypedDict):
    concurrency: Size
    round_s: NotRequired[Seconds | None]
    plain_step_s: NotRequired[Seconds | None]


class _Service(TypedDict):
    num_speculative_tokens: NotRequired[Size | None]
    passes: list[_Pass]


class _Expected(TypedDict):
    concurrency: Size
    num_speculative_tokens: Size
    speedup: list[float] | None


class _Lengths(TypedDict):
    expected: list[_Expected]


class _Result(TypedDict):
    """What is read of a saved result, which holds more."""

    acceptance: _All
    trained: _Trained | None
    config: _Config
    block_size: Size
    dtype: str
    device: str
    offline: NotRequired[bool]
    drafted_by_slot: NotRequired[list[Count]]
    accepted_by_slot: NotRequired[list[Count]]
    speedup: NotRequired[float | None]
    acceptance_by_kind: NotRequired[dict[str, _Group]]
    proposals: NotRequired[list[_Proposal]]
    prompt_set: NotRequired[_PromptSet | None]
    service: NotRequired[_Service | None]
    draft_lengths: NotRequired[_Lengths | None]


def read_result(path: Path, what_to_do: str) -> dict[str, Any]:
    """Return what `dflash eval --save` wrote; `CacheError` saying what to do if the file is no such result."""
    result: dict[str, Any] = parse_json(read_bounded(path, _MOST_BYTES), path)
    typed = checked(result, _Result, path, what_to_do)
    if len(typed.get("drafted_by_slot", ())) != len(typed.get("accepted_by_slot", ())):
        raise unlike(path, "drafted_by_slot is not as long as accepted_by_slot", what_to_do)
    for one in (typed.get("draft_lengths") or {"expected": []})["expected"]:
        if one["speedup"] is not None and one["num_speculative_tokens"] > len(one["speedup"]):
            raise unlike(path, "num_speculative_tokens is more than there are speed-ups of", what_to_do)
    return result


@dataclass(frozen=True, kw_only=True)
class DecodedPrompt:
    """One prompt and its rounds, as token ids.

    The answer is its first token, which the prompt's forward gives, and then of each round the first `accepted` of its
    drafted tokens and the target's own one, if the answer did not end before it.
    """

    prompt: str
    """Its file and line."""
    kind: str | None
    prompt_ids: tuple[int, ...]
    answer: tuple[int, ...]
    drafted: tuple[tuple[int, ...], ...]
    """Tokens proposed in each round."""
    accepted: tuple[int, ...]
    """Of each round, how many of them are in the answer."""
    produced: tuple[int, ...]
    """Of each round, tokens of the answer: the accepted ones, and the target's own."""
    identical: bool | None
    """Whether the target alone answers the same; None when tokens are drawn."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A time over all answers, in seconds."""

    median: float
    p95: float
    """Nineteen of twenty are at most this."""


def spread(values: Sequence[float]) -> Spread | None:
    """Return the spread of some seconds; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return Spread(median=statistics.median(ordered), p95=ordered[math.ceil(0.95 * len(ordered)) - 1])


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What the server counted of its drafting meanwhile; of one that counts little, all but the length is None."""

    acceptance_length: float | None
    """Tokens a round: the server's own one and the accepted ones; None without a round."""
    since_start: bool = False
    """Whether it is the server's average since it was started, of which no part can be told."""
    rounds: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    """Accepted tokens, those behind the end of an answer included."""
    accepted_by_slot: tuple[int, ...] | None = None
    """Of slots 1, 2, ... as many as the server drafts."""
    other_requests: int = 0
    """Requests that ended meanwhile and were not ours; below 0 where the server counts fewer than it answered us."""
    other_tokens: int = 0
    """Their tokens, and those of others still under way."""

    @property
    def is_disturbed(self) -> bool:
        """Whether the server had other work, so that nothing it counted is of our prompts alone."""
        return self.other_requests != 0 or self.other_tokens != 0


@dataclass(frozen=True, kw_only=True)
class Served:
    """One pass over all prompts, so many requests at a time."""

    concurrency: int
    prompts: int
    tokens: int
    """Of all answers."""
    seconds: float
    """From the first request to the last answer's end."""
    tokens_per_s: float
    first_token_s: Spread | None
    """From a request to its answer's first token."""
    per_token_s: Spread | None
    """Of an answer: seconds from its first token to its last / tokens after the first."""
    counted: Counted | None
    """None where the server shows no counters that are known here."""
    round_s: float | None = None
    """Seconds of a round of every request under way, its share of the prompts' forwards with it; None where the server
    does not count rounds, or others used it."""
    plain_step_s: float | None = None
    """The same of a token on the plain server, at the same concurrency."""
    acceptance_by_kind: dict[str, Acceptance]
    """Where the server tells the rounds of each answer."""
    plain_tokens_per_s: float | None = None
    """The plain server's, at the same concurrency."""
    identical: int | None = None
    """Answers that are the target's own; None where nothing was there to compare, or tokens are drawn."""
    differences: tuple[Difference, ...] = ()
    """The other answers."""
    other_prompts: int = 0
    """Prompts of which the server's chat template made other tokens than the target's does here."""

    @property
    def speedup(self) -> float | None:
        """Tokens/s with the draft / tokens/s of the plain server."""
        return self.tokens_per_s / self.plain_tokens_per_s if self.plain_tokens_per_s else None


@dataclass(frozen=True, kw_only=True)
class Service:
    """A live server, and what it did."""

    url: str
    """Without what is secret in it."""
    kind: str
    """vLLM, SGLang, or unknown, by the counters it shows."""
    model: str
    compared_with: str | None
    """What the answers were compared with: the plain server, the target here, or nothing."""
    num_speculative_tokens: int | None
    """Tokens that it drafts in a round, where it says so."""
    passes: tuple[Served, ...]
    notes: tuple[str, ...]
    """What a reader must know of how it was measured."""


@dataclass(frozen=True, kw_only=True)
class ProposalFigures:
    """What one way of drafting gave where tokens are drawn; either leaves answers distributed as the target's own."""

    name: str
    """Of `PROPOSALS`. greedy: the draft's best token; drawn: one drawn from the draft as the target's are."""
    acceptance: Acceptance
    acceptance_by_kind: dict[str, Acceptance]
    drafted_tokens: int
    accepted_tokens: int
    """Drafted tokens that are in an answer."""
    tokens_per_s: float | None
    speedup: float | None
    """tokens_per_s / plain_tokens_per_s."""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What an evaluation found, with the settings it ran under; what needs the target is None without one."""

    config: EvalConfig
    trained: dict[str, Any] | None
    """What the draft's weights say of their training; None where they do not say it."""
    offline: bool
    """Whether cached samples were walked without the target."""
    held_out: bool | None
    """Whether the cache's samples were held out of this draft's training; None for prompts of a file."""
    prompt_set: dict[str, Any] | None = None
    """The public set that the prompts are of: its dataset, and the revision or the local copy's hash."""
    block_size: int
    """The most tokens that one round can produce: what is drafted, and the target's own; of a base draft K."""
    acceptance: Acceptance
    acceptance_by_kind: dict[str, Acceptance]
    """Of the prompts that name a kind."""
    rounds_by_tokens: tuple[int, ...]
    """Rounds that produced 1, 2, ... K tokens."""
    drafted_by_slot: tuple[int, ...]
    """Tokens drafted first, second, ... in their block."""
    accepted_by_slot: tuple[int, ...]
    """Those of them that are in an answer, and then so are all before them in their block."""
    drafted_tokens: int
    accepted_tokens: int
    """Drafted tokens that are in an answer."""
    tokens_per_call: float | None = None
    """Tokens of the answers / forward calls of the target, prompts included; compares with prompt lookup's."""
    prompt_lookup_tokens_per_call: float | None = None
    """The same for prompt lookup with K - 1 looked-up tokens; None if it was not asked for."""
    plain_tokens_per_s: float | None = None
    """Target alone: tokens after the first of each answer / seconds after the prompt's forward, over all prompts."""
    speculative_tokens_per_s: float | None = None
    """The same with the draft."""
    speedup: float | None = None
    """speculative_tokens_per_s / plain_tokens_per_s."""
    speedup_median: float | None = None
    """Median of the prompts' own speed-ups."""
    nll: float | None = None
    """Mean negative log-likelihood that the target gives its own answers, in nats per token."""
    identical: int | None = None
    """Prompts answered with the same tokens both ways; None when tokens are drawn, for two draws differ anyway."""
    differences: tuple[Difference, ...] = ()
    """The other prompts."""
    lossless: bool | None = None
    """Whether every difference is a tie to rounding. False is a fault of the decoder or of a client's kernel."""
    proposals: tuple[ProposalFigures, ...] = ()
    """Each way of drafting where tokens are drawn here; the figures above are those of the greedy one."""
    expected: tuple[ExpectedAcceptance, ...] = ()
    """What drawn tokens would give along the cached answers, where the cache has the target's final states."""
    draft_lengths: DraftLengths | None = None
    """What shorter blocks give and how many tokens to draft, if the settings ask for it."""
    decoded: tuple[DecodedPrompt, ...] | None = None
    """Every prompt's rounds, if the settings ask to keep them."""
    service: Service | None = None
    """What a live server did, if one was measured; without a target the figures above are of its first pass."""
    device: str
    dtype: str
    threads: int
    versions: dict[str, str]

    @property
    def prompts_shown(self) -> str:
        """What was asked, in words: the file or the cache, or a public set and where it came from."""
        if self.prompt_set is None:
            return str(self.config.prompts or self.config.cache)
        revision = self.prompt_set.get("revision")
        origin = f"at {revision[:12]}" if revision else f"from {self.prompt_set['file']}"
        return f"{self.prompt_set['name']}, {self.prompt_set['dataset']} {origin}"

    def slot_shares(self) -> list[tuple[float, float]]:
        """Return the share of each slot's tokens that are in an answer: of all drafted, and of those with no rejected
        token before them in their block, which alone the target looks at."""
        reached = [*self.drafted_by_slot[:1], *self.accepted_by_slot[:-1]]
        slots = zip(self.accepted_by_slot, self.drafted_by_slot, reached, strict=True)
        return [(accepted / max(drafted, 1), accepted / max(alone, 1)) for accepted, drafted, alone in slots]

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return document
