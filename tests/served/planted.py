"""Servers of our own that go wrong with a draft in one way, decoding as plainly as can be."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from live_server import Decoded

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.stages.draft.decode import plain_decode
from dflash_offline.stages.draft.model import DraftModel

FAULTS: dict[str, Callable[[DraftConfig], DraftConfig]] = {
    "healthy": lambda config: config,
    "ids + 1": lambda config: replace(config, target_layer_ids=tuple(i + 1 for i in config.target_layer_ids)),
    "ids - 1": lambda config: replace(config, target_layer_ids=tuple(i - 1 for i in config.target_layer_ids)),
    "mask token": lambda config: replace(config, mask_token_id=2),
    "causal": lambda config: replace(config, causal_layers="all"),
    "rotary base": lambda config: replace(config, rope_theta=config.rope_theta * 100),
    "block of K + 2": lambda config: replace(config, block_size=config.block_size + 2),
    "anchor": lambda config: config,
}


@dataclass
class PlantedServer:
    """Decodes greedily, everything computed anew in each round; give its `decode` to a `LiveServer`."""

    target: Any
    draft: DraftModel
    fault: str
    stops: frozenset[int]
    render: Callable[[list[dict[str, str]]], list[int]] | None = None
    """The tokens of messages."""

    def __post_init__(self) -> None:
        self._config = FAULTS[self.fault](self.draft.config)
        self._draft = DraftModel(self._config).eval()
        self._draft.load_state_dict(self.draft.state_dict())

    def decode(self, request: dict[str, Any]) -> Decoded:
        """Return the answer to a request and its rounds; beyond the answer's end the target goes on as it would."""
        ids = request.get("prompt")
        if ids is None:
            assert self.render is not None
            ids = self.render(request["messages"])
        answer = plain_decode(self.target, ids, request["max_tokens"], self.stops).tokens
        text = [*ids, *answer]
        text += plain_decode(self.target, text, 16, ()).tokens
        end, accepted, rounds = len(ids) + len(answer) - 1, [], [answer[:1]]
        start = len(ids)
        while start < end:
            accepted.append(self._accepted(text, start))
            stop = min(start + accepted[-1] + 2, end + 1)
            rounds.append(text[start + 1 : stop])
            start = stop - 1
        return Decoded(rounds, accepted, ids)

    @torch.inference_mode()
    def _accepted(self, text: list[int], start: int) -> int:
        """Return how many tokens of a block after the token at `start` are those of the text."""
        config, draft = self._config, self._draft
        end = start + (self.fault == "anchor")
        states = self.target(torch.tensor([text[:end]]), output_hidden_states=True).hidden_states
        block = torch.full((1, config.block_size), config.mask_token_id)
        block[0, 0] = text[start]
        hidden = draft(
            position_ids=torch.cat((torch.arange(end), start + torch.arange(config.block_size)))[None],
            noise_embedding=self.target.get_input_embeddings()(block),
            target_hidden=torch.cat([states[i + 1] for i in config.target_layer_ids], dim=-1),
        )
        drafted = self.target.get_output_embeddings()(hidden)[0, 1:].argmax(dim=-1).tolist()
        number = 0
        while number < len(drafted) and drafted[number] == text[start + 1 + number]:
            number += 1
        return number
