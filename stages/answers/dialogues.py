"""Conversations whose assistant turns are to be answered anew, turn after turn."""

import json
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
    read_messages,
    strings,
)
from dflash_offline.stages.conversations.files import Row
from dflash_offline.stages.conversations.sources import Data
from dflash_offline.stages.conversations.turn_marks import turn_mark

Message = dict[str, Any]


class UnanswerableError(Exception):
    """A row cannot be answered anew; the arguments are a reason to count by, and the detail."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the target said in one turn, or why that is no answer."""

    content: str = ""
    reasoning: str | None = None
    """The reasoning, where it was given apart from the content."""
    calls: list[Message] | None = None
    """The calls of tools that it makes."""
    compared: bool = False
    """Whether the chat template was seen to write it as the tokens that were generated."""
    not_taken: list[str] | None = None
    """Fields of the request that the server did not take, so that its own values may have joined in."""
    fault: str = ""
    """Why there is no answer, short and countable; the whole row is left out then."""
    detail: str = ""

    def message(self) -> Message:
        """Return the answer as a turn of a conversation."""
        more = {"reasoning_content": self.reasoning, "tool_calls": self.calls or None}
        given = {name: value for name, value in more.items() if value is not None}
        return {"role": "assistant", "content": self.content, **given}


@dataclass(kw_only=True)
class Dialogue:
    """One row of the data: what is said before each of its answers, and the answers so far."""

    index: int
    """Number of the row, from 0, in the order in which the data is read."""
    source: str
    line: int
    questions: list[list[Message]] = field(default_factory=list)
    """The turns of others, tools' results among them, before the first answer, before the second, and so on."""
    recorded: list[list[Message]] = field(default_factory=list)
    """The calls that each old answer makes: the results that follow it are theirs."""
    context: list[bool] = field(default_factory=list)
    """Whether the data marks each old answer as context, that is not to be learned: so is the one in its place."""
    tools: list[dict[str, Any]] | None = None
    kind: str | None = None
    """The row's group, which is kept."""
    answers: list[Answer] = field(default_factory=list)
    fault: tuple[str, str] | None = None
    """Why nothing is asked, or why an answer is none: a reason to count by, and the detail."""
    num_cut: int = 0
    """Answers that are not asked for, as the target makes a call before them that has no recorded result."""

    @property
    def is_open(self) -> bool:
        """Whether a turn is still to be answered."""
        return self.fault is None and len(self.answers) < len(self.questions)

    def add(self, answer: Answer) -> None:
        """Take the answer to the first turn that has none; the conversation ends with it if what follows misfits."""
        self.answers.append(answer)
        if answer.fault:
            self.fault = (answer.fault, answer.detail)
        elif not self._goes_on(answer):
            self.num_cut = len(self.questions) - len(self.answers)
            del self.questions[len(self.answers) :]

    def _goes_on(self, answer: Answer) -> bool:
        """Say whether what follows an answer in the data fits it: results are those of the very calls that it makes."""
        turn = len(self.answers)
        follows = self.questions[turn] if turn < len(self.questions) else []
        if answer.calls or any(message["role"] == "tool" for message in follows):
            return bool(answer.calls) and same_calls(answer.calls or [], self.recorded[turn - 1])
        return True

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
        messages: list[Message] = []
        for question, answer, is_context in zip(self.questions, self.answers, self.context, strict=False):
            messages += [*question, answer.message() | ({"weight": 0} if is_context else {})]
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
            dialogue.questions, dialogue.recorded, dialogue.context = _turns(content)
            dialogue.tools = content.tools if isinstance(content, Chat) else None
        except RowFaultError as fault:
            dialogue.fault = (BAD_ROW, f"{row.place} {fault}")
        except UnanswerableError as unanswerable:
            dialogue.fault = unanswerable.args[0], unanswerable.args[1]
        kind = row.value.get("kind")
        dialogue.kind = kind if isinstance(kind, str) else None
        yield dialogue


def same_calls(calls: list[Message], others: list[Message]) -> bool:
    """Say whether two answers call the same tools with the same arguments in the same order."""

    def said(calls: list[Message]) -> str:
        named = [[call["function"]["name"], call["function"]["arguments"]] for call in calls]
        return json.dumps(named, sort_keys=True)

    return said(calls) == said(others)


def with_recorded_ids(calls: list[Message], recorded: list[Message]) -> list[Message]:
    """Return calls without ids of their own, and where they are the recorded ones with those: results name them."""
    known = recorded if same_calls(calls, recorded) else [{}] * len(calls)
    ids = [{"id": call["id"]} if call.get("id") is not None else {} for call in known]
    return [
        {**own, "type": "function", "function": {key: call["function"][key] for key in ("name", "arguments")}}
        for own, call in zip(ids, calls, strict=True)
    ]


BAD_ROW = "bad row"
NO_USER_TURN = "no user turn before the first answer"
PLAIN_TEXT = "plain text"
PROMPT_TOO_LONG = "prompt too long"
REFUSED_BY_TEMPLATE = "refused by the chat template"
TOKENS = "tokens without text"
TRUNCATED = "truncated answer"
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
    kept = {speaker: name, said: _ANY_ANSWER, **({"weight": 0} if _is_context(turn) else {})}
    return {**kept, "tool_calls": turn["tool_calls"]} if _has_calls(turn) else kept


def _is_context(turn: Message) -> bool:
    """Say whether an old answer is marked as context; an unclear mark is replaced with the answer."""
    try:
        return turn_mark(turn, "the answer") is False
    except RowFaultError:
        return False


def _has_calls(turn: Message) -> bool:
    """Say whether an old answer makes calls that can be read: of others nothing fits their results."""
    try:
        (read,) = read_messages({"messages": [{"role": "assistant", "tool_calls": turn.get("tool_calls")}]}).messages
        for place, text in strings(read.get("tool_calls")):
            checked_text(text, place)
    except RowFaultError:
        return False
    return "tool_calls" in read


def _turns(content: Content) -> tuple[list[list[Message]], list[list[Message]], list[bool]]:
    """Return what is said before each answer, the calls of each old answer, and whether it is marked as context.

    Raises `UnanswerableError` if the answers cannot be given anew.

    A turn that nobody answered at the end is one to answer; assistant turns in a row are one answer,
    and context if all of them are.
    """
    if isinstance(content, Tokens):
        raise UnanswerableError(TOKENS, "turns cannot be told from tokens")
    if isinstance(content, Text):
        raise UnanswerableError(PLAIN_TEXT, "has no turns to answer")
    assert isinstance(content, Chat)
    questions: list[list[Message]] = [[]]
    recorded: list[list[Message]] = [[]]
    context = [False]
    answered = False
    for index, message in enumerate(content.messages):
        if message["role"] == "assistant":
            if not _has_user_turn(questions[0]):
                raise UnanswerableError(NO_USER_TURN, f"messages[{index}]")
            recorded[-1] += message.get("tool_calls", [])
            context[-1] = index in content.context and (context[-1] or not answered)
            answered = True
            continue
        if answered:
            questions.append([])
            recorded.append([])
            context.append(False)
            answered = False
        questions[-1].append({key: value for key, value in message.items() if key not in REASONING_KEYS})
    if not _has_user_turn(questions[0]):
        raise UnanswerableError(NO_USER_TURN, "the row has no user turn")
    return questions, recorded, context


def _has_user_turn(messages: list[Message]) -> bool:
    return any(message["role"] == "user" for message in messages)
