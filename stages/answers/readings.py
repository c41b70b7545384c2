"""What generated tokens say as a turn of a conversation: the reading that the chat template writes back as them.

An answer is kept as content, reasoning and calls, and a draft trains on what the chat template makes of these. So each
way to read the tokens is rendered and encoded again, and the first whose tokens are those generated is taken.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dflash_offline.stages.answers.advice import EMPTY, OTHER_TOKENS, REWRITTEN, SPECIAL
from dflash_offline.stages.answers.dialogues import Answer, Message, with_recorded_ids
from dflash_offline.stages.conversations.chat_tokenizer import ChatTokenizer
from dflash_offline.stages.conversations.content import REASONING_KEYS, read_messages, shown, strings
from dflash_offline.stages.conversations.loss_mask import REASONING_TAGS
from dflash_offline.stages.conversations.rendering import MOST_CHARACTERS, ROW_ERRORS
from dflash_offline.stages.target.files import TargetFiles

_OPENED = re.compile(r"(?:<think>|\[THINK\])\s*\Z")
"""A thought that the prompt opens, so that the answer only closes it."""
_CONTENT, _REASONING = "qzcontentzq", "qzreasoningzq"
"""Words that stand for an answer's parts, to see what the template writes around them."""
_TAGGED_CALLS = {
    "start_anchor_pattern": r"\A",
    "defaults": {"role": "assistant"},
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "content": {},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}
"""How most templates that take calls as JSON have them written, for tokenizers that do not say it."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the target was given, up to where its answer begins."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    recorded: list[Message]
    """The calls that the old answer makes."""
    text: str
    ids: list[int]


class AnswerReader:
    """Renders what is asked, and reads what is answered."""

    def __init__(self, files: TargetFiles, chat_template_kwargs: Mapping[str, Any], *, keep_rewritten: bool) -> None:
        self._tokenizer = files.tokenizer
        self._chat = ChatTokenizer(files.tokenizer, chat_template_kwargs)
        self.template_origin = self._chat.origin
        """Whose template it is, as errors name it."""
        self._end_ids = files.end_ids()
        self._ends = {"", *(self._decode([token]).strip() for token in self._end_ids)}
        self._keep_rewritten = keep_rewritten
        self.response_template: dict[str, Any] | None = getattr(files.tokenizer, "response_template", None)
        """How the tokenizer says that answers are to be read."""
        added = files.tokenizer.added_tokens_decoder.items()
        special = {i: str(token) for i, token in added if token.special and str(token) not in REASONING_TAGS}
        self._special_ids = set(special)
        self._special = re.compile("|".join(map(re.escape, sorted(special.values(), key=len, reverse=True))) or r"\Z.")

    def ask(self, messages: list[Message], tools: list[dict[str, Any]] | None, recorded: list[Message]) -> Asked:
        """Return a prompt's text and tokens, none of a text that is far too long; `ROW_ERRORS` if it is refused."""
        given = [_under_all_names(message) for message in messages]
        text = self._chat.render(given, tools, prompt=True)
        ids = self._chat.encode([text])[0].ids.tolist() if len(text) <= MOST_CHARACTERS else []
        return Asked(messages=messages, tools=tools, recorded=recorded, text=text, ids=ids)

    def read(self, asked: Asked, ids: list[int], turn: int) -> Answer:
        """Return the answer that tokens are, of which the last ends it, or why they are none that trains on them."""
        said = self._decode(ids[:-1])
        fault, detail = "", ""
        kept: Message | None = None
        for message in self._readings(asked, said, self._decode(ids[-1:])):
            if not (message["content"].strip() or message.get("tool_calls")):
                continue
            if any(self._special.search(text) for _, text in strings(message)):
                continue
            why, what = self._differs(asked, message, ids, said)
            if not why:
                return _answer(message, compared=True)
            kept = kept or message
            if not fault or why == OTHER_TOKENS:
                fault, detail = why, what
        if kept is not None:
            return _answer(kept) if self._keep_rewritten else Answer(fault=fault, detail=f"turn {turn}: {detail}")
        special = next((token for token in ids[:-1] if token in self._special_ids), None)
        if special is not None:
            return Answer(fault=SPECIAL, detail=f"turn {turn}: {self._tokenizer.convert_ids_to_tokens(special)}")
        return Answer(fault=EMPTY, detail=f"turn {turn}")

    def _readings(self, asked: Asked, said: str, end: str) -> Iterator[Message]:
        """Yield ways to read what was said as an answer, the ones that keep more of its structure first."""
        if self.response_template is not None:
            yield from self._parsed(asked, said + end, self.response_template, asked.text)
            yield from self._parsed(asked, said, self.response_template, asked.text)
        opening = match.group() if (match := _OPENED.search(asked.text)) else ""
        if asked.tools or asked.recorded:
            yield from self._parsed(asked, opening + said, _TAGGED_CALLS, "")
        yield _message(said)
        if opening:
            yield _message(opening + said)
        yield from self._unwrapped(asked, said)

    def _parsed(self, asked: Asked, text: str, template: dict[str, Any], prefix: str) -> Iterator[Message]:
        """Yield what a response template reads, if it can."""
        try:
            parsed = self._tokenizer.parse_response(text, template, prefix=prefix, tools=asked.tools)
            reasoning = next((parsed[key] for key in REASONING_KEYS if parsed.get(key)), None)
            message = _message(parsed.get("content") or "", reasoning)
            if calls := parsed.get("tool_calls"):
                read = read_messages({"messages": [{**message, "tool_calls": calls}]}).messages[0]
                message["tool_calls"] = with_recorded_ids(read["tool_calls"], asked.recorded)
            if all(isinstance(message.get(key, ""), str) for key in ("content", "reasoning_content")):
                yield message
        except (*ROW_ERRORS, AttributeError, LookupError):
            return

    def _unwrapped(self, asked: Asked, said: str) -> Iterator[Message]:
        """Yield what was said without what the template itself writes around an answer's parts."""
        for reasoning in (_REASONING, None):
            written = self._written(asked, _message(_CONTENT, reasoning))
            if written is None or not written.startswith(asked.text):
                continue
            before, found, _ = written[len(asked.text) :].partition(_CONTENT)
            thought_before, _, between = before.partition(_REASONING) if reasoning else ("", "", before)
            if not found or (reasoning and _REASONING not in before):
                continue
            pattern = re.escape(thought_before) + ("(.*?)" if reasoning else "()") + re.escape(between) + "(.*)"
            if match := re.fullmatch(pattern, said, re.DOTALL):
                yield _message(match[2], match[1] or None)

    def _differs(self, asked: Asked, message: Message, ids: list[int], said: str) -> tuple[str, str]:
        """Return why, and where, an answer's tokens in a training sample are not the generated ones; empty if they are.

        Any token that ends an answer may stand for another; a template may also write none, and blanks.
        """
        text = self._written(asked, message)
        if text is None:
            return REWRITTEN, "it is refused once the answer is there"
        written = self._chat.encode([text])[0].ids.tolist()
        whole, wanted = asked.text + said, [*asked.ids, *ids[:-1]]
        rest = written[len(wanted) :]
        if written[: len(wanted)] == wanted:
            if not rest or rest[0] in self._end_ids or not self._decode(rest).strip():
                return "", ""
        elif text.startswith(whole) and text[len(whole) :].strip() in self._ends:
            return OTHER_TOKENS, self._other_token(wanted, written)
        same = next(
            (i for i, (a, b) in enumerate(zip(whole, text, strict=False)) if a != b), min(len(whole), len(text))
        )
        begin = max(same - 20, 0)
        return REWRITTEN, f"{shown(whole[begin : same + 20])} is written {shown(text[begin : same + 20])}"

    def _other_token(self, wanted: list[int], written: list[int]) -> str:
        place = next((i for i, (a, b) in enumerate(zip(wanted, written, strict=False)) if a != b), len(wanted))
        tokens = [self._tokenizer.convert_ids_to_tokens(row[place : place + 3]) for row in (wanted, written)]
        return f"{shown(tokens[0])} is encoded {shown(tokens[1])}"

    def _written(self, asked: Asked, message: Message) -> str | None:
        """Return the text of the conversation with an answer as a training sample has it, None if it has none."""
        try:
            chat = read_messages({"messages": [*asked.messages, message], "tools": asked.tools})
            return self._chat.render(chat.messages, chat.tools)
        except ROW_ERRORS:
            return None

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _message(content: str, reasoning: str | None = None) -> Message:
    return {"role": "assistant", "content": content} | ({} if reasoning is None else {"reasoning_content": reasoning})


def _answer(message: Message, *, compared: bool = False) -> Answer:
    return Answer(
        content=message["content"],
        reasoning=message.get("reasoning_content"),
        calls=message.get("tool_calls"),
        compared=compared,
    )


def _under_all_names(message: Message) -> Message:
    """Return a message as `read_messages` gives it back: with its reasoning under every name that templates know."""
    reasoning = message.get(REASONING_KEYS[0])
    return message if reasoning is None else {**message, **dict.fromkeys(REASONING_KEYS, reasoning)}
