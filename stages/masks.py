"""From what a row says to tokens and the mask of those that a draft learns from."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.config import ExtractConfig
from dflash_offline.stages.conversations import Chat, Content, Text, Tokens, strings, template_kwargs
from dflash_offline.stages.target import TargetFiles

REASONING_TAGS = ("<think>", "</think>", "[THINK]", "[/THINK]")
"""Part of what a model says, even where its tokenizer flags them special."""
MOST_CHARACTERS = 1 << 22
"""Of one row: about a million tokens, which take some 800 MiB while they are made."""
_REASONING = re.compile(
    r"(?:<think>|\A)(?:(?!<think>).)*?</think>|<think>.*\Z"
    r"|(?:\[THINK\]|\A)(?:(?!\[THINK\]).)*?\[/THINK\]|\[THINK\].*\Z"
    r"|<\|channel\|>analysis<\|message\|>.*?(?:<\|end\|>(?:<\|start\|>assistant)?|\Z)",
    re.DOTALL,
)
"""Reasoning within one answer: between its tags, up to a closing tag whose opening one the prompt held, or cut off."""


class UnmaskableError(Exception):
    """This row's supervised tokens cannot be told; the arguments are a reason to count by, and the detail."""


@dataclass(frozen=True)
class Tokenized:
    """One row as the target sees it."""

    input_ids: NDArray[np.uint32]
    loss_mask: NDArray[np.bool_]


@dataclass(frozen=True)
class _Marked:
    """Tokens, which of them are supervised, and the characters each one stands for."""

    ids: NDArray[np.uint32]
    mask: NDArray[np.bool_]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]


class Masker:
    """Renders conversations with the target's chat template and marks the tokens to learn from.

    With the rule `assistant` these are the assistant's words and the end-of-turn token, with `last-turn` those of the
    last answer, with `all` every token. Where the template has generation tags they decide; otherwise the conversation
    is rendered turn by turn, which is accepted only if each rendering is a true prefix of the next. A plain text has no
    turns: all of it is supervised, save what the tokenizer adds. Tokens made elsewhere come with their mask.
    """

    def __init__(self, target: TargetFiles, config: ExtractConfig) -> None:
        self.tokenizer = target.tokenizer
        self.config = config
        self.tagged = re.search(r"\{%-?\s*generation\s*-?%\}", target.template) is not None
        how = "from generation tags" if self.tagged else "from rendering turn by turn"
        self.rule = config.mask if config.mask == "all" else f"{config.mask}, {how}"
        self.rule += ", without reasoning" if config.no_reasoning else ""
        self.end_ids = np.array(sorted(target.end_ids()), np.uint32)
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        spelled = sorted({*special} - {*REASONING_TAGS, ""}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, spelled))) if spelled else None

    def tokenize(self, content: Content) -> Tokenized:
        """Return tokens and mask; `UnmaskableError`, or jinja2's `TemplateError`, if this row has none."""
        if isinstance(content, Tokens):
            return self._given(content)
        self._refuse_unfit(content)
        if self.config.mask == "all" or isinstance(content, Text):
            marked = self._encode(self._text(content), add_special_tokens=isinstance(content, Text))
            mask = (marked.ends > marked.begins) | (self.config.mask == "all")
        else:
            marked = self._from_tags(content) if self.tagged else self._from_prefixes(content)
            mask = close_turns(marked.ids, marked.mask, self.end_ids, self._is_blank)
        if self.config.no_reasoning:
            text, begins, ends = self._text(content), marked.begins, marked.ends
            for begin, end in list(_reasoning(content, text, mask, marked)):
                words = end + len(text[end:]) - len(text[end:].lstrip())
                mask &= ~(((ends > begin) & (begins < end)) | ((begins >= end) & (ends <= words)))
        return Tokenized(marked.ids, mask)

    def _given(self, tokens: Tokens) -> Tokenized:
        mask = np.array(tokens.loss_mask, np.bool_)
        if self.config.no_reasoning:
            raise UnmaskableError("reasoning in tokens cannot be told", "the row holds tokens, not text")
        if self.config.mask == "all":
            mask[:] = True
        elif self.config.mask == "last-turn":
            runs = supervised_runs(mask)
            mask[: runs[-1, 0] if len(runs) else 0] = False
        return Tokenized(np.array(tokens.input_ids, np.uint32), mask)

    def _refuse_unfit(self, content: Chat | Text) -> None:
        texts = list(strings({"text": content.text} if isinstance(content, Text) else vars(content)))
        size = sum(len(text) for _, text in texts)
        if size > MOST_CHARACTERS:
            raise UnmaskableError("far too long", f"{size:,} characters; at most {MOST_CHARACTERS:,} are tokenized")
        if self._special is None or self.config.keep_special_tokens:
            return
        for place, text in texts:
            if found := self._special.search(text):
                raise UnmaskableError("special token in content", f"{place} spells {found.group()!r}")

    def _is_blank(self, ids: NDArray[np.uint32]) -> bool:
        return not self.tokenizer.decode(ids.tolist()).strip()

    def _text(self, content: Chat | Text) -> str:
        return content.text if isinstance(content, Text) else self._render(content)

    def _render(self, chat: Chat, turns: int | None = None, *, prompt: bool = False) -> str:
        """Return the text of the first `turns` messages, or of all."""
        text: str = self.tokenizer.apply_chat_template(
            chat.messages[:turns],
            tokenize=False,
            add_generation_prompt=prompt,
            **template_kwargs(self.config.chat_template_kwargs, chat.tools),
        )
        return text

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> _Marked:
        encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        return _marked(encoded, np.zeros(len(encoded["input_ids"]), np.bool_))

    def _from_tags(self, chat: Chat) -> _Marked:
        encoded = self.tokenizer.apply_chat_template(
            chat.messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
            **template_kwargs(self.config.chat_template_kwargs, chat.tools),
        )
        marked = _marked(encoded, np.array(encoded["assistant_masks"], np.bool_))
        turns = _answers(chat)
        if self.config.mask == "last-turn" and turns:
            before = self._render(chat, turns[-1]) if turns[-1] else ""
            if not self._render(chat).startswith(before):
                raise _rewritten(turns[-1], "once it is there")
            marked.mask[marked.begins < len(before)] = False
        return marked

    def _from_prefixes(self, chat: Chat) -> _Marked:
        text = self._render(chat)
        marked = self._encode(text)
        turns = _answers(chat)
        for turn in turns[-1:] if self.config.mask == "last-turn" else turns:
            if turn == 0:
                raise UnmaskableError(
                    "begins with an assistant turn", "its first token cannot be told without a prompt"
                )
            before, through = self._render(chat, turn, prompt=True), self._render(chat, turn + 1)
            if not through.startswith(before):
                raise _rewritten(turn, "once it is there")
            if not text.startswith(through):
                raise UnmaskableError(
                    "template rewrites history", f"messages[{turn}] renders otherwise when more follows"
                )
            inside = (marked.begins >= len(before)) & (marked.ends <= len(through)) & (marked.ends > marked.begins)
            marked.mask[inside] = True
        return marked


