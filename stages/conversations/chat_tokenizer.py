"""A target's tokenizer and chat template without the classes around them: quick to start in another process."""

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from dflash_offline.stages.conversations.content import gather_texts


@dataclass(frozen=True)
class Encoded:
    """A text's tokens, and the characters that each stands for: text[begins[i]:ends[i]]."""

    ids: NDArray[np.uint32]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    ordered: bool = False
    """Whether each token begins and ends where the one before does or later, and none is empty."""

    def within(self, begin: int, end: int) -> slice:
        """Return the run of tokens that stand for characters from `begin` to `end` alone."""
        if self.ordered:
            return slice(int(self.begins.searchsorted(begin)), int(self.ends.searchsorted(end, "right")))
        return self._run((self.begins >= begin) & (self.ends <= end))

    def touching(self, begin: int, end: int) -> slice:
        """Return the run of tokens that stand for some character from `begin` to `end`."""
        if self.ordered:
            return slice(int(self.ends.searchsorted(begin, "right")), int(self.begins.searchsorted(end)))
        return self._run((self.ends > begin) & (self.begins < end))

    def _run(self, chosen: NDArray[np.bool_]) -> slice:
        """Return the tokens from the first chosen one to the last.

        Tokens that stand for no character are neither the first nor the last: a tokenizer that trims places gives
        blanks none, within an answer as well as around it.
        """
        places = np.flatnonzero(chosen & (self.ends > self.begins))
        return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0)


