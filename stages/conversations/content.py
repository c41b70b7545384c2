"""What a row says, whichever way it is written: a conversation, a plain text, or tokens with their mask."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

from dflash_offline.stages.conversations import turn_marks
from dflash_offline.stages.conversations.reading.faults import RowFaultError as RowFaultError
from dflash_offline.stages.conversations.reading.faults import shown

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
OTHERS_LEARNED, ROW_SHARE = "turns of others marked to be learned", "weight of the whole row"
MOST_NESTED = 100
"""Levels of objects and lists within one another that a row may have."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names under which templates look for an assistant's reasoning; a message that has one is given all."""


@dataclass(frozen=True)
class Chat:
    """A conversation, as chat templates take it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    context: list[int] = field(default_factory=list)
    """Answers that the data marks as context: they are not to be learned."""
    noted: list[str] = field(default_factory=list)
    """What is to be said of it beside: marks that no mask can follow, what was converted."""


@dataclass(frozen=True)
class Text:
    """A text without turns, given to the target as it is."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """Tokens that were made elsewhere, and which of them are supervised."""

    input_ids: list[int]
    loss_mask: list[int]


Content = Chat | Text | Tokens


@dataclass(frozen=True)
class RowFormat:
    """One way to write a row."""

    keys: tuple[str, ...]
    """The keys by which it is known: a row has all of them."""
    read: Callable[[dict[str, Any]], Content]
    """Returns a row's content; raises `RowFaultError`."""
    more_keys: tuple[str, ...] = ()
    """Keys that are read as well, where a row has them."""


def read_content(value: dict[str, Any], row_format: str | None = None) -> tuple[str, Content]:
    """Return the format of a row, found by its keys unless it is given, and its content; `RowFaultError` if bad."""
    if row_format is None:
        given = [key for key, item in value.items() if item is not None]  # null where another row has the key
        fitting = (name for keys in (given, value) for name, known in ROW_FORMATS.items() if {*known.keys} <= {*keys})
        row_format = next(fitting, None)
    if row_format is None:
        expected = ", ".join(" + ".join(known.keys) for known in ROW_FORMATS.values())
        raise RowFaultError(
            f"has none of the keys of a row (its keys are {shown(sorted(value)[:8])}; known: {expected})"
        )
    return row_format, ROW_FORMATS[row_format].read(value)


def is_too_deep(value: Any) -> bool:
    """Say whether a value of JSON is nested more than `MOST_NESTED` deep.

    Where the interpreter gives up depends on how deep the caller is; this does not.
    """
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MOST_NESTED):
        nested = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in nested for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def content_hash(content: Content) -> bytes:
    """Return 16 bytes that two rows share only if they say exactly the same."""
    document = json.dumps([type(content).__name__, asdict(content)], sort_keys=True)
    return sha256(document.encode()).digest()[:16]


