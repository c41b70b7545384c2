"""A conversation's text as the target's chat template writes it, and which parts of it are the assistant's.

Where each rendering of the turns so far is a true prefix of the next, the text is one. A template that rewrites the
history, as one that drops the thoughts of past turns does, gives a text an answer: its prompt as a server renders it at
that turn, then the answer as it is written there. Answers whose prompt goes on from the text of the one before, such as
the steps of one turn with tools, share a text: what comes before each of them is what a server would be given.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeGuard, TypeVar

from jinja2 import TemplateError

from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations.chat_tokenizer import ChatTokenizer
from dflash_offline.stages.conversations.content import REASONING_KEYS, Chat, Text
from dflash_offline.stages.conversations.dropped import CALLS, KIND_OF_ROLE, dropped_parts, is_written_empty

AS_TEXT = "call arguments given to the template as text"
ALL_CONTEXT = "marked as context"
CONTEXT, CONTEXT_LEARNED = "answers marked as context", "answers marked as context, and supervised"
ANSWER_FIRST = "begins with an assistant turn"
EMPTY_ANSWER = "template writes nothing of an answer"
OTHER_PROMPT = "answer does not follow its prompt"
REFUSED_TURN = "template refuses the turns up to an answer"
REWRITTEN = "template rewrites history"
TOO_LONG = "far too long"
MOST_CHARACTERS = 1 << 22
"""Characters of one row at most, and of all the texts that it becomes: about a million tokens, which take some 800 MiB
while they are made."""
MOST_RENDERED = 2 * MOST_CHARACTERS
"""Characters of one text with all that the template adds."""
_OF_AN_ANSWER = (ANSWER_FIRST, OTHER_PROMPT, REFUSED_TURN, REWRITTEN)
"""Why one answer of a conversation cannot be supervised in its text, while others may, or in a text of its own."""

_T = TypeVar("_T")
_R = TypeVar("_R")


class UnmaskableError(Exception):
    """Which of a row's tokens are supervised cannot be told; the arguments are a reason to count by, and the detail."""


ROW_ERRORS = (UnmaskableError, TemplateError, ValueError, TypeError, RecursionError)
"""What a row can provoke in a chat template or a tokenizer."""


def result(function: Callable[[_T], _R], argument: _T) -> _R | Exception:
    """Return what the function returns, or the error of the row that it raises."""
    try:
        return function(argument)
    except ROW_ERRORS as error:
        return error


@dataclass(frozen=True)
class Rendered:
    """One sample's text before it is encoded, and the parts of it, in characters, that are the assistant's."""

    content: Chat | Text
    """What the text is of: of a conversation perhaps only the messages up to an answer."""
    text: str
    supervised: tuple[int, ...] = ()
    """The messages that are supervised."""
    tagged: list[tuple[int, int]] = field(default_factory=list)
    """What generation tags enclose."""
    turns: list[tuple[int, int]] = field(default_factory=list)
    """What rendering turn by turn shows to be the assistant's."""
    begin: int = 0
    """Where the first supervised token may begin."""
    dropped: tuple[str, ...] = ()
    """Kinds of parts that are not in the text."""
    notes: tuple[str, ...] = ()
    """What else is to be said of the sample, by kind."""


RenderedPart = tuple[int, Rendered | Exception]
"""A text, or why there is none. The number is 0 for a whole conversation; otherwise it counts the assistant's turns,
from 1, up to the last one that is supervised in the text."""


