"""A row's tokens and its loss mask: which of them are supervised, so that a draft learns from them.

With the rule `assistant` these are the assistant's words and the end-of-turn token, with `last-turn` those of the last
answer, with `all` every token. Where the chat template has generation tags they decide; otherwise the conversation is
rendered turn by turn, which is accepted only if each rendering is a true prefix of the next. A plain text has no turns:
all of it is supervised, save what the tokenizer adds. Tokens made elsewhere come with their mask.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations.chat_tokenizer import ChatTokenizer, Encoded
from dflash_offline.stages.conversations.content import (
    REASONING_KEYS,
    Chat,
    Content,
    Text,
    Tokens,
    gather_texts,
    strings,
)
from dflash_offline.stages.conversations.dropped import CALLS, KIND_OF_ROLE, dropped_parts, is_written_empty

if TYPE_CHECKING:  # its module loads torch, which a process that only tokenizes does without
    from dflash_offline.stages.target.files import TargetFiles

REASONING_TAGS = ("<think>", "</think>", "[THINK]", "[/THINK]")
"""Part of what a model says, even where its tokenizer flags them special."""
MOST_CHARACTERS = 1 << 22
"""Characters of one row at most: about a million tokens, which take some 800 MiB while they are made."""
ANSWER_FIRST = "begins with an assistant turn"
EMPTY_ANSWER = "template writes nothing of an answer"
OTHER_PROMPT = "answer does not follow its prompt"
REWRITTEN = "template rewrites history"
SPECIAL_TOKEN = "special token in content"
TOKENS_REASON = "reasoning in tokens cannot be told"
TOO_LONG = "far too long"
_REASONING = re.compile(
    r"(?:<think>|\A)(?:(?!<think>).)*?</think>|<think>.*\Z"
    r"|(?:\[THINK\]|\A)(?:(?!\[THINK\]).)*?\[/THINK\]|\[THINK\].*\Z"
    r"|<\|channel\|>analysis<\|message\|>.*?(?:<\|end\|>(?:<\|start\|>assistant)?|\Z)",
    re.DOTALL,
)
"""Reasoning within one answer: between its tags, up to a closing tag whose opening one the prompt held, or cut off."""


_T = TypeVar("_T")
_R = TypeVar("_R")


class UnmaskableError(Exception):
    """Which of a row's tokens are supervised cannot be told; the arguments are a reason to count by, and the detail."""


ROW_ERRORS = (UnmaskableError, TemplateError, ValueError, TypeError, RecursionError)
"""What a row can provoke in a chat template or a tokenizer."""


@dataclass(frozen=True)
class Tokenized:
    """The tokens of one row, and which of them are supervised."""

    input_ids: NDArray[np.uint32]
    loss_mask: NDArray[np.bool_]
    dropped: tuple[str, ...] = ()
    """Kinds of parts of the row that the chat template left out of the text."""


@dataclass(frozen=True)
class _Rendered:
    """One row's text before it is encoded, and the parts of it, in characters, that the template or its turns mark."""

    content: Chat | Text
    text: str
    tagged: list[tuple[int, int]] = field(default_factory=list)
    """What generation tags enclose."""
    turns: list[tuple[int, int]] = field(default_factory=list)
    """What rendering turn by turn shows to be the assistant's."""
    begin: int = 0
    """Where the first supervised token may begin."""
    dropped: tuple[str, ...] = ()
    """Kinds of parts that are not in the text."""


