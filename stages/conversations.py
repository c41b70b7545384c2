"""Reading conversations from JSONL, each fault named with file and line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import BadInputError

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_NAMED = 20
"""Faults that an error names before it only counts them."""


@dataclass(frozen=True)
class Row:
    """One line of a JSONL file: an object, or what is wrong with it."""

    source: Path
    line: int
    """From 1."""
    value: dict[str, Any]
    fault: str = ""

    @property
    def place(self) -> str:
        """File and line, as errors name them."""
        return f"{self.source}:{self.line}"


def read_rows(path: Path) -> Iterator[Row]:
    """Yield each line that is not blank; `BadInputError` if the file cannot be opened."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror}. Name a JSONL file of conversations.") from error
    with file:
        for line, content in enumerate(file, start=1):
            if not content.strip():
                continue
            try:
                value = json.loads(content)
            except (ValueError, RecursionError) as error:
                yield Row(path, line, {}, f"is not JSON ({error})")
                continue
            if not isinstance(value, dict):
                yield Row(path, line, {}, f"is a JSON {type(value).__name__}; expected an object")
                continue
            yield Row(path, line, value)


def messages_fault(value: dict[str, Any]) -> str:
    """Return what is wrong with a row's `messages`, or an empty string."""
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        return f"has no list 'messages' (its keys are {sorted(value)[:8]})"
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"has messages[{index}] of type {type(message).__name__}; expected an object"
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            return f"has messages[{index}].role {role!r}; expected one of {', '.join(ROLES)}"
        if not isinstance(content, str):
            return f"has messages[{index}].content of type {type(content).__name__}; expected text"
        if not content.strip():
            return f"has an empty messages[{index}].content ({role})"
        try:
            content.encode()
        except UnicodeEncodeError as error:
            return f"has messages[{index}].content with an unpaired surrogate at character {error.start}"
    return ""


def refuse_bad_rows(faults: list[str], what_to_do: str) -> None:
    """Raise `BadInputError` naming the first faulty rows and counting the rest, if there are any."""
    if faults:
        named = "\n  ".join(faults[:MOST_NAMED])
        rest = f"\n  ... and {len(faults) - MOST_NAMED} more" if len(faults) > MOST_NAMED else ""
        rows = "row" if len(faults) == 1 else "rows"
        raise BadInputError(f"{len(faults)} bad {rows}:\n  {named}{rest}\n{what_to_do}")
