"""The workers of a command on a Ray cluster: started as there is room, given tasks, heard, and replaced.

The command alone knows which tasks are left; a worker that is lost, with its node or alone, gives its tasks back.
"""

import math
import re
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Protocol

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.secrets import environment_secrets
from dflash_offline.stages.capture.workers import as_one, fault_message
from dflash_offline.stages.cluster.connection import environment, living, resources, room
from dflash_offline.stages.cluster.tasks import Tasks
from dflash_offline.stages.cluster.worker import PROGRESS, Do, Worker
from dflash_offline.stages.progress import Progress

_LOOK_S = 2.0
"""Seconds between two looks at the cluster's nodes."""
_NO_ROOM_S = 10.0
"""Seconds without a worker after which it is said what they wait for."""
_FAILED_STARTS = 3
"""Workers in a row that end before they are ready, after which no more are started."""
_END_S = 30.0
"""Seconds in which workers end by themselves when all is done."""
_SHOWN_TASKS = 10
_RATES = 16
"""Workers whose rates are shown; of more, the slowest."""
_WHY = re.compile(r"((?:is dead|died|failed) because.*?|was killed.*?|failed to import.*?)(?:\.\s|\n|$)", re.DOTALL)


class Job(Protocol):
    """What a command has workers do; it hears of it in the command's own thread."""

    what: str
    """What tasks are."""
    unit: str
    """What is counted of them."""

    def task(self, number: int) -> Any:
        """Return what a worker has to know of a task, beside its number."""

    def progress(self, worker: int, count: int) -> None:
        """Hear that so much more is done of a task that is not finished yet."""

    def hear(self, worker: int, task: int, *values: Any) -> None:
        """Hear of some of a task's results."""

    def finish(self, worker: int, task: int, *values: Any) -> int:
        """Hear that a task is finished; returns its units."""

    def lose(self, worker: int) -> None:
        """Hear that a worker is lost: what it has done of unfinished tasks is done again."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a command asks of a cluster."""

    cpus: int
    gpus: int
    """Of each worker."""
    least: int
    """Workers that are asked for though there is no room for them yet."""
    most: int
    """Workers that are of use, or allowed."""


@dataclass(kw_only=True)
class _Member:
    """A worker, as the command knows it."""

    number: int
    actor: Any
    asked: Any
    """Ray's reference to the answer that it owes."""
    host: str = "a node that never answered"
    ready: float | None = None
    """When it was ready to work, in seconds of `perf_counter`."""
    heard: float = 0.0
    """When it last finished a task."""
    tasks: int = 0
    units: int = 0
    is_told_to_end: bool = False

    @property
    def name(self) -> str:
        return f"Worker {self.number} on {self.host}"

    @property
    def rate(self) -> float:
        """Units a second, from when it was ready to when it last finished a task."""
        return self.units / max(self.heard - (self.ready or 0.0), 1e-9)


