"""A stand-in for vLLM as it continues token ids, where none is installed: steps in no order, transformers behind it."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dflash_offline.stages.answers import engine
from dflash_offline.stages.capture.engines.generation import Generator
from dflash_offline.stages.target.files import open_target
from dflash_offline.stages.target.model import load_model


@dataclass
class PretendedGenerator:
    """Gives each of a few sequences one more token a step."""

    model: Any
    dies_after: int | None = None
    """Sequences after whose end it raises."""
    change: Callable[[Any], None] = lambda output: None
    """Spoils what is given back of a sequence that ended."""
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: of each sequence that was added."""
    most_at_once: int = 0
    num_ended: int = 0
    was_shut: bool = False
    open: dict[str, tuple[list[int], list[int], torch.Generator]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.engine_core = SimpleNamespace(shutdown=lambda: setattr(self, "was_shut", True))

    def add_request(self, name: str, prompt: dict[str, list[int]], parameters: dict[str, Any]) -> None:
        assert name not in self.parameters, "vLLM refuses a name that it has had"
        self.parameters[name] = parameters
        generator = torch.Generator().manual_seed(parameters.get("seed", 0))
        self.open[name] = (prompt["prompt_token_ids"], [], generator)
        self.most_at_once = max(self.most_at_once, len(self.open))

    def step(self) -> list[Any]:
        names = [*self.open]
        random.Random(len(names) + self.num_ended).shuffle(names)
        return [self._output(name) for name in names[:3]]

    @torch.inference_mode()
    def _output(self, name: str) -> Any:
        ids, new, generator = self.open[name]
        asked = self.parameters[name]
        logits = self.model(input_ids=torch.tensor([[*ids, *new]]), use_cache=False).logits[0, -1]
        if asked["temperature"]:
            shares = torch.softmax(logits / asked["temperature"], dim=-1)
            new.append(int(torch.multinomial(shares, 1, generator=generator)))
        else:
            new.append(int(logits.argmax()))
        stops = new[-1] in asked["stop_token_ids"]
        reason = "stop" if stops else "length" if len(new) == asked["max_tokens"] else None
        output = SimpleNamespace(
            request_id=name,
            prompt_token_ids=[*ids],
            finished=reason is not None,
            outputs=[SimpleNamespace(token_ids=tuple(new), finish_reason=reason)],
        )
        if output.finished:
            del self.open[name]
            self.num_ended += 1
            if self.dies_after is not None and self.num_ended > self.dies_after:
                raise RuntimeError("cancelled\nworker 0 died")
            self.change(output)
        return output


def pretend_to_answer(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[PretendedGenerator]:
    """Put the stand-in where vLLM would be started to answer; returns the engines as they start."""
    engines: list[PretendedGenerator] = []

    def start(config: Any, folder: Path, device: torch.device, dtype: torch.dtype, positions: int) -> Generator:
        assert positions == open_target(str(folder)).num_positions
        engines.append(PretendedGenerator(load_model(open_target(str(folder)), dtype=dtype, device=device), **settings))
        return Generator(engines[-1], dict)

    monkeypatch.setattr(engine, "start_generator", start)
    return engines
