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
from dflash_offline.stages.capture.engines import vllm
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
        now, self.waiting = self.waiting[:3], self.waiting[3:]
        states = [torch.stack(layer_states(self.model, torch.tensor([ids]), self.layer_ids), 2)[0] for _, ids, _ in now]
        self.ran += len(now)
        if self.dies_after is not None and self.ran > self.dies_after:
            raise RuntimeError("cancelled\nworker 0 died")
        if self.gives_states:
            self.ended = [(begin, state) for (_, _, begin), state in zip(now, self.change(states), strict=True)]
        spoilt = [0] if self.other_ids else []
        return [SimpleNamespace(request_id=name, prompt_token_ids=[*ids, *spoilt]) for name, ids, _ in now]


def pretend(monkeypatch: pytest.MonkeyPatch, shift: int = 0, **settings: Any) -> list[PretendedEngine]:
    """Put the stand-in where vLLM would be started, its layers off by `shift`; returns the engines as they start."""
    engines: list[PretendedEngine] = []

    def start(config: ExtractConfig, target: ChosenTarget, path: str) -> EngineLoop:
        model = load_model(open_target(config.target), dtype=torch.float32, device=torch.device("cpu"))
        named: Sequence[int] = vllm.engine_arguments(config, target)["speculative_config"]["draft_model_config"][
            "hf_config"
        ]["eagle_aux_hidden_state_layer_ids"]
        delivered: SimpleQueue[int] = SimpleQueue()
        layers = [layer - 1 + shift for layer in named]
        engine = PretendedEngine(model, layers, SharedMemory(path), delivered, **settings)
        engines.append(engine)
        return EngineLoop(engine, delivered, lambda begin: begin)

    monkeypatch.setattr(vllm, "start_engine", start)
    return engines
