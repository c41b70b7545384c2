"""The OpenAI-compatible chat completions protocol: a request for one answer, and the answer that its response holds."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.secrets import KEY_VARIABLE, Secrets, shown_url
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.answers.advice import EMPTY, ENDED_OTHERWISE, REFUSED, SPELLS_KEY, UNREADABLE_CALL
from dflash_offline.stages.answers.dialogues import (
    TRUNCATED,
    Answer,
    Dialogue,
    Message,
    own_seed,
    with_recorded_ids,
)
from dflash_offline.stages.answers.exchange import Client, NoAnswerError
from dflash_offline.stages.conversations.content import RowFaultError, read_messages, strings

NEUTRAL: Mapping[str, float] = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Values that leave the target's own probabilities alone: without them those of the model's generation_config.json, or
of the server, join in, and greedy answers are not the target's."""
TOKENS = "return_token_ids"
"""The field of vLLM that asks for the tokens of prompt and answer."""
_WRONG_SETTINGS = {401, 402, 403, 404, 405, 501}
_WRONG_ROW = {400, 413, 414, 422}
_BUSY = {408, 425, 429, 502, 503, 504}
"""Statuses that say nothing of the row: the server is busy, or its gateway lost it."""
_FINISHED = {"stop", "eos", "eos_token", "stop_sequence", "tool_calls"}


@dataclass(frozen=True, kw_only=True)
class Said:
    """An answer, and the tokens of prompt and answer where the server gives them."""

    answer: Answer
    prompt_ids: list[int] | None = None
    ids: list[int] | None = None