@dataclass(kw_only=True)
class Pool:
    """Workers that do tasks."""

    ray: Any
    do: Do
    config: Any
    needs: Needs
    tasks: Tasks
    job: Job
    progress: Progress
    _members: dict[int, _Member] = field(default_factory=dict)
    _past: list[_Member] = field(default_factory=list)
    _told: list[DflashError | OSError] = field(default_factory=list)
    """What workers said was wrong."""
    _lost: list[DflashError] = field(default_factory=list)
    _failed_starts: int = 0
    _looked: float = -math.inf
    _is_ending: bool = False

    def run(self) -> None:
        """Have all tasks done; raises what went wrong in the workers if some are not done in the end.

        However this ends, no worker of the command is left.
        """
        deadline = time.monotonic() + _NO_ROOM_S
        try:
            while not self.tasks.is_over and not self._is_hopeless():
                self._start()
                if time.monotonic() > deadline and not self._is_any_ready():
                    self._say_what_is_waited_for()
                    deadline = math.inf
                self._listen()
            self._end()
        finally:
            for member in self._members.values():
                self.ray.kill(member.actor)
        self.progress.finish()
        self._say_rates()
        if self.tasks.given_up or not self.tasks.is_over:
            raise as_one([*self._told] or [self._given_up(), *self._lost[-_FAILED_STARTS:]])

    def _is_hopeless(self) -> bool:
        return self._failed_starts >= _FAILED_STARTS and not self._is_any_ready()

    def _is_any_ready(self) -> bool:
        return any(member.ready is not None for member in self._members.values())

    def _start(self) -> None:
        """Start as many workers as are missing and may be had; looks at the cluster from time to time."""
        if time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked, needs, nodes = time.monotonic(), self.needs, living(self.ray)
        if self._failed_starts >= _FAILED_STARTS or not self.tasks.has_free:
            return
        rooms = [room(node, needs.cpus, needs.gpus) for node in nodes]
        wanted = min(needs.most, max(needs.least, sum(rooms)))
        while len(self._members) < wanted:
            number = len(self._members) + len(self._past)
            actor = self.ray.remote(Worker).options(num_cpus=needs.cpus, num_gpus=needs.gpus).remote()
            actor.prepare.remote(environment(), max([1, *rooms]))
            actor.begin.remote(self.do, self.config, version("dflash-offline"))
            self._members[number] = _Member(number=number, actor=actor, asked=actor.exchange.remote([]))

    def _say_what_is_waited_for(self) -> None:
        needs, nodes = self.needs, living(self.ray)
        if not any(room(node, needs.cpus, needs.gpus) for node in nodes):
            asked = f"{needs.cpus} CPUs" + (f" and {needs.gpus} GPUs" if needs.gpus else "")
            have = "; ".join(map(resources, nodes)) or "there is none"
            self.progress.say(f"Waiting for a node with {asked}, which each worker takes. The cluster's nodes: {have}.")

    def _listen(self) -> None:
        """Wait for answers, hear them, and give those who answered more tasks."""
        by_answer = {member.asked: member for member in self._members.values()}
        answers, _ = self.ray.wait([*by_answer], timeout=_LOOK_S)
        if answers:  # with all others that are there by now
            answers, _ = self.ray.wait([*by_answer], num_returns=len(by_answer), timeout=0)
        for answer in answers:
            member = by_answer[answer]
            try:
                events = self.ray.get(answer)
            except self.ray.exceptions.RayError as error:
                self._lost.append(DflashError(f"{member.name} was lost: {_why(error)}."))
                self.progress.say(str(self._lost[-1]))
                self._lose(member, said=False)
                continue
            for event in events:
                self._hear(member, *event)
            if member.number in self._members:
                member.asked = member.actor.exchange.remote(self._orders(member))

    def _orders(self, member: _Member) -> list[tuple[int, Any] | None]:
        """Return the tasks that a worker is sent, or once that no more are to come."""
        if self._is_ending:
            told, member.is_told_to_end = member.is_told_to_end, True
            return [] if told else [None]
        given = [] if member.ready is None else self.tasks.give(member.number)
        return [(task, self.job.task(task)) for task in given]

    def _hear(self, member: _Member, kind: str, *values: Any) -> None:
        """Take what a worker tells."""
        number = member.number
        if kind == PROGRESS:
            self.job.progress(number, *values)
        elif kind == "host":
            member.host = values[0]
        elif kind == "ready":
            member.ready, self._failed_starts = time.perf_counter(), 0
        elif kind == "begun":
            self.tasks.begin(number, *values)
        elif kind == "held":
            self.tasks.put_off(number, *values)
        elif kind == "say":
            self.progress.say(*values)
        elif kind == "result":
            self.job.hear(number, *values)
        elif kind == "finished":
            self.tasks.finish(number, values[0])
            member.units += self.job.finish(number, *values)
            member.tasks, member.heard = member.tasks + 1, time.perf_counter()
        elif kind == "fault":
            self._told.append(values[0])
            self.progress.say(f"{member.name}: {fault_message(values[0])}")
            self._lose(member, said=True)
        else:
            assert kind == "ended", kind
            self._past.append(self._members.pop(number))

    def _lose(self, member: _Member, *, said: bool) -> None:
        """Take back what a worker had that is lost."""
        if member.ready is None:
            self._failed_starts += 1
        self.tasks.lose(member.number, said=said)
        self.job.lose(member.number)
        self._past.append(self._members.pop(member.number))
        self.ray.kill(member.actor)

    def _end(self) -> None:
        """Let the workers that are ready end by themselves, so that they clean up behind themselves."""
        deadline, self._is_ending = time.monotonic() + _END_S, True
        for member in [member for member in self._members.values() if member.ready is None]:
            self.ray.kill(self._members.pop(member.number).actor)
        ending = [*self._members.values()]
        while self._members and time.monotonic() < deadline:
            self._listen()
        gone = [member.actor.__ray_terminate__.remote() for member in ending if member.number not in self._members]
        if gone:
            self.ray.wait(gone, num_returns=len(gone), timeout=_END_S)

    def _say_rates(self) -> None:
        """Say what each worker did, of many the slowest."""
        workers = sorted((member for member in self._past if member.tasks), key=lambda member: member.rate)
        if len(workers) > _RATES:
            middle = workers[len(workers) // 2].rate
            self.progress.say(f"{len(workers)} workers: {middle:,.0f} {self.job.unit}/s in the middle. The slowest:")
        for member in sorted(workers[:_RATES], key=lambda member: member.number):
            self.progress.say(
                f"{member.name}: {member.tasks:,} {self.job.what}, {member.units:,} {self.job.unit}, "
                f"{member.rate:,.{0 if member.rate > 100 else 1}f} {self.job.unit}/s."
            )

    def _given_up(self) -> DflashError:
        """Return what to raise where workers were lost without a word."""
        if not self.tasks.given_up:
            return DflashError(f"{_FAILED_STARTS} workers in a row were lost before they could work.")
        tasks = ", ".join(map(str, sorted(self.tasks.given_up)[:_SHOWN_TASKS]))
        return DflashError(
            f"{len(self.tasks.given_up)} {self.job.what} were given up (number {tasks}): each worker that began one "
            f"was lost. What Ray says of the last ones may tell why."
        )


def _why(error: BaseException) -> str:
    """Return the reason in an error of Ray's, which is long."""
    text = str(error)
    found = _WHY.search(text)
    said = f"it {found[1]}" if found else text.strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return str(environment_secrets().masked(" ".join(said.split())))