class ConversationEncoder:
    """Renders conversations with the target's chat template, encodes them and masks what is not to be learned."""

    def __init__(self, target: "TargetFiles", config: ExtractConfig) -> None:
        self.tokenizer = ChatTokenizer(target.tokenizer, config.chat_template_kwargs)
        self.config = config
        self.vocab_size = int(target.text_config.vocab_size)
        """Rows of the target's embedding table."""
        self.has_tags = re.search(r"\{%-?\s*generation\s*-?%\}", self.tokenizer.template) is not None
        """Whether the chat template has generation tags."""
        how = "from generation tags" if self.has_tags else "from rendering turn by turn"
        self.mask_rule = config.mask if config.mask == "all" else f"{config.mask}, {how}"
        """The rule and how it is followed, as the manifest says it."""
        self.mask_rule += ", without reasoning" if config.no_reasoning else ""
        self._end_ids = np.array(sorted(target.end_ids()), np.uint32)
        special = {str(token) for token in target.tokenizer.added_tokens_decoder.values() if token.special}
        spelled = sorted(special - {*REASONING_TAGS, ""}, key=len, reverse=True)
        self._special_firsts = sorted({text[0] for text in spelled})
        self._special = re.compile("|".join(map(re.escape, spelled))) if spelled else None

    def encode(self, content: Content) -> Tokenized:
        """Return a row's tokens and mask; `UnmaskableError`, or jinja2's `TemplateError`, if it has none."""
        (tokenized,) = self.encode_all([content])
        if isinstance(tokenized, Exception):
            raise tokenized
        return tokenized

    def encode_all(self, contents: Sequence[Content]) -> list[Tokenized | Exception]:
        """Return what `encode` returns or raises for each row, their texts encoded together."""
        rows: list[Tokenized | _Rendered | Exception] = [_result(self._rendered, content) for content in contents]
        texts = [row for row in rows if isinstance(row, _Rendered) and isinstance(row.content, Text)]
        chats = [row for row in rows if isinstance(row, _Rendered) and isinstance(row.content, Chat)]
        encoded = iter(self._encoded(texts, add_special_tokens=True)), iter(self._encoded(chats))
        return [
            self._masked(row, next(encoded[isinstance(row.content, Chat)])) if isinstance(row, _Rendered) else row
            for row in rows
        ]

    def _rendered(self, content: Content) -> Tokenized | _Rendered:
        """Return a row's text, or the row itself if it holds tokens; `UnmaskableError` if it cannot be supervised."""
        if isinstance(content, Tokens):
            return self._tokens_made_elsewhere(content)
        plain = self._refuse_unfit(content)
        if isinstance(content, Text):
            return _Rendered(content, content.text)
        plain = plain and not any(REASONING_KEYS[0] in message for message in content.messages)
        if self.config.mask == "all":
            rendered = _Rendered(content, self._render(content, plain=plain))
        else:
            rendered = self._from_tags(content, plain) if self.has_tags else self._from_prefixes(content, plain)
        return self._compared(content, rendered)

    def _compared(self, chat: Chat, rendered: _Rendered) -> _Rendered:
        """Return a conversation with what its text lacks; `UnmaskableError` if a supervised answer is empty in it."""
        turns = _answers(chat)
        supervised = turns[-1:] if self.config.mask == "last-turn" else turns
        tools = chat.tools or self.config.chat_template_kwargs.get("tools") or ()
        dropped = dropped_parts(chat, rendered.text, tools, min(supervised, default=0))
        if not dropped:
            return rendered
        spans = rendered.turns or (rendered.tagged if len(rendered.tagged) == len(turns) else [])
        for turn, (begin, end) in zip(supervised, spans[-len(supervised) :], strict=False):
            lost = {CALLS, KIND_OF_ROLE["assistant"]}.intersection(dropped)
            if lost and is_written_empty(chat.messages[turn], rendered.text[begin:end]):
                raise UnmaskableError(EMPTY_ANSWER, f"of messages[{turn}] nothing is in the text")
        return replace(rendered, dropped=dropped)

    def _encoded(self, rendered: list[_Rendered], *, add_special_tokens: bool = False) -> list[Encoded | Exception]:
        texts = [row.text for row in rendered]
        try:
            return [*self.tokenizer.encode(texts, add_special_tokens=add_special_tokens)] if texts else []
        except Exception:  # of one text or several: each is encoded alone, with an error of its own

            def alone(text: str) -> Encoded:
                return self.tokenizer.encode([text], add_special_tokens=add_special_tokens)[0]

            return [_result(alone, text) for text in texts]

    def _masked(self, rendered: _Rendered, encoded: Encoded | Exception) -> Tokenized | Exception:
        if isinstance(encoded, Exception):
            return encoded
        return Tokenized(encoded.ids, self._is_supervised(rendered, encoded), rendered.dropped)

    def _is_supervised(self, rendered: _Rendered, encoded: Encoded) -> NDArray[np.bool_]:
        """Return for each token of a text whether the rule supervises it."""
        begins, ends = encoded.begins, encoded.ends
        mask = np.zeros(len(begins), np.bool_)
        if self.config.mask == "all":
            mask[:] = True
        elif isinstance(rendered.content, Text):
            mask[encoded.touching(0, int(ends.max(initial=0)))] = True
        else:
            for begin, end in rendered.tagged:
                mask[encoded.touching(begin, end)] = True
            if rendered.begin:
                mask[begins < rendered.begin] = False
            for begin, end in rendered.turns:
                mask[encoded.within(begin, end)] = True
            mask = close_turns(encoded.ids, mask, self._end_ids, self._is_blank)
        if self.config.no_reasoning:
            text = rendered.text
            for begin, end in list(_reasoning(rendered.content, text, mask, encoded)):
                words = end + len(text[end:]) - len(text[end:].lstrip())
                mask &= ~(((ends > begin) & (begins < end)) | ((begins >= end) & (ends <= words)))
        return mask

    def _tokens_made_elsewhere(self, tokens: Tokens) -> Tokenized:
        mask = np.array(tokens.loss_mask, np.bool_)
        if self.config.no_reasoning:
            raise UnmaskableError(TOKENS_REASON, "the row holds tokens, not text")
        if self.config.mask == "all":
            mask[:] = True
        elif self.config.mask == "last-turn":
            runs = supervised_runs(mask)
            mask[: runs[-1, 0] if len(runs) else 0] = False
        return Tokenized(np.array(tokens.input_ids, np.uint32), mask)

    def _refuse_unfit(self, content: Chat | Text) -> bool:
        """Raise `UnmaskableError` if a text is too long or spells a special token; returns whether all values are of
        JSON's types."""
        texts: list[str] = []
        plain = gather_texts(vars(content), texts)
        size = sum(map(len, texts))
        if size > MOST_CHARACTERS:
            raise UnmaskableError(TOO_LONG, f"{size:,} characters; at most {MOST_CHARACTERS:,} are tokenized")
        if self._special is None or self.config.keep_special_tokens:
            return plain
        whole = "".join(texts)
        if not any(first in whole for first in self._special_firsts):
            return plain
        for text in texts:
            if match := self._special.search(text):
                place = next(place for place, value in strings(vars(content)) if value == text)
                raise UnmaskableError(SPECIAL_TOKEN, f"{place} spells {match.group()!r}")
        return plain

    def _is_blank(self, ids: NDArray[np.uint32]) -> bool:
        return not self.tokenizer.decode(ids.tolist()).strip()

    def _render(self, chat: Chat, turns: int | None = None, *, prompt: bool = False, plain: bool) -> str:
        """Return the text of the first `turns` messages, or of all."""
        return self.tokenizer.render(chat.messages[:turns], chat.tools, prompt=prompt, plain=plain)

    def _from_tags(self, chat: Chat, plain: bool) -> _Rendered:
        text, spans = self.tokenizer.render_tagged(chat.messages, chat.tools, plain=plain)
        turns = _answers(chat)
        before = ""
        if self.config.mask == "last-turn" and turns:
            before = self._render(chat, turns[-1], plain=plain) if turns[-1] else ""
            if not text.startswith(before):
                raise _without_its_prompt(turns[-1])
        return _Rendered(chat, text, tagged=spans, begin=len(before))

    def _from_prefixes(self, chat: Chat, plain: bool) -> _Rendered:
        text = self._render(chat, plain=plain)
        turns = _answers(chat)
        spans = []
        for turn in turns[-1:] if self.config.mask == "last-turn" else turns:
            if turn == 0:
                raise UnmaskableError(ANSWER_FIRST, "its first token cannot be told without a prompt")
            before = self._render(chat, turn, prompt=True, plain=plain)
            through = text if turn + 1 == len(chat.messages) else self._render(chat, turn + 1, plain=plain)
            if not through.startswith(before):
                raise _without_its_prompt(turn)
            if not text.startswith(through):
                raise UnmaskableError(REWRITTEN, f"messages[{turn}] renders otherwise when more follows")
            spans.append((len(before), len(through)))
        return _Rendered(chat, text, turns=spans)


