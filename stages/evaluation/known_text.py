"""The rounds in which a draft would have decoded a text that is known, from the target's states over it.

Axes: S positions of a text, K block size, H hidden size, L layers read.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.stages.draft.decode import plain_decode
from dflash_offline.stages.draft.model import DraftCache, DraftModel
from dflash_offline.stages.evaluation.changes import EMBEDDING, Change
from dflash_offline.stages.evaluation.samples import EvalSamples
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.training.simulated_serving import turns

Counts = NDArray[np.float64]
"""Of rounds: how many there were, and how many accepted at least 1, 2, ... of their drafted tokens."""


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
        self.foreign: list[str] = []
        """Places of the texts whose answer has a token that the target would not choose, rounding aside."""

    @torch.inference_mode()
    def taps(self, text: KnownText, wanted: Collection[int]) -> Mapping[int, Tensor]:
        """Return the states of one forward, whose logits judge the answer."""
        ids = torch.tensor([text.ids], device=self._target.device)
        kept = len(text.ids) - text.first + 1
        output = self._target(ids, use_cache=False, output_hidden_states=True, logits_to_keep=kept)
        logits = output.logits[0, : text.last - text.first + 1].float()
        chosen = logits.gather(1, ids[0, text.first : text.last + 1, None])[:, 0]
        # 4 units in the last place of bfloat16, whatever the server computes in.
        rounding = 4 * torch.finfo(torch.bfloat16).eps * logits.abs().amax(dim=1)
        if bool((logits.amax(dim=1) - chosen > rounding).any()):
            self.foreign.append(text.place)
        return {tap: output.hidden_states[tap + 1][0] for tap in wanted}


def cached_texts(chosen: EvalSamples) -> list[KnownText]:
    """Return every assistant turn of the samples that a round could follow, after what stands before it."""
    table = chosen.cache.samples
    return [
        KnownText(
            place=f"{table.place(i)}, position {first}",
            ids=table.input_ids(i)[: last + 1].tolist(),
            first=first,
            last=last,
            sample=i,
        )
        for i in chosen.samples.tolist()
        for first, last in turns(table.loss_mask(i))
        if 0 < first < last
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
    def rounds(self, text: KnownText, states: Mapping[int, Tensor], change: Change) -> list[int]:
        """Return how many drafted tokens each round accepts under a change, those behind the answer's end included."""
        draft, block = run_as(self._draft, change.config), change.config.block_size
        features = torch.cat([states[tap] for tap in change.taps], dim=-1)[None].to(self._table.dtype)
        ids = torch.full((block,), change.config.mask_token_id, device=self._table.device)
        cache, held, anchor, accepted = DraftCache(), 0, text.first, list[int]()
        while anchor < text.last:
            ids[0] = text.ids[anchor]
            end = anchor + change.sees_anchor
            positions = torch.cat((torch.arange(held, end), torch.arange(anchor, anchor + block)))
            hidden = draft(
                position_ids=positions[None].to(self._table.device),
                noise_embedding=self._table[ids][None],
                target_hidden=features[:, held:end],
                past_key_values=cache,
            )
            cache.crop(end)
            held = end
            drafted = self._head(hidden[0, 1:]).argmax(dim=-1).tolist()
            known = text.ids[anchor + 1 : anchor + block]
            accepted.append(next((i for i, token in enumerate(known) if drafted[i] != token), len(known)))
            anchor += accepted[-1] + 1
        if accepted and anchor - 1 == text.last and len(text.ids) == text.last + 1:
            accepted[-1] = min(accepted[-1] + text.beyond, block - 1)
        return accepted


def run_as(draft: DraftModel, config: DraftConfig) -> DraftModel:
    """Return the same weights, run by another config."""
    other = copy.copy(draft)
    other.config = config
    return other


def count_rounds(accepted: Sequence[int], num_slots: int) -> Counts:
    """Return how many rounds there are, and how many of them accepted at least 1 to `num_slots` tokens."""
    found = np.asarray(accepted)
    return np.array([len(found), *((found >= slot).sum() for slot in range(1, num_slots + 1))], dtype=float)


def walk_all(
    walker: Walker, states: States, texts: Sequence[KnownText], changes: Sequence[Change]
) -> Iterator[list[list[int]]]:
    """Yield, for each text, the rounds under each change; the text's states are read once."""
    wanted = {tap for change in changes for tap in change.taps}
    for text in texts:
        found = states.taps(text, wanted)
        yield [walker.rounds(text, found, change) for change in changes]
