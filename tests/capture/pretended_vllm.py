"""A stand-in for vLLM where none is installed: the same steps and traps, with transformers' own states behind them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.engines import states
from dflash_offline.stages.capture.engines.loop import EngineLoop
from dflash_offline.stages.capture.engines.shared_memory import SharedMemory
from dflash_offline.stages.capture.inputs import ChosenTarget
from dflash_offline.stages.target.files import open_target
from dflash_offline.stages.target.model import layer_states, load_model


@dataclass
class PretendedEngine:
    """Runs a few requests a step, in no order, and hands their states over a step after it ended them."""

    model: Any
    layer_ids: list[int]
    memory: SharedMemory
    delivered: "SimpleQueue[int]"
    change: Callable[[list[Tensor]], list[Tensor]] = lambda states: states
    """Changes the states [T, L, H] of the requests of a step."""
    dies_after: int | None = None
    """Requests after which it raises."""
    gives_states: bool = True
    scale: float = 1.0
    """What the embedding is multiplied by before layer 0."""
    named: list[int] = field(default_factory=list)
    """Layers that it was asked for, before any shift."""
    max_num_seqs: int = 3
    other_ids: bool = False
    waiting: list[tuple[str, list[int], int]] = field(default_factory=list)
    ended: list[tuple[int, Tensor]] = field(default_factory=list)
    ran: int = 0
    was_shut: bool = False

    def __post_init__(self) -> None:
        self.engine_core = SimpleNamespace(shutdown=lambda: setattr(self, "was_shut", True))

    def add_request(self, request_id: str, prompt: dict[str, list[int]], begin: int) -> None:
        self.waiting.append((request_id, prompt["prompt_token_ids"], begin))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def reset_prefix_cache(self) -> None:
        assert not self.waiting

    def step(self) -> list[Any]:
        for begin, state in self.ended:
            self.memory.view(begin, state.shape, state.dtype).copy_(state)
            self.delivered.put(begin)
        self.ended = []
        random.Random(self.ran).shuffle(self.waiting)
        now, self.waiting = self.waiting[: self.max_num_seqs], self.waiting[self.max_num_seqs :]
        states = [self._states(ids) for _, ids, _ in now]
        self.ran += len(now)
        if self.dies_after is not None and self.ran > self.dies_after:
            raise RuntimeError("cancelled\nworker 0 died")
        if self.gives_states:
            self.ended = [(begin, state) for (_, _, begin), state in zip(now, self.change(states), strict=True)]
        spoilt = [0] if self.other_ids else []
        return [
            SimpleNamespace(
                request_id=name,
                prompt_token_ids=[*ids, *spoilt],
                outputs=[SimpleNamespace(token_ids=[token], cumulative_logprob=log_probability)],
            )
            for name, ids, _ in now
            for token, log_probability in [self._drawn(ids)]
        ]

    def _states(self, ids: list[int]) -> Tensor:
        """Return states, [T, L, H]; the output of layer -1 is the embedding."""
        wanted = [layer for layer in self.layer_ids if layer >= 0]
        found = dict(zip(wanted, layer_states(self.model, torch.tensor([ids]), wanted), strict=True))
        found[-1] = self.model.get_input_embeddings()(torch.tensor([ids])) * self.scale
        return torch.stack([found[layer][0] for layer in self.layer_ids], 1)

    @torch.inference_mode()
    def _drawn(self, ids: list[int]) -> tuple[int, float]:
        """Return the likeliest next token and its log-probability, which only a second layout's proof looks at."""
        if -1 not in self.named:
            return 0, 0.0
        log_probability, token = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(0).max(0)
        return int(token), float(log_probability)


def pretend(monkeypatch: pytest.MonkeyPatch, shift: int = 0, **settings: Any) -> list[PretendedEngine]:
    """Put the stand-in where vLLM would be started, its layers off by `shift`; returns the engines as they start."""
    engines: list[PretendedEngine] = []

    def start(config: ExtractConfig, target: ChosenTarget, path: str) -> EngineLoop:
        files = open_target(config.target, by_transformers=False)
        model = load_model(files, dtype=torch.float32, device=torch.device("cpu"))
        arguments = states.engine_arguments(config, target)
        asked: Sequence[int] = arguments["speculative_config"]["draft_model_config"]["hf_config"][
            "eagle_aux_hidden_state_layer_ids"
        ]
        named = [layer - 1 for layer in asked]
        layers = [min(layer + shift, files.num_layers - 1) for layer in named]
        engine = PretendedEngine(
            model,
            layers,
            SharedMemory(path),
            SimpleQueue(),
            named=named,
            max_num_seqs=min(arguments["max_num_seqs"], 3),
            **settings,
        )
        engines.append(engine)
        return EngineLoop(engine, engine.delivered, lambda begin, is_told: begin)

    monkeypatch.setattr(states, "start_engine", start)
    return engines