class ChatTokenizer:
    """Renders conversations and encodes texts just as transformers' fast tokenizers do. Can be sent to a process."""

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any]) -> None:
        """`tokenizer` is a transformers tokenizer with a Rust backend; `template_kwargs` are given to its template."""
        given = {**tokenizer.special_tokens_map, **template_kwargs}
        self._tools = given.pop("tools", None)
        self._documents = given.pop("documents", None)
        template = given.pop("chat_template", None)
        self.origin = template_origin(tokenizer, template_kwargs)
        """Whose template it is, as errors name it."""
        self._variables = given
        self._is_plain = self._tools is None and self._documents is None and gather_texts(given, [])
        # A tokenizer may have a template of its own for rows with tools.
        self._templates = [tokenizer.get_chat_template(template, tools) for tools in (None, list[Any]([{}]))]
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        self._split_special = bool(tokenizer.split_special_tokens)
        self._own = tokenizer if _encodes_its_own_way(tokenizer) else None
        self._pieces = _byte_pieces(self.backend)
        self._num_bytes = None if self._pieces is None else np.array([len(piece) for piece in self._pieces], np.int64)
        self._adds_none = self.backend.num_special_tokens_to_add(False) == 0

    @property
    def template(self) -> str:
        """The text of the chat template in use: the target's own, unless the arguments name or give another."""
        text: str = self._templates[0]
        return text

    @property
    def portable(self) -> bool:
        """Whether this can be sent to a process that has not loaded the tokenizer's own classes."""
        return self._own is None

    def render(self, messages: Sequence[Any], tools: Any = None, *, prompt: bool = False, plain: bool = False) -> str:
        """Return the conversation's text, with `prompt` up to where an answer begins.

        `plain` says that messages and tools are of JSON's types and hold no reasoning: then nothing needs to be copied
        and converted first, which takes as long as the rendering.
        """
        if not plain or not self._is_plain:
            return str(self._convert_and_render(messages, tools, add_generation_prompt=prompt)[0][0])
        return str(_compiled(self._templates[tools is not None]).render(self._given(messages, tools, prompt)))

    def render_tagged(
        self, messages: Sequence[Any], tools: Any = None, *, plain: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the conversation's text, and begin and end of what stands in the template's generation tags."""
        if not plain or not self._is_plain:
            texts, spans_of = self._convert_and_render(messages, tools, return_assistant_tokens_mask=True)
            return texts[0], spans_of[0]
        template = _compiled(self._templates[tools is not None])
        blocks, spans = list[str](), list[tuple[int, int]]()
        with template.environment.activate_tracker(blocks, spans):
            for block in template.generate(self._given(messages, tools, prompt=False)):
                blocks.append(block)
        return "".join(blocks), spans

    def _given(self, messages: Sequence[Any], tools: Any, prompt: bool) -> dict[str, Any]:
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        return given | self._variables

    def _convert_and_render(self, messages: Sequence[Any], tools: Any, **settings: bool) -> tuple[list[str], Any]:
        tools = tools or self._tools
        rendered: tuple[list[str], Any] = render_jinja_template(
            [messages],
            tools=tools,
            documents=self._documents,
            chat_template=self._templates[tools is not None],
            **settings,
            **self._variables,
        )
        return rendered

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens, special ones included."""
        text: str = self.backend.decode(ids, skip_special_tokens=False)
        return text

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[Encoded]:
        """Return each text's tokens and their places."""
        if self._own is not None:
            return [_from_mapping(self._own, text, add_special_tokens) for text in texts]
        if self.backend.encode_special_tokens != self._split_special:
            self.backend.encode_special_tokens = self._split_special
        if self._pieces is None or (add_special_tokens and not self._adds_none):
            whole = self.backend.encode_batch(texts, add_special_tokens=add_special_tokens)
            return [_encoded(encoding.ids, encoding.offsets) for encoding in whole]
        quick = self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [self._placed(text, encoding.ids) for text, encoding in zip(texts, quick, strict=True)]

    def _placed(self, text: str, tokens: list[int]) -> Encoded:
        """Return a text's tokens and their places, by the bytes that each token spells.

        To have the library keep track of places costs half as much again as the tokens themselves. Where the tokens
        together spell another text, as after a normalizer that changes it, the library is asked after all.
        """
        assert self._pieces is not None and self._num_bytes is not None
        content = text.encode()
        if b"".join([self._pieces[token] for token in tokens]) != content:
            whole = self.backend.encode(text, add_special_tokens=False)
            return _encoded(whole.ids, whole.offsets)
        ids = np.frombuffer(array("I", tokens), np.uint32)
        lengths = self._num_bytes[ids]
        ends = lengths.cumsum()
        begins = ends - lengths
        if len(content) > len(text):
            starts_one = (np.frombuffer(content, np.uint8) & 0xC0) != 0x80
            character = starts_one.cumsum() - 1
            begins, ends = character[begins], character[ends - 1] + 1
        return Encoded(ids, begins, ends, ordered=True)


def template_origin(tokenizer: Any, template_kwargs: Mapping[str, Any]) -> str:
    """Return how an error names the chat template that renders."""
    given = template_kwargs.get("chat_template")
    return "The chat template of --chat-template-kwargs" if given else f"The chat template of {tokenizer.name_or_path}"


@cache
def _compiled(template: str) -> Any:
    """Return the template as transformers compiles it."""
    compiled = _compile_jinja_template(template)
    compiled.globals = dict(compiled.globals)  # a chain of dicts takes longer to copy, for every text, than to render
    return compiled


def _encoded(ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
    begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    return Encoded(np.array(ids, np.uint32), begins, ends)


def _from_mapping(tokenizer: Any, text: str, add_special_tokens: bool) -> Encoded:
    encoding = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    return _encoded(encoding["input_ids"], encoding["offset_mapping"])


def _encodes_its_own_way(tokenizer: Any) -> bool:
    """Say whether the tokenizer's class, as some models bring, changes how transformers encodes a text."""
    usual = next((base for base in type(tokenizer).__mro__ if base.__module__ in _USUAL_MODULES), type(tokenizer))
    names = ("__call__", "_encode_plus", "_convert_encoding")
    return any(getattr(type(tokenizer), name) is not getattr(usual, name) for name in names)


_USUAL_MODULES = ("transformers.tokenization_utils_tokenizers", "transformers.tokenization_utils_fast")


def _byte_pieces(backend: Tokenizer) -> list[bytes] | None:
    """Return the bytes that each token spells, if the tokenizer is one of byte-level BPE that reports plain places."""
    document = json.loads(backend.to_str())
    model, decoder, after = (document[name] or {} for name in ("model", "decoder", "post_processor"))
    steps = [after, *after.get("processors", [])]
    if model.get("type") != "BPE" or decoder.get("type") != "ByteLevel" or any(s.get("trim_offsets") for s in steps):
        return None
    vocabulary: dict[str, int] = model["vocab"]
    added: dict[int, str] = {token["id"]: token["content"] for token in document["added_tokens"]}
    pieces = [_NO_TEXT] * (1 + max([*vocabulary.values(), *added], default=0))
    byte_of = {character: byte for byte, character in enumerate(_BYTE_CHARACTERS)}
    for token, index in vocabulary.items():
        if all(character in byte_of for character in token):
            pieces[index] = bytes(byte_of[character] for character in token)
    for index, content in added.items():
        pieces[index] = content.encode()
    return pieces


def _byte_characters() -> list[str]:
    """Return the character that stands for each byte in byte-level vocabularies: itself where it can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return [chr(256 + unseen.index(byte)) if byte in unseen else chr(byte) for byte in range(256)]


_BYTE_CHARACTERS = _byte_characters()
_NO_TEXT = b"\xff"
"""The bytes of a token that spells no text: no text holds this byte."""
