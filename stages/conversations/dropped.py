"""What a conversation says that the chat template left out of its text, by kind: a template never says so itself.

A part counts as written if it stands in the text, or if most of its longest words do: templates trim texts, write
arguments as JSON of another spacing or as XML, and put reasoning and system texts elsewhere.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dflash_offline.stages.conversations.content import REASONING_KEYS, Chat, strings

KIND_OF_ROLE = {
    "system": "system turns",
    "developer": "developer turns",
    "user": "user turns",
    "assistant": "answers",
    "tool": "tool results",
}
TOOLS, CALLS, REASONING, NAMES = "tools", "tool calls", "reasoning", "names"
_CLOSING_TAGS = ("</think>", "[/THINK]")
_NUM_WORDS = 8
"""Words of a part that are looked for, the longest ones."""
_SHORT = 64
"""Characters of a part that may well stand elsewhere in the conversation, so that its places are counted."""
_WORD = re.compile(r"\w+")

Message = dict[str, Any]


def dropped_parts(chat: Chat, text: str, tools: Sequence[Any], first_answer: int = 0) -> tuple[str, ...]:
    """Return the kinds of parts, in alphabetical order, of which some are not in the text.

    `tools` are what the template was given; the reasoning of messages before `first_answer` may be missing.
    """
    dropped: set[str] = set()
    written: list[str] = []
    begin = 0
    counted: list[Message] = []
    for index, message in enumerate(chat.messages):
        content = _visible(message)
        place = text.find(content, begin)
        if place >= 0:
            begin = place + len(content)
        if place >= 0 or content in text:
            written.append(content)
            if message["role"] in ("tool", "developer") and 0 < len(content) < _SHORT:
                counted.append(message)
        elif not _is_written(content, text):
            dropped.add(KIND_OF_ROLE[message["role"]])
        if index >= first_answer and message["role"] == "assistant" and not _is_written(_reasoning(message), text):
            dropped.add(REASONING)
        if message["role"] != "tool" and not _is_written(_name(message), text):
            dropped.add(NAMES)
    for message in counted:
        content = _visible(message)
        if text.count(content) < sum(other.count(content) for other in written):
            dropped.add(KIND_OF_ROLE[message["role"]])
    calls = [call["function"] for message in chat.messages for call in message.get("tool_calls", ())]
    if calls or tools:
        dropped |= _dropped_functions(calls, tools, text, written)
    return tuple(sorted(dropped))


def is_written_empty(message: Message, part: str) -> bool:
    """Say whether nothing that an answer says, neither words nor reasoning nor a call, is in its part of the text."""
    said = [_visible(message), _reasoning(message)]
    said += [call["function"]["name"] for call in message.get("tool_calls", ())]
    return not any(word and _is_written(word, part) for word in said)


def _visible(message: Message) -> str:
    """Return a message's content, without the reasoning that an answer may begin with and blanks around it."""
    content: str = message["content"]
    if message["role"] == "assistant":
        for tag in _CLOSING_TAGS:
            content = content.rpartition(tag)[2] if tag in content else content
    return content.strip()


def _reasoning(message: Message) -> str:
    reasoning: str = message.get(REASONING_KEYS[0], "")
    return reasoning.strip()


def _name(message: Message) -> str:
    """Return who speaks; a result's name is that of the call before it."""
    name = message.get("name")
    return name if isinstance(name, str) else ""


def _is_written(part: str, text: str) -> bool:
    """Say whether a part stands in the text as it is, or three of four of its longest words do."""
    if part in text:
        return True
    words = sorted({*_WORD.findall(part)}, key=lambda word: (-len(word), word))[:_NUM_WORDS]
    if not words:
        return any(character in text for character in part)
    folded = text.lower()
    num_written = sum(word.lower() in folded or json.dumps(word)[1:-1].lower() in folded for word in words)
    return 4 * num_written >= 3 * len(words)


def _dropped_functions(calls: Sequence[Message], tools: Sequence[Any], text: str, written: Sequence[str]) -> set[str]:
    """Return which of calls and tools are not all in the text.

    Names are counted, as contents may hold them too: each call and each tool needs a place of its own.
    """
    dropped: set[str] = set()
    num_called = Counter(call["name"] for call in calls if call["name"])
    num_written = {name: text.count(name) - sum(content.count(name) for content in written) for name in num_called}
    for function in _functions(tools):
        name = function["name"]
        about = _about(function)
        is_written = _is_written(about, text) and name in text if about else True
        if name in num_called:
            is_written = is_written and (bool(about) or num_written[name] > num_called[name])
            num_written[name] -= is_written
        elif not about:
            is_written = name in text
        if not is_written:
            dropped.add(TOOLS)
    if any(num_written[name] < count for name, count in num_called.items()):
        dropped.add(CALLS)
    if not all(_is_written(" ".join(said for _, said in strings(call["arguments"])), text) for call in calls):
        dropped.add(CALLS)
    return dropped


def _functions(tools: Sequence[Any]) -> list[dict[str, Any]]:
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    return [item for item in functions if isinstance(item, dict) and item.get("name") and isinstance(item["name"], str)]


def _about(function: Message) -> str:
    """Return a tool's description, or else the names of its parameters: what every way to write a tool keeps."""
    description, parameters = function.get("description"), function.get("parameters")
    if isinstance(description, str) and description.strip():
        return description.strip()
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return " ".join(properties) if isinstance(properties, dict) else ""
