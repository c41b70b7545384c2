"""The rounds in which a draft would have decoded a text that is known, from the target's states over it.

Axes: S positions of a text, K block size, H hidden size, L layers read.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dflash_offline.stages.draft.attention import Blocks, dense_mask
from dflash_offline.stages.draft.decode import plain_decode
from dflash_offline.stages.draft.losslessness import rounding_share
from dflash_offline.stages.draft.model import DraftModel, ProjectedContext
from dflash_offline.stages.draft.sampling import Greedy
from dflash_offline.stages.draft.variants.table import variant_of
from dflash_offline.stages.draft.weights import run_as
from dflash_offline.stages.evaluation.diagnosis.changes import EMBEDDING, Change
from dflash_offline.stages.evaluation.diagnosis.likelihood import Counts
from dflash_offline.stages.evaluation.samples import EvalSamples, answer_spans
from dflash_offline.stages.store.cache import Cache

_AT_ONCE = 16
"""Texts whose states are held, and that are walked together."""


@dataclass(frozen=True, kw_only=True)
class KnownText:
    """A prompt and its answer."""

    place: str
    ids: list[int]
    """All tokens; behind the answer there may be those that the target would go on with."""
    first: int
    """Position of the answer's first token, which is the first anchor."""
    last: int
    """Position of its last one, at which the rounds end."""
    sample: int | None = None
    """Its sample in the cache, where it is one's beginning."""
    beyond: int = 0
    """Tokens that the server accepted in the last round behind the answer's end."""


class States(Protocol):
    """Where the target's states over a text come from."""

    known: frozenset[int]
    """The taps that there are."""

    def taps(self, text: KnownText, wanted: Collection[int]) -> Mapping[int, Tensor]:
        """Return the states [S, H] at each tap; `changes.Change` says what taps are."""


class CachedStates:
    """The states that a cache holds."""

    def __init__(self, cache: Cache, device: torch.device, dtype: torch.dtype) -> None:
        self._cache, self._device, self._dtype = cache, device, dtype
        self.known = frozenset(cache.layer_ids)

    def taps(self, text: KnownText, wanted: Collection[int]) -> Mapping[int, Tensor]:
        """Return the states of the text's sample."""
        assert text.sample is not None, "a text of another origin has no cached states"
        values = torch.from_numpy(self._cache.values(text.sample)).to(self._device, self._dtype)
        return {layer: values[:, i] for i, layer in enumerate(self._cache.layer_ids) if layer in wanted}


class TargetStates:
    """The states of a target that is run over each text; it also sees which answers are not its own."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self.known = frozenset(range(EMBEDDING, target.config.get_text_config(decoder=True).num_hidden_layers))
        self.foreign = self.inexact = 0
        """Texts whose answer has a token that the target would not choose: whatever data type the server rounds to, and
        in its own data type."""

    @torch.inference_mode()
    def taps(self, text: KnownText, wanted: Collection[int]) -> Mapping[int, Tensor]:
        """Return the states of one forward, whose logits judge the answer."""
        ids = torch.tensor([text.ids], device=self._target.device)
        kept = len(text.ids) - text.first + 1
        output = self._target(ids, use_cache=False, output_hidden_states=True, logits_to_keep=kept)
        logits = output.logits[0, : text.last - text.first + 1].float()
        chosen = logits.gather(1, ids[0, text.first : text.last + 1, None])[:, 0]
        gaps, scale = logits.amax(dim=1) - chosen, logits.abs().amax(dim=1)
        self.foreign += bool((gaps > rounding_share(torch.bfloat16) * scale).any())
        self.inexact += bool((gaps > rounding_share(output.logits.dtype) * scale).any())
        return {tap: output.hidden_states[tap + 1][0] for tap in wanted}


def cached_texts(chosen: EvalSamples) -> list[KnownText]:
    """Return every assistant turn of the samples that a round could follow, after what stands before it."""
    table = chosen.cache.samples
    return [
        KnownText(place=place, ids=table.input_ids(i)[: last + 1].tolist(), first=first, last=last, sample=i)
        for place, i, first, last in answer_spans(chosen)
    ]


def answered(
    target: Any, place: str, prompt_ids: Sequence[int], most: int, stop_ids: Collection[int], further: int
) -> KnownText:
    """Return the target's own answer to a prompt, and `further` tokens that it would go on with."""
    answer = plain_decode(target, prompt_ids, most, stop_ids).tokens
    ids = [*prompt_ids, *answer]
    after = plain_decode(target, ids, further, ()).tokens
    return KnownText(place=place, ids=ids + after, first=len(prompt_ids), last=len(ids) - 1)


