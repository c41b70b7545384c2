"""Every order in which several processes' requests can reach a bucket, each process the real code over a model of it.

The model is obstore's store in memory; one request is one step. A process is a function in a thread of its own that
waits before each request until the schedule lets it go on. What it does next follows from what it was answered so far,
so that a state is the bucket's content and each process's answers: states that were seen before are not gone on from.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import obstore
from obstore.store import MemoryStore

from dflash_offline.stages.buckets.bucket import Bucket

Content = dict[str, bytes]
Process = Callable[[Bucket], object]


def content_of(store: MemoryStore) -> Content:
    """Return every object of a store in memory."""
    pages = obstore.list(store)
    return {one["path"]: bytes(obstore.get(store, one["path"]).bytes()) for page in pages for one in page}


def filled(content: Content) -> MemoryStore:
    """Return a store in memory with these objects."""
    store = MemoryStore()
    for name, value in content.items():
        obstore.put(store, name, value)
    return store


class Stepped(Bucket):
    """A bucket whose every request waits for `go`, and notes its answer."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__("s3://model/cache", store)
        self.answers: list[object] = []
        self.error: BaseException | None = None
        self.result: object = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._killed = False
        self.ended = False

    def start(self, process: Process) -> None:
        """Let the process run to its first request."""
        threading.Thread(target=self._run, args=(process,), daemon=True).start()
        assert self._stopped.acquire(timeout=60)

    def step(self) -> None:
        """Let it make one request and run to the next one, or to its end."""
        self._go.release()
        assert self._stopped.acquire(timeout=60)

    def kill(self) -> None:
        """End it where it stands: no request of it is made any more."""
        self._killed = True
        if not self.ended:
            self.step()

    def _run(self, process: Process) -> None:
        try:
            self.result = process(self)
        except BaseException as error:
            self.error = error
        self.ended = True
        self._stopped.release()

    def _asked(self, name: str, ask: Callable[[Any], Any]) -> Any:
        if self._killed:  # another thread of the process
            raise SystemExit
        self._stopped.release()
        self._go.acquire()
        if self._killed:
            raise SystemExit
        answer = super()._asked(name, ask)
        if isinstance(answer, dict):  # a list of names with (bytes, time), or what a put says, whose tags count
            answer_kept = sorted((each, found[0]) for each, found in answer.items()) if "e_tag" not in answer else "put"
        else:
            answer_kept = bytes(answer) if isinstance(answer, bytes | obstore.Bytes) else answer
        self.answers.append(answer_kept if isinstance(answer_kept, bytes) else repr(answer_kept))
        return answer


@dataclass
class State:
    """Where all processes stand after some steps."""

    content: Content
    processes: list[Stepped]
    steps: list[int] = field(default_factory=list)
    """Which process made each."""

    @property
    def key(self) -> object:
        """What decides everything that can follow."""
        return tuple(sorted(self.content.items())), tuple(tuple(process.answers) for process in self.processes)


def states(content: Content, processes: list[Process]) -> Iterator[State]:
    """Yield every state that can be reached from a bucket's content, each once, its processes where they stand."""
    seen: set[object] = set()
    waiting: list[list[int]] = [[]]
    while waiting:
        prefix = waiting.pop()
        store = filled(content)
        state = State(content, [Stepped(store) for _ in processes])
        for stepped, process in zip(state.processes, processes, strict=True):
            stepped.start(process)
        try:
            for number in prefix:
                state.processes[number].step()
            state.steps = [*prefix]
            while True:
                state.content = content_of(store)
                if state.key in seen:
                    break
                seen.add(state.key)
                yield state
                alive = [number for number, stepped in enumerate(state.processes) if not stepped.ended]
                if not alive:
                    break
                waiting += [[*state.steps, number] for number in alive[1:]]
                state.processes[alive[0]].step()
                state.steps.append(alive[0])
        finally:
            for stepped in state.processes:
                stepped.kill()


def alone(content: Content, process: Process) -> tuple[Content, Stepped]:
    """Return what a process that nobody disturbs leaves of a bucket's content, and how it ended."""
    store = filled(content)
    stepped = Stepped(store)
    stepped.start(process)
    while not stepped.ended:
        stepped.step()
    return content_of(store), stepped


def written(folder: Path) -> Content:
    """Return every file of a folder by its path within."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
