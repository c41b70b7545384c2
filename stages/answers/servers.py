"""Answers from OpenAI-compatible servers, many requests under way at once."""

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from dflash_offline.schemas.secrets import KEY_VARIABLE, Secrets, shown_url
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.answers.chat_completions import endpoint
from dflash_offline.stages.answers.dialogues import Dialogue
from dflash_offline.stages.answers.exchange import Client
from dflash_offline.stages.answers.server_retries import Servers
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.stop import Stopped, stops_noted

ROWS_AHEAD = 64
"""Rows that may be begun after the oldest unfinished one, for each request under way: what is held at once."""


class ServerAnswerer:
    """Answers dialogues by requests to servers."""

    def __init__(self, config: RegenerateConfig, progress: Progress) -> None:
        self.config = config
        self.progress = progress
        self._secrets = Secrets(os.environ.get(KEY_VARIABLE) or None, config.servers)
        self._servers = Servers([endpoint(url) for url in config.servers], config, progress.say)

    def identity(self) -> dict[str, Any]:
        """Return what decides the answers, as far as it is known here."""
        return {"server_model": self.config.model_name}

    def origin(self) -> dict[str, Any]:
        """Return what is recorded of the servers and never compared."""
        return {"servers": [shown_url(url) for url in self.config.servers]}

    def answer(self, dialogues: Iterable[Dialogue], note: Callable[..., None], num_open: int) -> None:
        """Answer every open turn of the dialogues, and note each answer as it comes.

        At most `concurrency` requests are under way. Raises `DflashError` where no server answers any more, or
        where what they say will not change by trying again, and `Stopped` after a signal.
        """
        cancel: Callable[[], object] = bool

        async def run() -> None:
            nonlocal cancel
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            cancel = partial(loop.call_soon_threadsafe, task.cancel)
            if not signals:
                await self._run(_Window(dialogues, ROWS_AHEAD * self.config.concurrency), note, num_open)

        def stop() -> None:
            with suppress(RuntimeError):  # the loop is closed
                cancel()

        with stops_noted(stop) as signals:
            try:
                asyncio.run(run())
            except BaseException as error:
                if not signals:
                    raise _first(error) from None
        if signals:
            raise Stopped(signals[0])

    async def _run(self, window: "_Window", note: Callable[..., None], num_open: int) -> None:
        asyncio.get_running_loop().set_exception_handler(_tell_unless_stopped)
        config = self.config
        async with (
            Client(self._secrets, concurrency=config.concurrency, timeout_s=config.timeout_s) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(min(config.concurrency, num_open)):
                group.create_task(self._work(client, window, note))

    async def _work(self, client: Client, window: "_Window", note: Callable[..., None]) -> None:
        while (dialogue := await window.next()) is not None:
            while dialogue.is_open:
                answer = await self._servers.ask(client, dialogue)
                dialogue.add(answer)
                if not dialogue.is_open:
                    window.leave(dialogue)
                note([(dialogue, answer)], window.oldest)


class _Window:
    """Open dialogues, given out in order, none so far ahead of the oldest unfinished one that much must be held."""

    def __init__(self, dialogues: Iterable[Dialogue], most_ahead: int) -> None:
        self._dialogues: Iterator[Dialogue] = (dialogue for dialogue in dialogues if dialogue.is_open)
        self._most_ahead = most_ahead
        self._unfinished: set[int] = set()

    @property
    def oldest(self) -> int | None:
        """The number of the oldest dialogue that is given out and unfinished."""
        return min(self._unfinished, default=None)

    async def next(self) -> Dialogue | None:
        """Return the next open dialogue, once the oldest is near enough; None at the end."""
        dialogue = next(self._dialogues, None)
        if dialogue is None:
            return None
        self._unfinished.add(dialogue.index)
        while dialogue.index - min(self._unfinished) > self._most_ahead:
            await asyncio.sleep(0.01)
        return dialogue

    def leave(self, dialogue: Dialogue) -> None:
        """Note that a dialogue is finished."""
        self._unfinished.discard(dialogue.index)


def _tell_unless_stopped(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Tell of an error that nobody waits for, but not that a second signal ended the request it came in."""
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)


def _first(error: BaseException) -> BaseException:
    """Return the error, or the first one of a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