class Walker:
    """Walks texts with a draft, the target's embeddings and head being borrowed."""

    def __init__(self, draft: DraftModel, head: nn.Module, table: Tensor) -> None:
        self._draft, self._head, self._table = draft, head, table

    @torch.inference_mode()
    def rounds(
        self, texts: Sequence[KnownText], states: Sequence[Mapping[int, Tensor]], change: Change
    ) -> list[list[int]]:
        """Return how many drafted tokens each round accepts under a change, as far as each text is known.

        The texts take their rounds together, one of each at a time.
        """
        draft, device = run_as(self._draft, change.config), self._table.device
        features = [torch.cat([one[tap] for tap in change.taps], dim=-1) for one in states]
        padded = pad_sequence(features, batch_first=True).to(self._table.dtype)
        context = draft.project_context(torch.arange(padded.shape[1], device=device)[None], padded)
        accepted: list[list[int]] = [[] for _ in texts]
        anchors = [text.first for text in texts]
        while rows := [i for i, text in enumerate(texts) if anchors[i] < text.last]:
            at = torch.tensor([anchors[i] for i in rows], device=device)
            tokens = torch.tensor([texts[i].ids[anchors[i]] for i in rows], device=device)
            blocks = self._draft_blocks(draft, _select(context, rows, device), at, tokens, change.sees_anchor)
            for i, drafted in zip(rows, blocks, strict=True):
                known = texts[i].ids[anchors[i] + 1 : anchors[i] + 1 + change.config.num_draft_tokens]
                accepted[i].append(next((j for j, token in enumerate(known) if drafted[j] != token), len(known)))
                anchors[i] += accepted[i][-1] + 1
        return accepted

    def _draft_blocks(
        self, draft: DraftModel, context: ProjectedContext, anchors: Tensor, tokens: Tensor, sees_anchor: bool
    ) -> list[list[int]]:
        """Return the tokens [B, n] drafted behind the anchors [B], whose tokens are given."""
        config, chooser = draft.config, Greedy()
        ids = torch.full((len(tokens), config.block_size), config.mask_token_id, device=tokens.device)
        ids[:, 0] = tokens
        ends = (anchors + int(sees_anchor))[:, None]
        blocks = Blocks(ends, torch.ones_like(ends, dtype=torch.bool), None, context.length, config.block_size)
        hidden = draft(
            position_ids=anchors[:, None] + torch.arange(config.block_size, device=tokens.device),
            noise_embedding=self._table[ids],
            target_hidden=context,
            attention_mask={kind: dense_mask(blocks, rule) for kind, rule in config.attention_rules.items()},
        )
        variant, first = variant_of(config), config.variant.first_slot
        return [
            variant.propose(draft, row[None, first:], self._head, token[None], chooser)[0].tolist()
            for row, token in zip(hidden, tokens, strict=True)
        ]


def _select(context: ProjectedContext, rows: list[int], device: torch.device) -> ProjectedContext:
    index = torch.tensor(rows, device=device)
    return ProjectedContext(tuple((keys[index], values[index]) for keys, values in context.layers))


def count_rounds(accepted: Sequence[int], num_slots: int) -> Counts:
    """Return how many rounds there are, and how many of them accepted at least 1 to `num_slots` tokens."""
    found = np.asarray(accepted)
    return np.array([len(found), *((found >= slot).sum() for slot in range(1, num_slots + 1))], dtype=float)


def walk_all(
    walker: Walker, states: States, texts: Sequence[KnownText], changes: Sequence[Change]
) -> Iterator[list[list[int]]]:
    """Yield, for each text, the rounds under each change; the text's states are read once."""
    wanted = {tap for change in changes for tap in change.taps}
    for begin in range(0, len(texts), _AT_ONCE):
        some = texts[begin : begin + _AT_ONCE]
        found = [states.taps(text, wanted) for text in some]
        walked = [walker.rounds(some, found, change) for change in changes]
        for i, text in enumerate(some):
            yield [as_counted(text, rounds[i], change) for rounds, change in zip(walked, changes, strict=True)]


def as_counted(text: KnownText, accepted: list[int], change: Change) -> list[int]:
    """Return the rounds as a server counts them: with what it accepts behind the answer's end, if they get so far."""
    if text.beyond and text.first + sum(accepted) + len(accepted) == text.last + 1:
        return [*accepted[:-1], min(accepted[-1] + text.beyond, change.config.num_draft_tokens)]
    return accepted
