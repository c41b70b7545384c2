"""Ray as the pool of workers uses it, in this process: an actor is an object whose calls a thread of its own makes.

What goes to an actor and comes from it is a copy, as between processes: neither side sees the other change it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from copy import deepcopy
from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    """As Ray's own, its text is long."""


class _Method:
    def __init__(self, actor: "_Actor", name: str) -> None:
        self._actor, self._name = actor, name

    def remote(self, *arguments: Any) -> Future[Any]:
        return self._actor.call(self._name, arguments)


class _Actor:
    def __init__(self, kind: type, dies: Callable[[str], bool]) -> None:
        self._object, self._dies, self._is_dead = kind(), dies, False
        self._thread = ThreadPoolExecutor(1)

    def __getattr__(self, name: str) -> _Method:
        return _Method(self, name)

    def call(self, name: str, arguments: tuple[Any, ...]) -> Future[Any]:
        sent = deepcopy(arguments)

        def run() -> Any:
            if self._dies(name):
                self._is_dead = True
            if self._is_dead:
                raise RayError("The actor died unexpectedly.\nThe actor is dead because its node has died. Node Id: 1f")
            return None if name == "__ray_terminate__" else deepcopy(getattr(self._object, name)(*sent))

        return self._thread.submit(run)

    def end(self) -> None:
        self._is_dead = True


class PretendedRay:
    """A cluster with room for so many workers; `dies` says of each call, given the actor and the method, if it dies."""

    exceptions = SimpleNamespace(RayError=RayError)

    def __init__(self, num_cpus: int, dies: Callable[[int, str], bool] = lambda _actor, _method: False) -> None:
        self.num_cpus, self._dies, self.actors = num_cpus, dies, list[_Actor]()

    def nodes(self) -> list[dict[str, Any]]:
        states = ((True, float(self.num_cpus)), (False, 9.0))
        return [{"Alive": alive, "Resources": {"CPU": cpus}} for alive, cpus in states]

    def remote(self, kind: type) -> Any:
        def start() -> _Actor:
            number = len(self.actors)
            self.actors.append(_Actor(kind, lambda name: self._dies(number, name)))
            return self.actors[-1]

        return SimpleNamespace(options=lambda **_needs: SimpleNamespace(remote=start))

    def wait(
        self, answers: Sequence[Future[Any]], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Future[Any]], list[Future[Any]]]:
        done, _ = wait_for(answers, timeout, FIRST_COMPLETED)
        return list(done)[:num_returns], [answer for answer in answers if answer not in done]

    def get(self, answer: Future[Any]) -> Any:
        return answer.result()

    def kill(self, actor: _Actor) -> None:
        actor.end()
