"""Answers from OpenAI-compatible servers, many requests on their way at once."""

import asyncio
import json
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential, wait_random

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.answers.dialogues import Answer, Dialogue, Message, own_seed
from dflash_offline.stages.answers.server_choice import Server, Servers
from dflash_offline.stages.progress import Progress

ROWS_AHEAD = 64
"""Rows that may be begun after the oldest unfinished one, for each request on its way: what is held at once."""
LONGEST_BACKOFF_S = 60.0
LONGEST_RETRY_AFTER_S = 600.0
CONNECT_TIMEOUT_S = 10.0
MOST_ANSWER_BYTES = 1 << 26
MOST_REFUSED = 20
"""Rows that servers may refuse before their first answer: more are refused for the settings, not for what they say."""
REFUSED = "refused by the server"
_WRONG_SETTINGS = {401, 402, 403, 404, 405, 501}
_WRONG_ROW = {400, 413, 414, 422}
_BUSY = {408, 425, 429, 502, 503, 504}
"""Of the server, whichever row it was."""
_FINISHED = {"stop", "eos", "eos_token", "stop_sequence"}
PROBE = Dialogue(index=0, source="", line=0, said=[[{"role": "user", "content": "Say yes."}]])
"""What a server is asked after a rest: no row, for there may be rows that it never answers."""


class NoAnswerError(Exception):
    """A try gave no answer, and the next one may."""

    def __init__(self, what: str, *, of_row: bool, heard: bool = True, retry_after_s: float = 0.0) -> None:
        super().__init__(what)
        self.heard = heard
        """Whether there was a server at all."""
        self.of_row = of_row
        """Whether the row may be what made it fail."""
        self.retry_after_s = retry_after_s