def _result(function: Callable[[_T], _R], argument: _T) -> _R | Exception:
    """Return what the function returns, or the error of the row that it raises."""
    try:
        return function(argument)
    except ROW_ERRORS as error:
        return error


def _answers(chat: Chat) -> list[int]:
    return [turn for turn, message in enumerate(chat.messages) if message["role"] == "assistant"]


def _without_its_prompt(turn: int) -> UnmaskableError:
    return UnmaskableError(OTHER_PROMPT, f"what leads to messages[{turn}] renders otherwise once it is there")


def _reasoning(content: Chat | Text, text: str, mask: NDArray[np.bool_], encoded: Encoded) -> Iterator[tuple[int, int]]:
    """Yield where, in characters, the supervised part of a text is reasoning."""
    messages = [] if isinstance(content, Text) else content.messages
    apart = [message.get("reasoning_content", "").strip() for message in messages]
    for first, last in supervised_runs(mask):
        begin, end = int(encoded.begins[first]), int(encoded.ends[last - 1])
        for match in _REASONING.finditer(text[begin:end]):
            yield begin + match.start(), begin + match.end()
        for reasoning in filter(None, apart):
            at = text.find(reasoning, begin, end)
            if at >= 0:
                yield at, at + len(reasoning)


def supervised_runs(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return begin and end of each run of supervised tokens, int64 [runs, 2]."""
    edged = np.zeros(len(mask) + 2, np.bool_)
    edged[1:-1] = mask
    return (edged[1:] != edged[:-1]).nonzero()[0].reshape(-1, 2)


def close_turns(
    ids: NDArray[np.uint32],
    mask: NDArray[np.bool_],
    end_ids: NDArray[np.uint32],
    is_blank: Callable[[NDArray[np.uint32]], bool],
) -> NDArray[np.bool_]:
    """Return the mask with every supervised run ending at the token at which serving ends an answer.

    A run that holds such a token is cut after the last one; a run that lacks it takes it if it comes next; blanks
    that the template writes at the end of any other run are not supervised.
    """
    closed = mask.copy()
    is_end = np.zeros(len(ids), np.bool_)
    for token in end_ids.tolist():  # a few; np.isin sorts
        is_end |= ids == token
    for begin, end in supervised_runs(mask).tolist():
        ends = np.flatnonzero(is_end[begin:end])
        if len(ends):
            closed[begin + ends[-1] + 1 : end] = False
        elif end < len(ids) and is_end[end]:
            closed[end] = True
        else:
            last = end
            while last > begin and is_blank(ids[last - 1 : last]):
                last -= 1
            closed[last:end] = False
    return closed