def strings(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text within a value, keys included, with its place."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield place, key
            yield from strings(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from strings(item, f"{place}[{index}]")


def gather_texts(value: Any, texts: list[str]) -> bool:
    """Add every text that `strings` yields to a list; returns whether the value is of JSON's types alone."""
    kind = type(value)
    if kind is str:
        texts.append(value)
        return True
    if kind is dict:
        texts += value
        value = [*value.values()]
    if kind in (dict, list):
        are_plain = [gather_texts(item, texts) for item in value]  # all of them, even after one that is not
        return False not in are_plain
    return value is None or kind in (int, float, bool)


def read_messages(value: dict[str, Any]) -> Chat:
    """Return a row's `messages` and `tools`, checked; content parts become one text, call arguments an object."""
    messages = _turns(value, "messages")
    return _chat([_message(message, f"messages[{i}]") for i, message in enumerate(messages)], _tools(value))


def _marked_messages(value: dict[str, Any]) -> Chat:
    """Return what `read_messages` returns, with what the row marks as context."""
    messages = _turns(value, "messages")
    read = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    return _chat(read, _tools(value), turn_marks.row_marks(value, messages, "messages"))


def _chat(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    marked: tuple[list[bool | None], bool] | None = None,
) -> Chat:
    """Return a conversation without its empty system turns: none is meant where data writes an empty one."""
    marks, has_share = marked or ([None] * len(messages), False)
    pairs = [
        (one, mark)
        for one, mark in zip(messages, marks, strict=True)
        if one["role"] not in ("system", "developer") or one["content"].strip()
    ]
    if not pairs:
        raise RowFaultError("has only empty system turns; expected one of a user or the assistant")
    context = [i for i, (one, mark) in enumerate(pairs) if one["role"] == "assistant" and mark is False]
    others = any(one["role"] != "assistant" and mark for one, mark in pairs)
    # Where every turn has the same mark, as of a column's default, it says nothing of the others'.
    noted = [OTHERS_LEARNED] if others and len({*marks}) > 1 else []
    return Chat([one for one, _ in pairs], tools, context, noted + ([ROW_SHARE] if has_share else []))


def _turns(value: dict[str, Any], key: str) -> list[Any]:
    """Return the list of turns under a key, which may also be written as a text of JSON."""
    turns = value.get(key)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = _json(turns, list, key)
    if isinstance(turns, list) and turns:
        return turns
    found = "nothing" if turns is None else "an empty one" if turns == [] else type(turns).__name__
    if isinstance(turns, dict):
        found = f"one object of the keys {shown(sorted(turns)[:8])}"
    raise RowFaultError(f"has no list {key!r} but {found}; expected [{{...}}, ...], one object a turn")


def template_kwargs(given: Mapping[str, Any], tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Return what the chat template is given: the user's arguments, and the row's own tools over theirs."""
    return {**given, "tools": tools} if tools else dict(given)


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowFaultError(f"has {place} of type {type(message).__name__}; expected an object")
    role = message.get("role")
    if role not in ROLES:
        raise RowFaultError(f"has {place}.role {shown(role)}; expected one of {', '.join(ROLES)}")
    turn = {key: item for key, item in message.items() if item is not None}
    calls = [_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(_list(turn, "tool_calls", place))]
    turn.pop("tool_calls", None)
    may_be_empty = role in ("system", "developer", "tool")
    content = turn.get("content", "" if may_be_empty or (calls and role == "assistant") else None)
    if isinstance(content, list):
        content = "".join(_part(part, f"{place}.content[{i}]") for i, part in enumerate(content))
    content = turn["content"] = checked_text(content, f"{place}.content")
    if calls and role == "assistant":
        turn["tool_calls"] = calls
    elif calls:
        raise RowFaultError(f"has {place}.tool_calls on a message of role {role}; expected them on the assistant's")
    elif not content.strip() and not may_be_empty:
        raise RowFaultError(f"has an empty {place}.content ({role})")
    reasoning = next((turn[key] for key in REASONING_KEYS if key in turn), None)
    if reasoning is not None:
        turn |= dict.fromkeys(REASONING_KEYS, checked_text(reasoning, f"{place}.{REASONING_KEYS[0]}"))
    return turn


def checked_text(value: Any, place: str) -> str:
    """Return a value that is a text and can be encoded; `RowFaultError` naming its place if it is not."""
    if not isinstance(value, str):
        raise RowFaultError(f"has {place} of type {type(value).__name__}; expected text")
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError as error:
        raise RowFaultError(f"has {place} with an unpaired surrogate at character {error.start}") from None
    return value


def _list(value: dict[str, Any], key: str, place: str) -> list[Any]:
    items = value.get(key, [])
    if not isinstance(items, list):
        raise RowFaultError(f"has {place}.{key} of type {type(items).__name__}; expected a list")
    return items


def _part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        if turn_marks.turn_mark(part, place) is False:
            raise RowFaultError(f"has {place} marked as context; expected a mark of the whole turn")
        return checked_text(part.get("text"), f"{place}.text")
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise RowFaultError(f"has {place} of type {shown(kind)}; expected parts of type 'text' alone")


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowFaultError(f"has {place} without a function and its name")
    return {**call, "function": {**function, "arguments": _json(function.get("arguments", {}), dict, place)}}


def _tools(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = _json(value.get("tools") or [], list, "tools")
    if any(not isinstance(tool, dict) for tool in tools):
        raise RowFaultError("has tools that are not objects")
    return tools or None


def _json(value: Any, kind: type, place: str) -> Any:
    """Return an object or a list, which may also be written as a text of JSON."""
    deep = f"has {place} whose text is nested more than {MOST_NESTED} deep"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowFaultError(f"has {place} whose text is not JSON ({error})") from None
        except RecursionError:
            raise RowFaultError(deep) from None
        if isinstance(value, (dict, list)) and is_too_deep(value):
            raise RowFaultError(deep)
    if not isinstance(value, kind):
        raise RowFaultError(f"has {place} that is no {kind.__name__} but {type(value).__name__}")
    return value


def _sharegpt(value: dict[str, Any]) -> Chat:
    turns = _turns(value, "conversations")
    messages = []
    if value.get("system"):
        messages.append(_message({"role": "system", "content": value["system"]}, "system"))
    for index, turn in enumerate(turns):
        place = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise RowFaultError(f"has {place} of type {type(turn).__name__}; expected an object")
        if "from" not in turn:
            messages.append(_message(turn, place))
            continue
        speaker = turn["from"]
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise RowFaultError(f"has {place}.from {shown(speaker)}; expected one of {', '.join(SHAREGPT_ROLES)}")
        content = {"content": turn.get("value"), **{key: turn.get(key) for key in REASONING_KEYS}}
        messages.append(_message({"role": SHAREGPT_ROLES[speaker], **content}, place))
    marks, has_share = turn_marks.row_marks(value, turns, "conversations")
    unmarked: list[bool | None] = [None] * (len(messages) - len(turns))
    return _chat(messages, _tools(value), (unmarked + marks, has_share))


def _prompt_response(value: dict[str, Any]) -> Chat:
    for key in ("prompt", "response"):
        if isinstance(value.get(key), list) and any(isinstance(part, dict) and "role" in part for part in value[key]):
            raise RowFaultError(f"has {key} that is a list of messages; expected a text, or all turns in 'messages'")
    turns = [{"role": "system", "content": value["system"]}] if value.get("system") else []
    turns += [{"role": "user", "content": value.get("prompt")}, {"role": "assistant", "content": value.get("response")}]
    return _chat(
        [_message(turn, {"user": "prompt", "assistant": "response"}.get(turn["role"], "system")) for turn in turns]
    )


def _plain_text(value: dict[str, Any]) -> Text:
    text = checked_text(value.get("text"), "text")
    if not text.strip():
        raise RowFaultError("has an empty text")
    return Text(text)


def _tokens(value: dict[str, Any]) -> Tokens:
    ids, mask = _list(value, "input_ids", "the row's"), _list(value, "loss_mask", "the row's")
    if any(type(token) is not int or not 0 <= token < 2**32 for token in ids):
        raise RowFaultError("has input_ids that are not all whole numbers from 0")
    if any(type(bit) not in (bool, int) or bit not in (0, 1) for bit in mask):
        raise RowFaultError("has a loss_mask that is not all 0 and 1")
    if not ids or len(ids) != len(mask):
        raise RowFaultError(f"has {len(ids)} input_ids and a loss_mask of {len(mask)}; expected the same, and some")
    return Tokens(ids, [int(bit) for bit in mask])


ROW_FORMATS = {
    "tokens": RowFormat(("input_ids", "loss_mask"), _tokens),
    "messages": RowFormat(("messages",), _marked_messages, ("tools",)),
    "sharegpt": RowFormat(("conversations",), _sharegpt, ("system", "tools")),
    "prompt-response": RowFormat(("prompt", "response"), _prompt_response, ("system",)),
    "text": RowFormat(("text",), _plain_text),
}
"""Every way to write a row, in the order in which its keys are looked for: a new one is a line here and its reader."""
ROW_KEYS = {"kind", "completion"}.union(*(known.keys + known.more_keys for known in ROW_FORMATS.values()))
"""The only columns that are read, where a file has some of them: others may be images. `kind` is kept by regenerating,
`completion` is named in the fault of a row without `response`."""