class ServerAnswerer:
    """Answers dialogues by requests to servers."""

    def __init__(self, config: RegenerateConfig, progress: Progress) -> None:
        self.config = config
        self.progress = progress
        self._servers = Servers([_endpoint(url) for url in config.servers], config, progress.say)

    def identity(self) -> dict[str, Any]:
        """Return what decides the answers, as far as it is known here."""
        return {"server_model": self.config.model_name}

    def origin(self) -> dict[str, Any]:
        """Return what is worth recording beside it."""
        return {"servers": list(self.config.servers)}

    def answer(
        self, dialogues: Iterable[Dialogue], note: Callable[[list[tuple[Dialogue, Answer]]], None], num_open: int
    ) -> None:
        """Answer every open turn of the dialogues, and note each answer as it comes.

        At most `concurrency` requests are on their way. Raises `DflashError` where no server answers any more, or
        where what they say will not change by trying again.
        """
        try:
            asyncio.run(self._run(_Window(dialogues, ROWS_AHEAD * self.config.concurrency), note, num_open))
        except BaseExceptionGroup as failed:
            raise _first(failed) from None

    async def _run(self, window: "_Window", note: Callable[..., None], num_open: int) -> None:
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        timeout = httpx2.Timeout(None, connect=min(CONNECT_TIMEOUT_S, self.config.timeout_s))
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self.config.concurrency)
        held: list[tuple[Dialogue, Answer]] = []
        async with (
            httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(min(self.config.concurrency, num_open)):
                group.create_task(self._work(client, window, note, held))
        note(held)

    async def _work(self, client: Any, window: "_Window", note: Callable[..., None], held: list[Any]) -> None:
        while (dialogue := await window.next()) is not None:
            while dialogue.is_open:
                answer = await self._ask(client, dialogue)
                dialogue.add(answer)
                held.append((dialogue, answer))
                # A refusal counts as final only once a server has shown that it answers others.
                if self._servers.num_answers:
                    note(held)
                    held.clear()
                elif len(held) >= MOST_REFUSED:
                    raise DflashError(
                        f"The first {len(held)} rows were all refused, the last one so: {answer.detail}\n"
                        f"Nothing was kept of that. Check --model and the other settings against the server's."
                    )
            window.leave(dialogue)

    async def _ask(self, client: Any, dialogue: Dialogue) -> Answer:
        """Return the next answer of a dialogue, tried until there is one, or until the row itself is to blame."""
        answers_before, failures, avoid = self._servers.num_answers, 0, None

        def is_to_blame(state: RetryCallState) -> bool:
            nonlocal failures
            assert state.outcome is not None
            failures += getattr(state.outcome.exception(), "of_row", 0)
            return failures >= self.config.row_tries and self._servers.num_answers > answers_before

        async def attempt() -> Answer:
            nonlocal avoid
            avoid = server = await self._servers.acquire(avoid)
            try:
                if server.on_trial:
                    await self._probe(client, server)
                answer = await self._post(client, server, dialogue, self.config.max_new_tokens)
            except NoAnswerError as error:
                self._servers.failed(server, str(error), heard=error.heard, retry_after_s=error.retry_after_s)
                raise
            finally:
                server.busy -= 1
            self._servers.answered(server, counts=answer.fault != REFUSED)
            return answer

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(NoAnswerError), wait=self._wait, stop=is_to_blame, reraise=True
        )
        try:
            return await retrying(attempt)
        except NoAnswerError as error:
            said = f"{failures} tries; the last: {error}"
            return Answer(fault="no answer from the server", detail=f"turn {len(dialogue.answers)}: {said}")

    async def _probe(self, client: Any, server: Server) -> None:
        """Note that a server answers again; `NoAnswerError`, for which no row is to blame, if it does not."""
        try:
            answer = await self._post(client, server, PROBE, 1)
        except NoAnswerError as error:
            error.of_row = False
            raise
        self._servers.answered(server, counts=answer.fault != REFUSED)

    def _wait(self, state: RetryCallState) -> float:
        first = self.config.backoff_s
        assert state.outcome is not None
        asked_for = getattr(state.outcome.exception(), "retry_after_s", 0.0)
        backoff = wait_exponential(multiplier=first, max=LONGEST_BACKOFF_S) + wait_random(0, first)
        return max(backoff(state), asked_for)

    def _request(self, dialogue: Dialogue, max_tokens: int) -> bytes:
        config, turn = self.config, len(dialogue.answers)
        request = {
            "model": config.model_name,
            "messages": [_sent(message) for message in dialogue.prompt(turn)],
            "max_tokens": max_tokens,
            "temperature": config.temperature,
        }
        if config.temperature:
            request |= {"top_p": config.top_p, "seed": own_seed(config.seed, dialogue.index, turn)}
        if dialogue.tools:
            request["tools"] = dialogue.tools
        if config.chat_template_kwargs:
            request["chat_template_kwargs"] = config.chat_template_kwargs
        return json.dumps(request).encode()

    async def _post(self, client: Any, server: Server, dialogue: Dialogue, max_tokens: int) -> Answer:
        content = self._request(dialogue, max_tokens)
        body = bytearray()
        try:
            async with (
                asyncio.timeout(self.config.timeout_s),
                client.stream("POST", server.url, content=content) as response,
            ):
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > MOST_ANSWER_BYTES:
                        raise NoAnswerError(f"more than {MOST_ANSWER_BYTES >> 20} MiB", of_row=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            said = f"cannot connect ({str(error) or type(error).__name__})"
            raise NoAnswerError(said, of_row=False, heard=False) from error
        except TimeoutError as error:
            raise NoAnswerError(f"no answer within {self.config.timeout_s:g} s", of_row=True) from error
        except httpx2.RequestError as error:
            raise NoAnswerError(f"connection broken ({type(error).__name__}: {error})", of_row=True) from error
        turn = f"turn {len(dialogue.answers)}"
        if response.status_code == 200:
            return _read(body, turn, max_tokens)
        said = f"status {response.status_code}: {_error_text(body)}"
        if response.status_code in _WRONG_ROW:
            return Answer(fault=REFUSED, detail=f"{turn}: {said}")
        if response.status_code in _WRONG_SETTINGS or 300 <= response.status_code < 400:
            raise DflashError(f"{server.url} says {said}\nCheck --server, --model and the key in OPENAI_API_KEY.")
        raise NoAnswerError(
            said, of_row=response.status_code not in _BUSY, retry_after_s=_retry_after(response.headers)
        )


class _Window:
    """Open dialogues, given out in order, none so far ahead of the oldest unfinished one that much must be held."""

    def __init__(self, dialogues: Iterable[Dialogue], most_ahead: int) -> None:
        self._dialogues: Iterator[Dialogue] = (dialogue for dialogue in dialogues if dialogue.is_open)
        self._most_ahead = most_ahead
        self._unfinished: set[int] = set()

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


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _endpoint(url: str) -> str:
    """Return where chat completions are asked for, of a base URL with or without its version."""
    url = url.rstrip("/")
    if url.endswith("/chat/completions"):
        return url
    return f"{url}/chat/completions" if url.count("/") > 2 else f"{url}/v1/chat/completions"


def _sent(message: Message) -> Message:
    """Return a message as requests carry it: reasoning under both names that servers know."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {**message, "reasoning": reasoning}


def _read(body: bytearray, turn: str, max_tokens: int) -> Answer:
    """Return the answer that a response holds; `NoAnswerError` if it is none of the protocol's."""
    try:
        choice = json.loads(body)["choices"][0]
        message, finish = choice["message"], choice["finish_reason"]
        content = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or None
        calls = message.get("tool_calls")
        if not (isinstance(content, str) and isinstance(reasoning, str | None) and isinstance(finish, str)):
            raise TypeError("content and finish_reason are no text")
        (content + (reasoning or "")).encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"[:200]
        raise NoAnswerError(f"status 200, but no chat completion ({said})", of_row=True) from error
    if finish == "length":
        return Answer(fault="truncated answer", detail=f"{turn}: longer than {max_tokens} tokens or the server's room")
    if calls or finish == "tool_calls":
        return Answer(fault="answer calls a tool", detail=f"{turn}: nothing here could give the tool's result")
    if finish not in _FINISHED:
        return Answer(fault="answer ended otherwise", detail=f"{turn}: finish_reason {finish[:80]!r}")
    if not content.strip():
        return Answer(fault="empty answer", detail=turn)
    return Answer(content=content, reasoning=reasoning)


def _error_text(body: bytearray) -> str:
    text = body[:4096].decode(errors="replace")
    try:
        error = json.loads(body)
        error = error.get("error", error)
        text = str(error["message"] if isinstance(error, dict) and "message" in error else error)
    except (ValueError, AttributeError, RecursionError):
        pass
    return " ".join(text.split())[:300] or "(nothing more)"


def _retry_after(headers: Any) -> float:
    """Return the seconds of a Retry-After header, which may also name an instant; 0 without one."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S) if seconds == seconds else 0.0