class Renderer:
    """Renders conversations, whole or as they are served."""

    def __init__(self, tokenizer: ChatTokenizer, config: ExtractConfig, *, as_served: bool) -> None:
        """`as_served` is false for a plan of an older version, which left out what a template rewrites."""
        self.tokenizer = tokenizer
        self.config = config
        self.is_current = as_served
        self.as_served = as_served and config.mask != "all"
        self.has_tags = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.template) is not None
        """Whether the chat template has generation tags."""

    def __call__(self, chat: Chat, *, plain: bool) -> list[RenderedPart]:
        """Return a conversation's text, or where that cannot be supervised a text an answer.

        `plain` says that messages and tools are of JSON's types.
        """
        plain = plain and not any(REASONING_KEYS[0] in message for message in chat.messages)
        parts = self._rendered(chat, plain)
        if self.is_current and _wants_text(parts, chat):
            others = self._rendered(_with_text_arguments(chat), plain)
            if not _wants_text(others, chat):
                return others
        return parts

    def _rendered(self, chat: Chat, plain: bool) -> list[RenderedPart]:
        whole = result(partial(self._whole, plain=plain), chat)
        if self.as_served and isinstance(whole, UnmaskableError) and whole.args[0] in _OF_AN_ANSWER:
            parts = self._served(chat, plain)
            if any(isinstance(part, Rendered) for _, part in parts):
                return parts
        return [(0, whole)]

    def _whole(self, chat: Chat, plain: bool) -> Rendered:
        """Return the text of all messages; `UnmaskableError` if an answer cannot be supervised in it."""
        if self._context(chat) and not self._supervised(chat):
            raise UnmaskableError(ALL_CONTEXT, f"messages[{self._context(chat)[-1]}] is marked as context")
        if self.config.mask == "all":
            rendered = Rendered(chat, self._render(chat, plain=plain), tuple(_answers(chat)))
        else:
            rendered = self._from_tags(chat, plain) if self.has_tags else self._from_prefixes(chat, plain)
        return self._compared(rendered)

    def _render(self, chat: Chat, turns: int | None = None, *, prompt: bool = False, plain: bool) -> str:
        """Return the text of the first `turns` messages, or of all."""
        return self.tokenizer.render(chat.messages[:turns], chat.tools, prompt=prompt, plain=plain)

    def _supervised(self, chat: Chat) -> tuple[int, ...]:
        """Return the messages that the mask rule supervises."""
        turns = _answers(chat)
        turns = turns[-1:] if self.config.mask == "last-turn" else turns
        return tuple(turn for turn in turns if turn not in self._context(chat))

    def _context(self, chat: Chat) -> list[int]:
        """Return the answers that the data marks as context, unless all tokens are supervised."""
        return chat.context if self.as_served else []

    def _from_tags(self, chat: Chat, plain: bool) -> Rendered:
        text, spans = self.tokenizer.render_tagged(chat.messages, chat.tools, plain=plain)
        supervised = self._supervised(chat)
        before = ""
        if self.config.mask == "last-turn" and supervised and supervised[-1]:
            before = self._render(chat, supervised[-1], plain=plain)
            if not text.startswith(before):
                raise _without_its_prompt(supervised[-1])
        for turn in supervised if self.as_served else ():
            if turn + 1 < len(chat.messages):
                through = result(partial(self._render, chat, plain=plain), turn + 1)
                if isinstance(through, str) and not text.startswith(through):
                    raise _rewritten(turn)
        spans = self._without_context(chat, text, spans, plain)
        return Rendered(chat, text, supervised, tagged=spans, begin=len(before))

    def _without_context(
        self, chat: Chat, text: str, spans: list[tuple[int, int]], plain: bool
    ) -> list[tuple[int, int]]:
        """Return the spans that are not of an answer which is context."""
        for turn in self._context(chat):
            try:
                before = self._render(chat, turn, plain=plain) if turn else ""
                through = self._render(chat, turn + 1, plain=plain)
            except ROW_ERRORS as error:
                raise _refused(turn, error) from error
            if not through.startswith(before) or not text.startswith(through):
                raise _rewritten(turn)
            spans = [(begin, end) for begin, end in spans if end <= len(before) or begin >= len(through)]
        return spans

    def _from_prefixes(self, chat: Chat, plain: bool) -> Rendered:
        text = self._render(chat, plain=plain)
        spans, supervised = [], self._supervised(chat)
        for turn in supervised:
            before, through = self._around(chat, turn, plain, whole=text)
            if not text.startswith(through):
                raise _rewritten(turn)
            spans.append((len(before), len(through)))
        return Rendered(chat, text, supervised, turns=spans)

    def _around(self, chat: Chat, turn: int, plain: bool, whole: str = "") -> tuple[str, str]:
        """Return an answer's prompt, and that prompt with the answer; `UnmaskableError` if they do not fit.

        `whole` is the text of all messages, if it is known.
        """
        if turn == 0:
            raise UnmaskableError(ANSWER_FIRST, "its first token cannot be told without a prompt")
        is_last = bool(whole) and turn + 1 == len(chat.messages)
        try:
            before = self._render(chat, turn, prompt=True, plain=plain)
            through = whole if is_last else self._render(chat, turn + 1, plain=plain)
        except ROW_ERRORS as error:
            raise _refused(turn, error) from error
        if not through.startswith(before):
            raise _without_its_prompt(turn)
        return before, through

    def _served(self, chat: Chat, plain: bool) -> list[RenderedPart]:
        """Return each supervised answer after the history that a server would have been given at its turn."""
        parts: list[RenderedPart] = []
        supervised, earlier, at, size = self._supervised(chat), None, 0, 0
        for number, turn in enumerate(_answers(chat), 1):
            if turn not in supervised:
                continue
            if size > MOST_CHARACTERS:
                most = f"the texts of the answers before have more than {MOST_CHARACTERS:,} characters together"
                parts.append((number, UnmaskableError(TOO_LONG, most)))
                continue
            part = result(partial(self._answer, chat, plain), turn)
            if not isinstance(part, Rendered):
                parts.append((number, part))
                continue
            size += len(part.text)
            if earlier is not None and part.text[: part.begin].startswith(earlier.text):
                size -= len(earlier.text)
                parts[at] = number, part = number, _continued(earlier, part)
            else:
                at = len(parts)
                parts.append((number, part))
            earlier = part
        return [(number, self._with_dropped(part) if _is_joined(part) else part) for number, part in parts]

    def _answer(self, chat: Chat, plain: bool, turn: int) -> Rendered:
        """Return one answer with its history as it is served, `begin` being where that ends."""
        until = replace(chat, messages=chat.messages[: turn + 1])
        if not self.has_tags:
            before, through = self._around(chat, turn, plain)
            whole = Rendered(until, through, (turn,), turns=[(len(before), len(through))], begin=len(before))
            return self._compared(whole)
        try:
            before = self._render(chat, turn, plain=plain) if turn else ""
            text, spans = self.tokenizer.render_tagged(until.messages, chat.tools, plain=plain)
        except ROW_ERRORS as error:
            raise _refused(turn, error) from error
        if not text.startswith(before):
            raise _without_its_prompt(turn)
        tagged = [(max(begin, len(before)), end) for begin, end in spans if end > len(before)]
        return self._compared(Rendered(until, text, (turn,), tagged=tagged, begin=len(before)))

    def _compared(self, rendered: Rendered) -> Rendered:
        """Return a conversation with what its text lacks; `UnmaskableError` if a supervised answer is empty in it."""
        if len(rendered.text) > MOST_RENDERED:
            raise UnmaskableError(TOO_LONG, f"the template makes {len(rendered.text):,} characters of it")
        chat, supervised, compared = rendered.content, rendered.supervised, self._with_dropped(rendered)
        lost = {CALLS, KIND_OF_ROLE["assistant"]}.intersection(compared.dropped)
        if not lost or not isinstance(chat, Chat):
            return compared
        spans = rendered.turns or rendered.tagged
        is_one_each = len(spans) in (len(supervised), len(_answers(chat)))
        for turn, (begin, end) in zip(supervised, spans[-len(supervised) :] if is_one_each else [], strict=False):
            if is_written_empty(chat.messages[turn], rendered.text[begin:end]):
                raise UnmaskableError(EMPTY_ANSWER, f"of messages[{turn}] nothing is in the text")
        return compared

    def _with_dropped(self, rendered: Rendered) -> Rendered:
        chat = rendered.content
        assert isinstance(chat, Chat)
        tools = chat.tools or self.config.chat_template_kwargs.get("tools") or ()
        dropped = dropped_parts(chat, rendered.text, tools, min(rendered.supervised, default=0))
        return replace(rendered, dropped=dropped, notes=self._notes(chat))

    def _notes(self, chat: Chat) -> tuple[str, ...]:
        """Return what a plan says of a conversation's marks."""
        context = [CONTEXT if self.as_served else CONTEXT_LEARNED] if chat.context else []
        return tuple(sorted([*context, *chat.noted]))


