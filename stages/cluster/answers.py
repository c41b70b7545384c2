"""Regeneration on a Ray cluster: each worker loads the target once and answers windows of rows as it is given them."""

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import torch

from dflash_offline.schemas.identity import differences, refuse_differences
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.answers.dialogues import Answer, Dialogue
from dflash_offline.stages.answers.local import LocalAnswerer, Note, window_rows
from dflash_offline.stages.cluster.connection import connected
from dflash_offline.stages.cluster.pool import Needs, Pool
from dflash_offline.stages.cluster.shards import gpus_of_worker
from dflash_offline.stages.cluster.tasks import Tasks
from dflash_offline.stages.cluster.worker import Given, Tell
from dflash_offline.stages.progress import Progress, Silent
from dflash_offline.stages.target.model import quiet_libraries


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a worker needs to begin."""

    config: RegenerateConfig
    identity: dict[str, Any]
    """What decides the answers, as the command sees it."""
    threads: int
    """Of a target on a CPU: on their number the last bits of its logits depend."""


class ClusterAnswerer:
    """Answers dialogues with the target on a cluster's nodes; the windows are those of one process.

    The command alone reads the data, adds the answers and keeps them. A window whose worker is lost is sent again with
    the answers that had come.
    """

    def __init__(self, config: RegenerateConfig, progress: Progress) -> None:
        self.config = config
        self.progress = progress
        self._local = LocalAnswerer(config, progress)

    def identity(self) -> dict[str, Any]:
        """Return what decides the answers: what does in one process."""
        return self._local.identity()

    def origin(self) -> dict[str, Any]:
        """Return what is recorded of the target and never compared."""
        return self._local.origin()

    def answer(self, dialogues: Iterable[Dialogue], note: Note, num_open: int) -> None:
        """Answer every open turn of the dialogues, and note the answers batch by batch as they come."""
        if not num_open:
            return
        config, device = self.config, self._local.device
        assert config.ray is not None
        job = _Windows(dialogues, window_rows(config), note)
        gpus = gpus_of_worker(config, device)
        needs = Needs(
            cpus=1 if gpus else torch.get_num_threads(),
            gpus=gpus,
            least=config.workers_min,
            most=config.workers_max or num_open,
        )
        settings = _Settings(
            config=replace(config, device=device.type), identity=self.identity(), threads=torch.get_num_threads()
        )
        with connected(config.ray) as ray:
            Pool(
                ray=ray,
                do=do_windows,
                config=settings,
                needs=needs,
                tasks=Tasks(job.numbers()),
                job=job,
                progress=self.progress,
            ).run()


class _Windows:
    """Windows of rows, and what the command hears of their answers."""

    what, unit = "windows of rows", "answers"

    def __init__(self, dialogues: Iterable[Dialogue], num_rows: int, note: Note) -> None:
        self._rows = iter(dialogues)
        self._num_rows = num_rows
        self._note = note
        self._windows: dict[int, list[Dialogue]] = {}
        """Those that are under way."""

    def numbers(self) -> Iterator[int]:
        """Yield the number of each window that has an open turn, read when it is asked for."""
        for number in count():
            window = list(islice(self._rows, self._num_rows))
            if not window:
                return
            if any(dialogue.is_open for dialogue in window):
                self._windows[number] = window
                yield number

    def task(self, number: int) -> list[Dialogue]:
        """Return a window's dialogues with the answers so far."""
        return self._windows[number]

    def progress(self, worker: int, count: int) -> None:
        """Answers are told of one by one."""

    def hear(self, worker: int, task: int, *values: Any) -> None:
        """Add answers, each with its place in the window, and note them."""
        answered: list[tuple[int, Answer]] = values[0]
        noted = [(self._windows[task][place], answer) for place, answer in answered]
        for dialogue, answer in noted:
            dialogue.add(answer)
        self._note(noted)

    def finish(self, worker: int, task: int, *values: Any) -> int:
        """Forget a window; returns the answers that its last worker gave."""
        del self._windows[task]
        return int(values[0])

    def lose(self, worker: int) -> None:
        """What a lost worker had told is kept."""


def do_windows(settings: _Settings, tasks: Given, tell: Tell) -> None:
    """Answer the windows that this worker is given, once its target is loaded."""
    quiet_libraries()
    answerer = LocalAnswerer(settings.config, Silent())
    refuse_differences(
        f"The target on {socket.gethostname()} is not the one that the command sees",
        differences(settings.identity, answerer.identity()),
        ("command", "here"),
        "Let every node have the same files.",
    )
    torch.set_num_threads(settings.threads)
    answerer.load()
    for task in tasks:
        if task is not None:
            _answer(answerer, *task, tell)


def _answer(answerer: LocalAnswerer, number: int, window: list[Dialogue], tell: Tell) -> None:
    """Answer a window, and tell of each answer by its dialogue's place in it."""
    places = {dialogue.index: place for place, dialogue in enumerate(window)}
    num_answers = 0

    def note(answered: list[tuple[Dialogue, Answer]]) -> None:
        nonlocal num_answers
        num_answers += len(answered)
        tell("result", number, [(places[dialogue.index], answer) for dialogue, answer in answered])

    answerer.answer_window(window, note)
    tell("finished", number, num_answers)