def endpoint(url: str) -> str:
    """Return where chat completions are asked for, of a base URL with or without its version."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = f"{path or '/v1'}/chat/completions"
    return urlunsplit(parts._replace(path=path))


def sampling_fields(config: RegenerateConfig) -> dict[str, Any]:
    """Return what decides how tokens are drawn, beside the temperature and the seed."""
    drawn = {"top_p": config.top_p, "top_k": config.top_k or NEUTRAL["top_k"], "min_p": config.min_p}
    return {**NEUTRAL, **(drawn if config.temperature else {})}


def optional_fields(config: RegenerateConfig) -> dict[str, Any]:
    """Return the fields of a request that a server may not know."""
    return {**sampling_fields(config), TOKENS: True}


async def ask_server(
    client: Client, url: str, config: RegenerateConfig, dialogue: Dialogue, max_tokens: int, optional: dict[str, Any]
) -> Said:
    """Return the server's answer to a dialogue's next turn, or why it is none that can be kept.

    Raises `NoAnswerError` where another try may give one, `DflashError` where the settings are wrong.
    """
    request = _request(config, dialogue, max_tokens) | optional
    response = await client.post(url, request, max_tokens)
    turn, status = f"turn {len(dialogue.answers)}", response.status
    if status == 200:
        return _read(response.body, dialogue, max_tokens, client.secrets)
    what = f"status {status}: {response.error}"
    if status in _WRONG_ROW:
        return Said(answer=Answer(fault=REFUSED, detail=f"{turn}: {what}"))
    if status in _WRONG_SETTINGS or 300 <= status < 400:
        raise DflashError(f"{shown_url(url)} says {what}\nCheck --server, --model and the key in {KEY_VARIABLE}.")
    raise NoAnswerError(what, of_row=status not in _BUSY, retry_after_s=response.retry_after_s)


async def tokens_of(client: Client, url: str, config: RegenerateConfig, dialogue: Dialogue, answer: Answer) -> Any:
    """Return the tokens that the server's chat template makes of a dialogue with its next answer.

    Returns None where the server does not say. `url` is that of chat completions; vLLM tokenizes beside it.
    """
    parts = urlsplit(url)
    root = re.sub(r"(/v\d+)?/chat/completions$", "", parts.path)
    document = {
        "model": config.model_name,
        "messages": [_sent(message) for message in [*dialogue.prompt(len(dialogue.answers)), answer.message()]],
        "add_generation_prompt": False,
        **_template_fields(config, dialogue),
    }
    response = await client.post(urlunsplit(parts._replace(path=f"{root}/tokenize")), document)
    try:
        return json.loads(response.body)["tokens"] if response.status == 200 else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def readings(answer: Answer) -> Iterator[Answer]:
    """Yield the ways in which an answer may have been said: as it came, and with a thought that the prompt opened."""
    yield answer
    before, tag, after = answer.content.partition("</think>")
    if tag and not answer.reasoning and "<think>" not in before:
        yield replace(answer, content=f"<think>\n{answer.content}")
        yield replace(answer, content=f"<think>{answer.content}")
        yield replace(answer, content=after.strip(), reasoning=before.strip())


def _request(config: RegenerateConfig, dialogue: Dialogue, max_tokens: int) -> dict[str, Any]:
    turn = len(dialogue.answers)
    request = {
        "model": config.model_name,
        "messages": [_sent(message) for message in dialogue.prompt(turn)],
        "max_tokens": max_tokens,
        "temperature": config.temperature,
        **_template_fields(config, dialogue),
    }
    return request | ({"seed": own_seed(config.seed, dialogue.index, turn)} if config.temperature else {})


def _template_fields(config: RegenerateConfig, dialogue: Dialogue) -> dict[str, Any]:
    fields = {"tools": dialogue.tools, "chat_template_kwargs": config.chat_template_kwargs}
    return {name: value for name, value in fields.items() if value}


def _sent(message: Message) -> Message:
    """Return a message as requests carry it: reasoning under both names that servers know, arguments as text."""
    sent = dict(message)
    if (reasoning := message.get("reasoning_content")) is not None:
        sent["reasoning"] = reasoning
    if calls := message.get("tool_calls"):
        functions = [{**call["function"], "arguments": json.dumps(call["function"]["arguments"])} for call in calls]
        sent["tool_calls"] = [
            {"id": f"call_{i}", **call, "function": function}
            for i, (call, function) in enumerate(zip(calls, functions, strict=True))
        ]
    return sent


def _read(body: bytes, dialogue: Dialogue, max_tokens: int, secrets: Secrets) -> Said:
    """Return the answer that a response holds; `NoAnswerError` if it is none of the protocol's."""
    turn = f"turn {len(dialogue.answers)}"
    try:
        document = json.loads(body)
        choice = document["choices"][0]
        message, finish = choice["message"], choice["finish_reason"]
        content = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or None
        if not (isinstance(content, str) and isinstance(reasoning, str | None) and isinstance(finish, str)):
            raise TypeError("content and finish_reason are no text")
        (content + (reasoning or "")).encode()
        is_spelled = secrets.spelled_in(text for _, text in strings(message))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = secrets.masked(f"{type(error).__name__}: {error}")[:200]
        raise NoAnswerError(f"status 200, but no chat completion ({why})", of_row=True) from None
    if is_spelled:
        return _left_out(SPELLS_KEY, turn)
    if finish == "length":
        return _left_out(TRUNCATED, f"{turn}: longer than {max_tokens} tokens or the server's room")
    if finish not in _FINISHED:
        return _left_out(ENDED_OTHERWISE, f"{turn}: finish_reason {secrets.masked(finish)[:80]!r}")
    calls = None
    if message.get("tool_calls") or finish == "tool_calls":
        try:
            calls = _calls(message, dialogue)
        except (RowFaultError, LookupError, TypeError, UnicodeEncodeError) as error:
            return _left_out(UNREADABLE_CALL, f"{turn}: {secrets.masked(str(error))[:200]}")
    if not content.strip() and not calls:
        return _left_out(EMPTY, turn)
    prompt_ids, ids = document.get("prompt_token_ids"), choice.get("token_ids")
    if not (_is_tokens(prompt_ids) and _is_tokens(ids)):
        prompt_ids = ids = None
    return Said(answer=Answer(content=content, reasoning=reasoning, calls=calls), prompt_ids=prompt_ids, ids=ids)


def _left_out(fault: str, detail: str) -> Said:
    return Said(answer=Answer(fault=fault, detail=detail))


def _calls(message: Message, dialogue: Dialogue) -> list[Message]:
    (read,) = read_messages({"messages": [{"role": "assistant", "tool_calls": message.get("tool_calls")}]}).messages
    for _, text in strings(read["tool_calls"]):
        text.encode()
    return with_recorded_ids(read["tool_calls"], dialogue.recorded[len(dialogue.answers)])


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