def _calls(chat: Chat) -> list[dict[str, Any]]:
    return [call["function"] for message in chat.messages for call in message.get("tool_calls", ())]


def _wants_text(parts: list[RenderedPart], chat: Chat) -> bool:
    """Say whether a template takes call arguments for a text: it fails with objects, or writes them as Python does."""
    written = [repr(call["arguments"]) for call in _calls(chat) if call["arguments"]]
    return bool(written) and any(
        any(one in part.text for one in written)
        if isinstance(part, Rendered)
        else not isinstance(part, UnmaskableError) or part.args[0] == REFUSED_TURN
        for _, part in parts
    )


def _with_text_arguments(chat: Chat) -> Chat:
    """Return a conversation whose call arguments are texts of JSON, and which says so."""

    def converted(call: dict[str, Any]) -> dict[str, Any]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}

    messages = [
        {**message, "tool_calls": [converted(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in chat.messages
    ]
    return replace(chat, messages=messages, noted=[*chat.noted, AS_TEXT])


def _continued(earlier: Rendered, answer: Rendered) -> Rendered:
    """Return a text of the answers so far and one more, whose prompt begins with their text."""
    return replace(
        answer,
        supervised=earlier.supervised + answer.supervised,
        tagged=earlier.tagged + answer.tagged,
        turns=earlier.turns + answer.turns,
        begin=earlier.begin,
    )


def _is_joined(part: Rendered | Exception) -> TypeGuard[Rendered]:
    return isinstance(part, Rendered) and len(part.supervised) > 1


def _answers(chat: Chat) -> list[int]:
    return [turn for turn, message in enumerate(chat.messages) if message["role"] == "assistant"]


def _refused(turn: int, error: Exception) -> UnmaskableError:
    return UnmaskableError(REFUSED_TURN, f"those up to messages[{turn}] cannot be rendered ({str(error)[:200]})")


def _rewritten(turn: int) -> UnmaskableError:
    return UnmaskableError(REWRITTEN, f"messages[{turn}] renders otherwise when more follows")


def _without_its_prompt(turn: int) -> UnmaskableError:
    return UnmaskableError(OTHER_PROMPT, f"what leads to messages[{turn}] renders otherwise once it is there")
