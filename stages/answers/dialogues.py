"""Conversations whose assistant turns are to be answered anew, turn after turn."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dflash_offline.stages.conversations.content import (
    REASONING_KEYS,
    SHAREGPT_ROLES,
    Chat,
    Content,
    RowFaultError,
    Text,
    Tokens,
    checked_text,
    read_content,
    strings,
)
from dflash_offline.stages.conversations.files import Row
from dflash_offline.stages.conversations.sources import Data

Message = dict[str, Any]


class UnanswerableError(Exception):
    """A row cannot be answered anew; the arguments are a reason to count by, and the detail."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the target said in one turn, or why that is no answer."""

    content: str = ""
    reasoning: str | None = None
    """The reasoning, where it was given apart from the content."""
    fault: str = ""
    """Why there is no answer, short and countable; the whole row is left out then."""
    detail: str = ""

    def message(self) -> Message:
        """Return the answer as a turn of a conversation."""
        message = {"role": "assistant", "content": self.content}
        return message if self.reasoning is None else {**message, "reasoning_content": self.reasoning}


@dataclass(kw_only=True)
class Dialogue:
    """One row of the data: what is said before each of its answers, and the answers so far."""

    index: int
    """Number of the row, from 0, in the order in which the data is read."""
    source: str
    line: int
    questions: list[list[Message]] = field(default_factory=list)
    """The turns of system, user and developer before the first answer, before the second, and so on."""
    tools: list[dict[str, Any]] | None = None
    kind: str | None = None
    """The row's group, which is kept."""
    answers: list[Answer] = field(default_factory=list)
    fault: tuple[str, str] | None = None
    """Why nothing is asked, or why an answer is none: a reason to count by, and the detail."""

    @property
    def is_open(self) -> bool:
        """Whether a turn is still to be answered."""
        return self.fault is None and len(self.answers) < len(self.questions)

    def add(self, answer: Answer) -> None:
        """Take the answer to the first turn that has none."""
        self.answers.append(answer)
        if answer.fault:
            self.fault = (answer.fault, answer.detail)

    def reaches(self, turn: int) -> bool:
        """Say whether the turn is one that was, or is to be, asked."""
        whole = self.fault is None or bool(self.answers)
        return whole and turn < len(self.questions) and not any(answer.fault for answer in self.answers[:turn])

    def prompt(self, turn: int) -> list[Message]:
        """Return the conversation up to the answer of a turn, that answer left out."""
        messages = list(self.questions[0])
        for answer, question in zip(self.answers[:turn], self.questions[1 : turn + 1], strict=True):
            messages += [answer.message(), *question]
        return messages

    def record(self) -> dict[str, Any]:
        """Return the row of the new file."""
        messages = [*self.prompt(len(self.questions) - 1), self.answers[-1].message()]
        more = {"tools": self.tools, "kind": self.kind, "source": f"{self.source}:{self.line}"}
        return {"messages": messages, **{name: value for name, value in more.items() if value is not None}}


def own_seed(seed: int, row: int, turn: int) -> int:
    """Return the seed of one answer's draws, 0 to 2**31 - 1: a function of the arguments alone."""
    return int(np.random.SeedSequence((seed, row, turn)).generate_state(1)[0]) >> 1


def read_dialogues(data: Data) -> Iterator[Dialogue]:
    """Yield every row of the data in order, without answers; a row that cannot be answered anew says why."""
    for index, row in enumerate(data.rows()):
        dialogue = Dialogue(index=index, source=row.source.name, line=row.line)
        try:
            content = _content(row, data.format.row_format)
            dialogue.questions, dialogue.tools = _turns(content)
        except RowFaultError as fault:
            dialogue.fault = (BAD_ROW, f"{row.place} {fault}")
        except UnanswerableError as unanswerable:
            dialogue.fault = unanswerable.args[0], unanswerable.args[1]
        kind = row.value.get("kind")
        dialogue.kind = kind if isinstance(kind, str) else None
        yield dialogue


BAD_ROW = "bad row"
_ANY_ANSWER = "-"


def _content(row: Row, row_format: str | None) -> Content:
    if row.fault:
        raise RowFaultError(row.fault)
    _, content = read_content(_without_answers(row.value), row_format)
    for place, text in strings(vars(content)) if isinstance(content, Chat) else ():
        checked_text(text, place)
    return content


def _without_answers(value: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose old answers are any text, as they will be replaced and need not be good ones."""
    changed = dict(value)
    for key, speaker, said in (("messages", "role", "content"), ("conversations", "from", "value")):
        if isinstance(turns := value.get(key), list):
            changed[key] = [_without_answer(turn, speaker, said) for turn in turns]
    if value.get("prompt") is not None and not any(value.get(key) for key in ("messages", "conversations", "text")):
        changed["response"] = _ANY_ANSWER
    return changed


def _without_answer(turn: Any, speaker: str, said: str) -> Any:
    if not isinstance(turn, dict):
        return turn
    if speaker not in turn:
        speaker, said = "role", "content"
    name = turn.get(speaker)
    if not isinstance(name, str) or SHAREGPT_ROLES.get(name) != "assistant":
        return turn
    kept = {speaker: name, said: _ANY_ANSWER}
    return {**kept, "tool_calls": turn["tool_calls"]} if turn.get("tool_calls") else kept


def _turns(content: Content) -> tuple[list[list[Message]], list[dict[str, Any]] | None]:
    """Return what is said before each answer; `UnanswerableError` if the answers cannot be given anew.

    A turn that nobody answered at the end is one to answer; assistant turns in a row are one answer.
    """
    if isinstance(content, Tokens):
        raise UnanswerableError("tokens without text", "turns cannot be told from tokens")
    if isinstance(content, Text):
        raise UnanswerableError("plain text", "has no turns to answer")
    assert isinstance(content, Chat)
    questions: list[list[Message]] = [[]]
    answered = False
    for index, message in enumerate(content.messages):
        if message["role"] == "tool" or message.get("tool_calls"):
            raise UnanswerableError(
                "tool calls", f"messages[{index}]: a tool's result belongs to the old call, and a new one has none"
            )
        if message["role"] == "assistant":
            if not _has_user_turn(questions[0]):
                raise UnanswerableError("no user turn before the first answer", f"messages[{index}]")
            answered = True
            continue
        if answered:
            questions.append([])
            answered = False
        questions[-1].append({key: value for key, value in message.items() if key not in REASONING_KEYS})
    if not _has_user_turn(questions[0]):
        raise UnanswerableError("no user turn before the first answer", "the row has no user turn")
    return questions, content.tools


def _has_user_turn(messages: list[Message]) -> bool:
    return any(message["role"] == "user" for message in messages)
