"""One request of the OpenAI-compatible chat completions protocol, and the answer that its response holds."""

import asyncio
import json
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.answers.dialogues import Answer, Dialogue, Message, own_seed

MOST_ANSWER_BYTES = 1 << 26
LONGEST_RETRY_AFTER_S = 600.0
REFUSED = "refused by the server"
_WRONG_SETTINGS = {401, 402, 403, 404, 405, 501}
_WRONG_ROW = {400, 413, 414, 422}
_BUSY = {408, 425, 429, 502, 503, 504}
"""Statuses that say nothing of the row: the server is busy, or its gateway lost it."""
_FINISHED = {"stop", "eos", "eos_token", "stop_sequence"}


class NoAnswerError(Exception):
    """A try gave no answer, and the next one may."""

    def __init__(self, what: str, *, of_row: bool, heard: bool = True, retry_after_s: float = 0.0) -> None:
        super().__init__(what)
        self.of_row = of_row
        """Whether the row may be what made the try fail."""
        self.heard = heard
        """Whether there was a server at all."""
        self.retry_after_s = retry_after_s
        """Seconds that the server asks to be left alone."""


def endpoint(url: str) -> str:
    """Return where chat completions are asked for, of a base URL with or without its version."""
    url = url.rstrip("/")
    if url.endswith("/chat/completions"):
        return url
    return f"{url}/chat/completions" if url.count("/") > 2 else f"{url}/v1/chat/completions"


async def ask_server(client: Any, url: str, config: RegenerateConfig, dialogue: Dialogue, max_tokens: int) -> Answer:
    """Return the server's answer to a dialogue's next turn, or why it is none that can be kept.

    Raises `NoAnswerError` where another try may give one, `DflashError` where the settings are wrong.
    """
    body = bytearray()
    try:
        async with (
            asyncio.timeout(config.timeout_s),
            client.stream("POST", url, content=_request(config, dialogue, max_tokens)) as response,
        ):
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > MOST_ANSWER_BYTES:
                    raise NoAnswerError(f"more than {MOST_ANSWER_BYTES >> 20} MiB", of_row=True)
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        what = f"cannot connect ({str(error) or type(error).__name__})"
        raise NoAnswerError(what, of_row=False, heard=False) from error
    except TimeoutError as error:
        raise NoAnswerError(f"no answer within {config.timeout_s:g} s", of_row=True) from error
    except httpx2.RequestError as error:
        raise NoAnswerError(f"connection broken ({type(error).__name__}: {error})", of_row=True) from error
    turn, status = f"turn {len(dialogue.answers)}", response.status_code
    if status == 200:
        return _read(body, turn, max_tokens)
    what = f"status {status}: {_error_text(body)}"
    if status in _WRONG_ROW:
        return Answer(fault=REFUSED, detail=f"{turn}: {what}")
    if status in _WRONG_SETTINGS or 300 <= status < 400:
        raise DflashError(f"{url} says {what}\nCheck --server, --model and the key in OPENAI_API_KEY.")
    raise NoAnswerError(what, of_row=status not in _BUSY, retry_after_s=retry_after_s(response.headers))


def _request(config: RegenerateConfig, dialogue: Dialogue, max_tokens: int) -> bytes:
    turn = len(dialogue.answers)
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
        why = f"{type(error).__name__}: {error}"[:200]
        raise NoAnswerError(f"status 200, but no chat completion ({why})", of_row=True) from error
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


def retry_after_s(headers: Any) -> float:
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
