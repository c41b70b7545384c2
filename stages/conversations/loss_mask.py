"""A row's tokens and its loss mask: which of them are supervised, so that a draft learns from them.

With the rule `assistant` these are the assistant's words and the end-of-turn token, with `last-turn` those of the last
answer, with `all` every token. Where the chat template has generation tags they decide; otherwise the conversation is
rendered turn by turn. A plain text has no turns: all of it is supervised, save what the tokenizer adds. Tokens made
elsewhere come with their mask.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.bounds import bounded
from dflash_offline.stages.conversations.chat_tokenizer import ChatTokenizer, Encoded
from dflash_offline.stages.conversations.content import Chat, Content, Text, Tokens, gather_texts, strings
from dflash_offline.stages.conversations.rendering import (
    MOST_CHARACTERS,
    TOO_LONG,
    Rendered,
    Renderer,
    UnmaskableError,
    result,
)

if TYPE_CHECKING:  # its module loads torch, which a process that only tokenizes does without
    from dflash_offline.stages.target.files import TargetFiles

REASONING_TAGS = ("<think>", "</think>", "[THINK]", "[/THINK]")
"""Part of what a model says, even where its tokenizer flags them special."""
SPECIAL_TOKEN = "special token in content"
TOKENS_REASON = "reasoning in tokens cannot be told"
_REASONING = re.compile(
    r"(?:<think>|\A)(?:(?!<think>).)*?</think>|<think>.*\Z"
    r"|(?:\[THINK\]|\A)(?:(?!\[THINK\]).)*?\[/THINK\]|\[THINK\].*\Z"
    r"|<\|channel\|>analysis<\|message\|>.*?(?:<\|end\|>(?:<\|start\|>assistant)?|\Z)",
    re.DOTALL,
)
"""Reasoning within one answer: between its tags, up to a closing tag whose opening one the prompt held, or cut off."""


@dataclass(frozen=True)
class Tokenized:
    """The tokens of one row, and which of them are supervised."""

    input_ids: NDArray[np.uint32]
    loss_mask: NDArray[np.bool_]
    dropped: tuple[str, ...] = ()
    """Kinds of parts of the row that the chat template left out of the text."""
    notes: tuple[str, ...] = ()
    """What else is to be said of the sample, by kind."""


Part = tuple[int, Tokenized | Exception]
"""A sample of a row, or why it is none, and its number as of a `RenderedPart`."""


class ConversationEncoder:
    """Renders conversations with the target's chat template, encodes them and masks what is not to be learned."""

    def __init__(self, target: "TargetFiles", config: ExtractConfig, *, as_served: bool = True) -> None:
        """`as_served` is false for a plan of an older version, which left out what a template rewrites."""
        self.tokenizer = ChatTokenizer(target.tokenizer, config.chat_template_kwargs)
        self.config = config
        self.vocab_size = int(target.text_config.vocab_size)
        """Rows of the target's embedding table."""
        self._render = Renderer(self.tokenizer, config, as_served=as_served)
        self.as_served = self._render.as_served
        """Whether a conversation whose history the template rewrites becomes a sample an answer."""
        how = "from generation tags" if self._render.has_tags else "from rendering turn by turn"
        self.mask_rule = config.mask if config.mask == "all" else f"{config.mask}, {how}"
        """The rule and how it is followed, as the manifest says it."""
        self.mask_rule += ", without reasoning" if config.no_reasoning else ""
        self._end_ids = np.array(sorted(target.end_ids()), np.uint32)
        special = {str(token) for token in target.tokenizer.added_tokens_decoder.values() if token.special}
        spelled = sorted(special - {*REASONING_TAGS, ""}, key=len, reverse=True)
        self._special_firsts = sorted({text[0] for text in spelled})
        self._special = re.compile("|".join(map(re.escape, spelled))) if spelled else None

    def encode(self, content: Content) -> Tokenized:
        """Return tokens and mask of a row that is one sample; `UnmaskableError`, or jinja2's `TemplateError`, if it is
        none."""
        ((_, tokenized),) = self.encode_all([content])[0]
        if isinstance(tokenized, Exception):
            raise tokenized
        return tokenized

    def encode_all(self, contents: Sequence[Content]) -> list[list[Part]]:
        """Return the samples of each row, and the errors of what is none, the texts of all rows encoded together.

        Raises `OutOfBoundsError` if the template takes far too much time or memory for one of them.
        """
        rows = []
        with bounded(self.tokenizer.origin) as begin_row:
            for content in contents:
                begin_row()
                rows.append(self._parts(content))
        texts = [part for row in rows for _, part in row if isinstance(part, Rendered)]
        plain = iter(self._encoded([part for part in texts if isinstance(part.content, Text)], special_tokens=True))
        chats = iter(self._encoded([part for part in texts if isinstance(part.content, Chat)], special_tokens=False))

        def masked(part: Tokenized | Rendered | Exception) -> Tokenized | Exception:
            if isinstance(part, Rendered):
                return self._masked(part, next(chats if isinstance(part.content, Chat) else plain))
            return part

        return [[(number, masked(part)) for number, part in row] for row in rows]

    def _parts(self, content: Content) -> Sequence[tuple[int, Tokenized | Rendered | Exception]]:
        """Return the texts of a row, the row itself if it holds tokens, or why it cannot be supervised."""
        if isinstance(content, Tokens):
            return [(0, result(self._tokens_made_elsewhere, content))]
        plain = result(self._refuse_unfit, content)
        if isinstance(plain, Exception):
            return [(0, plain)]
        if isinstance(content, Text):
            return [(0, Rendered(content, content.text))]
        return self._render(content, plain=plain)

    def _encoded(self, rendered: list[Rendered], *, special_tokens: bool) -> list[Encoded | Exception]:
        """Return the tokens of texts, with those that the tokenizer adds unless a chat template has written them."""
        texts = [part.text for part in rendered]
        try:
            return [*self.tokenizer.encode(texts, add_special_tokens=special_tokens)] if texts else []
        except Exception:  # of one text or several: each is encoded alone, with an error of its own

            def alone(text: str) -> Encoded:
                return self.tokenizer.encode([text], add_special_tokens=special_tokens)[0]

            return [result(alone, text) for text in texts]

    def _masked(self, rendered: Rendered, encoded: Encoded | Exception) -> Tokenized | Exception:
        if isinstance(encoded, Exception):
            return encoded
        return Tokenized(encoded.ids, self._is_supervised(rendered, encoded), rendered.dropped, rendered.notes)

    def _is_supervised(self, rendered: Rendered, encoded: Encoded) -> NDArray[np.bool_]:
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
