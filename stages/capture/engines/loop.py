"""vLLM's engine, stepped in a thread of its own for as long as there are requests; states are handed over meanwhile."""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from dflash_offline.schemas.errors import DflashError
from dflash_offline.stages.capture.engines.start import engine_fault

LESS_MEMORY = "lower --batch-tokens or --max-length in a new --out"
_IDLE_STEPS = 10_000
"""Steps without a request to run and without states, after which they will not come any more."""


@dataclass(frozen=True)
class Request:
    """Token ids to be run, and where their states go."""

    ids: list[int]
    begin: int
    """In bytes of the shared memory."""
    done: Callable[[BaseException | None], None]
    """Called once, in the engine's thread: when the states are there, or with what went wrong."""
    drawn: Callable[[tuple[int, float]], None] | None = None
    """Called before that, with the token that the engine takes for the likeliest behind them, and its log-probability.

    Only where somebody asks for it: the engine computes it then.
    """


class EngineLoop:
    """Runs requests; they may be given from any thread."""

    def __init__(self, engine: Any, delivered: "SimpleQueue[int]", parameters: Callable[[int, bool], Any]) -> None:
        """`parameters` makes vLLM's sampling parameters, for where a request's states go and whether its draw is told.

        The engine is built.
        """
        self._engine = engine
        self._delivered = delivered
        self._parameters = parameters
        self._asked: SimpleQueue[Sequence[Request] | None] = SimpleQueue()
        self._open: dict[int, Request] = {}
        self._number = 0
        self._fault: DflashError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, which the engine batches as it likes."""
        self._asked.put(requests)

    def forget_prefixes(self) -> None:
        """Have the engine compute all of the next samples; to be called where no request is open."""
        self._engine.reset_prefix_cache()

    def close(self) -> None:
        """End the thread after its step, and the engine; requests that are open never end."""
        self._asked.put(None)
        self._thread.join()
        with suppress(Exception):  # of an engine that is dead already
            self._engine.engine_core.shutdown()

    def _run(self) -> None:
        while True:
            asked = self._asked.get()
            try:
                while asked is not None:
                    self._add(asked)
                    self._step_until_asked()
                    asked = self._asked.get()
                return
            except Exception as error:
                self._fail(error)

    def _step_until_asked(self) -> None:
        """Step until no request is open, or others are waiting to be added."""
        idle = 0
        while self._open and self._asked.empty():
            for output in self._engine.step():
                self._take(output)
            idle = idle + 1 if not self._engine.has_unfinished_requests() else 0
            while True:
                try:
                    begin = self._delivered.get_nowait()
                except Empty:
                    break
                self._open.pop(begin).done(None)
                idle = 0
            if idle > _IDLE_STEPS:
                raise DflashError(f"vLLM ran {len(self._open)} samples and handed over no states of theirs.")

    def _add(self, requests: Sequence[Request]) -> None:
        if self._fault is not None:
            for request in requests:
                request.done(self._fault)
            return
        for request in requests:
            self._open[request.begin] = request
        for request in requests:
            self._number += 1
            # The id says where the states go, and is no other request's, even of one with the same place.
            name = f"{request.begin}.{self._number}"
            parameters = self._parameters(request.begin, request.drawn is not None)
            self._engine.add_request(name, {"prompt_token_ids": request.ids}, parameters)

    def _take(self, output: Any) -> None:
        """Pass on what was drawn; `DflashError` unless the token ids that come back are those that were sent."""
        request = self._open[int(output.request_id.split(".")[0])]
        if list(output.prompt_token_ids) != request.ids:
            raise DflashError("vLLM ran other token ids than it was given, so its states are another text's.")
        (answer,) = output.outputs
        if request.drawn is not None:
            request.drawn((int(answer.token_ids[0]), float(answer.cumulative_logprob)))

    def _fail(self, error: Exception) -> None:
        self._fault = (
            error if isinstance(error, DflashError) else engine_fault(error, "Finished shards are kept", LESS_MEMORY)
        )
        for request in self._open.values():
            request.done(self._fault)
        self._open.clear()
