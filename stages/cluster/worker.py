"""A worker: an actor of Ray that does the tasks it is given, and tells of them when it is asked.

The work has a thread of its own; the command asks by `exchange`, one call after the other, so that a worker that is
lost is an answer that does not come. Credentials come in a call from one process to the other: the settings of an actor
are kept by the cluster, and shown.
"""

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from queue import Empty, SimpleQueue
from typing import Any

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.secrets import environment_secrets
from dflash_offline.stages.cores import share_cores

Event = tuple[Any, ...]
"""What a worker tells: a kind, and what belongs to it."""
Given = Iterator[tuple[int, Any] | None]
"""Tasks as they come, each a number and what is to be known of it; None from time to time while there is none."""
Tell = Callable[..., None]
Do = Callable[[Any, Given, Tell], None]
"""Does tasks with a command's settings, and tells of them; returns when no more are to come."""
PROGRESS = "progress"
"""Kind of the event that counts what was done since the last one, which needs no prompt answer."""
_TICK_S = 0.2
_REPLY_S = 1.0
"""Seconds in which a worker answers, whatever there is to tell."""


class Worker:
    """One worker of a cluster. Ray calls its methods one after the other."""

    def __init__(self) -> None:
        self._given: SimpleQueue[tuple[int, Any] | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._events: list[Event] = []
        self._progress = 0

    def prepare(self, environment: dict[str, str], sharing: int) -> None:
        """Take the command's environment, before anything is imported that reads it, as one of so many workers here."""
        os.environ |= environment
        share_cores(sharing)

    def begin(self, do: Do, config: Any, release: str) -> None:
        """Start the work."""
        threading.Thread(target=self._work, args=(do, config, release), daemon=True).start()

    def exchange(self, tasks: Sequence[tuple[int, Any] | None]) -> list[Event]:
        """Take more tasks, None if no more are to come; returns what there is to tell, at the latest in a second."""
        for task in tasks:
            self._given.put(task)
        with self._changed:
            self._changed.wait_for(lambda: self._events, timeout=_REPLY_S)
            events, self._events = self._events, []
            if self._progress:
                events.insert(0, (PROGRESS, self._progress))
                self._progress = 0
        return events

    def _tell(self, kind: str, *values: Any) -> None:
        with self._changed:
            if kind == PROGRESS:
                self._progress += values[0]
                return
            self._events.append((kind, *values))
            self._changed.notify()

    def _work(self, do: Do, config: Any, release: str) -> None:
        from dflash_offline.stages.capture.workers import as_fault

        self._tell("host", socket.gethostname())
        try:
            _refuse_other_release(release)
            do(config, self._tasks(), self._tell)
        except Exception as error:
            fault = as_fault(error, "--workers-max")
            if isinstance(fault, DflashError):
                fault = DflashError(environment_secrets().masked(str(fault)))
            self._tell("fault", fault)
        else:
            self._tell("ended")

    def _tasks(self) -> Given:
        """Yield tasks until no more are to come; to be asked first when all is loaded that they need."""
        self._tell("ready")
        while True:
            try:
                task = self._given.get(timeout=_TICK_S)
            except Empty:
                yield None
                continue
            if task is None:
                return
            self._tell("begun", task[0])
            yield task


def _refuse_other_release(release: str) -> None:
    if (here := version("dflash-offline")) != release:
        raise DflashError(
            f"dflash-offline {here} is installed here, and the command is of {release}. Install the same on every node."
        )
