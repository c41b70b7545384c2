"""Passes over all prompts against a live server, so many requests at a time; every answer's arrival is timed."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.evaluation import Counted
from dflash_offline.schemas.secrets import KEY_VARIABLE, shown_url
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.stages.answers.chat_completions import NEUTRAL, TOKENS
from dflash_offline.stages.answers.exchange import Client, NoAnswerError
from dflash_offline.stages.conversations.prompts import Prompt
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.serving.counters import UNKNOWN, counted, read_counters, server_root
from dflash_offline.stages.serving.stream import StreamedAnswer

_EVENT_TOKENS = 16
"""Times the bytes of a token that its event takes at most."""
_REFUSED = {400, 422}
_LATE_S = 3.0
"""Within which a server's counters show what it has answered."""
ALTERED = (
    "the server refuses the fields that set aside its model's own sampling settings and that ask for tokens: answers "
    "are compared as text, and its settings may join in"
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt as a server is asked it: by its tokens where they are known, else by its messages or its text."""

    prompt: Prompt
    ids: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Pass:
    """All prompts answered once."""

    answers: list[StreamedAnswer]
    seconds: float
    counted: Counted | None

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(answer.num_tokens or 0 for answer in self.answers)


@dataclass
class LiveServer:
    """A server that is asked; the first question of all finds out what it is and takes."""

    client: Client
    url: str
    model: str
    config: EvalConfig
    kind: str = UNKNOWN
    num_speculative_tokens: int | None = None
    notes: list[str] = field(default_factory=list)
    _optional: dict[str, Any] = field(default_factory=lambda: {**NEUTRAL, TOKENS: True})
    _num_passes: int = 0

    @classmethod
    async def meet(cls, client: Client, url: str, config: EvalConfig, question: Question) -> "LiveServer":
        """Return a server that has answered a question, which is not counted and warms it up."""
        server = cls(client=client, url=url, model=config.model or await _only_model(client, url), config=config)
        try:
            await server.ask(question, "warm-up")
        except _RefusedError:
            server._optional = {}
            server.notes.append(ALTERED)
            await server.ask(question, "warm-up")
        counters = await read_counters(client, url)
        server.kind, server.num_speculative_tokens = counters.kind, counters.num_speculative_tokens
        if counters.running:
            server.notes.append(f"{counters.running} requests of others were under way when the measurement began")
        return server

    async def run(self, questions: list[Question], concurrency: int, note: Callable[[], None]) -> Pass:
        """Return one pass over all questions; raises `DflashError` with the prompt's place if one has no answer."""
        self._num_passes += 1
        salt = f"dflash eval {time.time_ns()} {self._num_passes}"  # no pass finds another's prompts in a prefix cache
        before = await read_counters(self.client, self.url)
        waiting = iter(enumerate(questions))
        answers: list[StreamedAnswer | None] = [None] * len(questions)

        async def work() -> None:
            for i, question in waiting:
                answers[i] = await self.ask(question, salt)
                note()

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(questions))):
                group.create_task(work())
        seconds = time.perf_counter() - began
        found = [answer for answer in answers if answer is not None]
        tokens = sum(answer.num_tokens or 0 for answer in found)
        until = time.perf_counter() + _LATE_S
        while True:
            after = await read_counters(self.client, self.url)
            told = counted(before, after, len(found), tokens, self.url)
            late = told is not None and (told.other_requests < 0 or told.other_tokens < 0)
            if not late or time.perf_counter() > until:
                return Pass(answers=found, seconds=seconds, counted=told)
            await asyncio.sleep(0.2)

    async def ask(self, question: Question, salt: str) -> StreamedAnswer:
        """Return the whole answer to a question."""
        path, body = self._request(question)
        if self._optional:
            body |= {"cache_salt": salt}
        answer, most = StreamedAnswer(), _EVENT_TOKENS * self.config.max_new_tokens
        place = question.prompt.place
        try:
            response = await self.client.post(_beside(self.url, path), body, most, answer.take)
        except NoAnswerError as error:
            raise DflashError(
                f"{shown_url(self.url)} gave no answer to {place}: {error}. Repeat the command."
            ) from None
        if response.status in _REFUSED and self._optional and not self._num_passes:
            raise _RefusedError
        if response.status != 200:
            raise DflashError(
                f"{shown_url(self.url)} answers {place} with status {response.status}: {response.error}\nCheck "
                f"--server, --model, --max-new-tokens and the key in {KEY_VARIABLE}."
            )
        if answer.num_tokens is None or not answer.has_ended:
            raise DflashError(
                f"{shown_url(self.url)} ended the answer to {place} without saying how many tokens it has. Expected "
                f"the events of a streamed chat completion, the last with its usage."
            )
        return answer

    def _request(self, question: Question) -> tuple[str, dict[str, Any]]:
        """Return the path and the body of a request."""
        config, prompt = self.config, question.prompt
        body: dict[str, Any] = {"model": self.model, "max_tokens": config.max_new_tokens, "stream": True}
        body |= {"stream_options": {"include_usage": True}, "temperature": config.temperature, **self._optional}
        if config.temperature:
            body |= {"top_p": config.top_p, "seed": config.seed}
        if prompt.messages is None:
            return "completions", body | {"prompt": question.ids if question.ids is not None else prompt.text}
        more = {"tools": prompt.tools, "chat_template_kwargs": config.chat_template_kwargs}
        return "chat/completions", body | {"messages": prompt.messages} | {n: v for n, v in more.items() if v}


class _RefusedError(Exception):
    """A server does not take a request as it is."""


async def measure(
    server: LiveServer, questions: list[Question], concurrencies: tuple[int, ...], progress: Progress
) -> list[Pass]:
    """Return a pass over all questions for each concurrency."""
    progress.start(f"Asking {shown_url(server.url)}", len(questions) * len(concurrencies), "answers")
    try:
        return [await server.run(questions, number, lambda: progress.advance(1)) for number in concurrencies]
    except BaseExceptionGroup as failed:
        raise _first(failed) from None
    finally:
        progress.finish()


async def _only_model(client: Client, url: str) -> str:
    """Return the name of the model that a server lists first."""
    try:
        response = await client.get(_beside(url, "models"))
    except NoAnswerError as error:
        raise DflashError(f"{shown_url(url)}: {error}. See that --server is right and the server is up.") from None
    try:
        return str(json.loads(response.body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError, RecursionError):
        raise DflashError(
            f"{shown_url(url)} lists no model (status {response.status}: {response.error}). Name it by --model."
        ) from None


def _beside(url: str, path: str) -> str:
    """Return where something of the OpenAI protocol stands on a server."""
    parts = urlsplit(server_root(url))
    version = urlsplit(url).path.rstrip("/").removesuffix("/chat/completions").rpartition("/")[2]
    version = version if version.startswith("v") and version[1:].isdigit() else "v1"
    return urlunsplit(parts._replace(path=f"{parts.path}/{version}/{path}"))


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
