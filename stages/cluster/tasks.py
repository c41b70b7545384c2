"""Which tasks are left, who has which, and which are given up: kept by the command alone, without Ray."""

import time
from collections import deque
from collections.abc import Iterable

AHEAD = 2
"""Tasks that wait at a worker, so that it goes on without asking."""
_PAUSE_S = 1.0
"""Seconds for which a task is not given again that somebody else holds."""
_DIED, _SAID = 1, 2
"""What it counts against a task if its worker dies over it, for nodes vanish; and if the worker says what is wrong."""
_MOST = 4
"""Count at which a task is given up, so that a task that kills its workers does not kill all of them."""


class Tasks:
    """Tasks, each a number, given to workers and taken back from those that are lost."""

    def __init__(self, numbers: Iterable[int]) -> None:
        """`numbers` are asked for as workers are free for them."""
        self._coming = iter(numbers)
        self._back: deque[int] = deque()
        """Tasks of lost workers; they go before those to come."""
        self._paused: deque[tuple[float, int]] = deque()
        self._waiting: dict[int, list[int]] = {}
        """For each worker the tasks that it has and has not begun."""
        self._begun: dict[int, set[int]] = {}
        self._against: dict[int, int] = {}
        self._are_all_given = False
        self.given_up: list[int] = []

    def give(self, worker: int) -> list[int]:
        """Return tasks that are the worker's from now on: as many as may wait there, and a suspect one alone."""
        waiting, begun = self._waiting.setdefault(worker, []), self._begun.setdefault(worker, set())
        given: list[int] = []
        while len(waiting) < AHEAD and not any(task in self._against for task in (*waiting, *begun)):
            task = self._next(alone=not waiting and not begun)
            if task is None:
                break
            waiting.append(task)
            given.append(task)
        return given

    def _next(self, *, alone: bool) -> int | None:
        while self._paused and self._paused[0][0] <= time.monotonic():
            self._back.append(self._paused.popleft()[1])
        for _ in range(len(self._back)):
            task = self._back.popleft()
            if alone or task not in self._against:
                return task
            self._back.append(task)
        coming = next(self._coming, None)
        self._are_all_given = coming is None
        return coming

    def begin(self, worker: int, task: int) -> None:
        """Note that a worker has begun a task."""
        self._waiting[worker].remove(task)
        self._begun[worker].add(task)

    def finish(self, worker: int, task: int) -> None:
        """Note that a task is done."""
        self._begun[worker].discard(task)
        self._against.pop(task, None)

    def put_off(self, worker: int, task: int) -> None:
        """Take back a task that somebody else holds, who may finish it."""
        self._begun[worker].discard(task)
        self._paused.append((time.monotonic() + _PAUSE_S, task))

    def lose(self, worker: int, *, said: bool) -> None:
        """Take back a worker's tasks; those it had begun are suspect of what has ended it, which it may have said."""
        for task in sorted(self._begun.pop(worker, set())):
            self._against[task] = self._against.get(task, 0) + (_SAID if said else _DIED)
            if self._against[task] >= _MOST:
                self.given_up.append(task)
            else:
                self._back.append(task)
        self._back.extend(self._waiting.pop(worker, []))

    @property
    def is_over(self) -> bool:
        """Whether every task is done or given up."""
        return not self.has_free and not any(self._waiting.values()) and not any(self._begun.values())

    @property
    def has_free(self) -> bool:
        """Whether there may be tasks that no worker has."""
        return not self._are_all_given or bool(self._back or self._paused)