def _marked(encoded: Any, mask: NDArray[np.bool_]) -> _Marked:
    begins, ends = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
    return _Marked(np.array(encoded["input_ids"], np.uint32), mask, begins, ends)


def _answers(chat: Chat) -> list[int]:
    return [turn for turn, message in enumerate(chat.messages) if message["role"] == "assistant"]


def _rewritten(turn: int, when: str) -> UnmaskableError:
    return UnmaskableError("template rewrites history", f"what leads to messages[{turn}] renders otherwise {when}")


def _reasoning(content: Chat | Text, text: str, mask: NDArray[np.bool_], marked: _Marked) -> Iterator[tuple[int, int]]:
    """Yield where, in characters, the supervised part of a text is reasoning."""
    said = [] if isinstance(content, Text) else [message.get("reasoning_content", "") for message in content.messages]
    for first, last in supervised_runs(mask):
        begin, end = int(marked.begins[first]), int(marked.ends[last - 1])
        for found in _REASONING.finditer(text[begin:end]):
            yield begin + found.start(), begin + found.end()
        for reasoning in filter(None, map(str.strip, said)):
            at = text.find(reasoning, begin, end)
            if at >= 0:
                yield at, at + len(reasoning)


def supervised_runs(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return begin and end of each run of supervised tokens, int64 [runs, 2]."""
    return np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))).reshape(-1, 2)


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
    for begin, end in supervised_runs(mask):
        ends = np.flatnonzero(np.isin(ids[begin:end], end_ids))
        if len(ends):
            closed[begin + ends[-1] + 1 : end] = False
        elif end < len(ids) and ids[end] in end_ids:
            closed[end] = True
        else:
            last = end
            while last > begin and is_blank(ids[last - 1 : last]):
                last -= 1
            closed[last:end] = False
    return closed
