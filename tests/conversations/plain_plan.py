"""Planning row by row, plainly: transformers' own rendering, encoding, offsets and assistant masks, one text at a
time. Slow, and the measure of the plan that is made in batches and processes."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations.content import (
    Chat,
    Content,
    RowFaultError,
    Text,
    Tokens,
    content_hash,
    read_content,
    strings,
    template_kwargs,
)
from dflash_offline.stages.conversations.files import Row
from dflash_offline.stages.conversations.loss_mask import MOST_CHARACTERS, REASONING_TAGS, UnmaskableError, close_turns
from dflash_offline.stages.conversations.sources import Data
from dflash_offline.stages.target.files import TargetFiles


@dataclass
class PlainPlan:
    """Everything that a plan says, in lists."""

    samples: list[tuple[str, int, list[int], list[bool], int]] = field(default_factory=list)
    """Source, line, tokens, mask and number of anchors."""
    rejects: list[tuple[str, int, str, str]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    supervised_cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Samples some part of which is not in the text, by its kind."""


def plain_plan(config: ExtractConfig, files: TargetFiles) -> PlainPlan:
    """Return the plan of all rows of the data."""
    data, plan, seen = Data(config), PlainPlan(), set[bytes]()
    for row in data.rows():
        try:
            ids, mask, dropped = _row(row, config, data, files, plan, seen)
        except UnmaskableError as error:
            plan.rejects.append((row.source.name, row.line, *error.args))
            continue
        except RowFaultError as error:
            plan.rejects.append((row.source.name, row.line, "bad row", str(error)))
            continue
        except (TemplateError, ValueError, TypeError, RecursionError) as error:
            detail = f"is refused by the chat template ({str(error)[:200]})"
            plan.rejects.append((row.source.name, row.line, "bad row", detail))
            continue
        if len(ids) > config.max_length:
            plan.truncated += 1
            plan.supervised_cut += sum(mask[config.max_length :])
            ids, mask = ids[: config.max_length], mask[: config.max_length]
        anchors = sum(mask[: max(0, len(mask) - config.block_size + 1)])
        if anchors:
            plan.samples.append((row.source.name, row.line, ids, mask, anchors))
            plan.dropped.update(dropped)
        else:
            reason = "supervised part too near the end"
            reason = "shorter than one block" if len(ids) < config.block_size else reason
            reason = reason if any(mask) else "no supervised token"
            plan.rejects.append((row.source.name, row.line, reason, f"{len(ids)} tokens"))
    return plan


def _row(
    row: Row, config: ExtractConfig, data: Data, files: TargetFiles, plan: PlainPlan, seen: set[bytes]
) -> tuple[list[int], list[bool], set[str]]:
    if row.fault:
        raise RowFaultError(row.fault)
    row_format, content = read_content(row.value, data.format.row_format)
    plan.formats[f"{row.source.container}, {row_format}"] += 1
    if config.drop_duplicates:
        digest = content_hash(content)
        if digest in seen:
            raise UnmaskableError("duplicate", "says exactly what an earlier row says")
        seen.add(digest)
    ids, mask = plain_tokens(content, config, files)
    if not isinstance(content, Chat):
        return ids, mask, set()
    return ids, mask, plain_dropped(content, render(content, config, files, len(content.messages)), config)


def plain_tokens(content: Content, config: ExtractConfig, files: TargetFiles) -> tuple[list[int], list[bool]]:
    """Return a row's tokens and mask under the rules `assistant`, `last-turn` and `all`, reasoning included."""
    if isinstance(content, Tokens):
        mask = [bool(one) or config.mask == "all" for one in content.loss_mask]
        if config.mask == "last-turn":
            begins = [i for i, one in enumerate(mask) if one and (i == 0 or not mask[i - 1])]
            mask = [one and i >= begins[-1] for i, one in enumerate(mask)]
        return content.input_ids, mask
    _refuse(content, config, files)
    tokenizer = files.tokenizer
    if config.mask == "all" or isinstance(content, Text):
        text = content.text if isinstance(content, Text) else render(content, config, files, len(content.messages))
        made = tokenizer(text, add_special_tokens=isinstance(content, Text), return_offsets_mapping=True)
        mask = [config.mask == "all"] * len(made["input_ids"])
        _mark(mask, [i for i, (begin, end) in enumerate(made["offset_mapping"]) if begin < end])
        return made["input_ids"], mask
    template = config.chat_template_kwargs.get("chat_template", files.template)
    mask_of = _from_tags if "{% generation %}" in template else _from_prefixes
    ids, mask, parts = mask_of(content, config, files)
    dropped = plain_dropped(content, render(content, config, files, len(content.messages)), config)
    for turn, part in parts if dropped & {"answers", "tool calls"} else []:
        message = content.messages[turn]
        said = [_words_of(message), message.get("reasoning", "").strip()]
        said += [call["function"]["name"] for call in message.get("tool_calls", [])]
        if not [one for one in said if one and _stands_in(one, part)]:
            raise UnmaskableError("template writes nothing of an answer", f"of messages[{turn}] nothing is in the text")
    closed = close_turns(
        np.array(ids, np.uint32),
        np.array(mask, np.bool_),
        np.array(sorted(files.end_ids()), np.uint32),
        lambda part: not tokenizer.decode(part.tolist()).strip(),
    )
    return ids, closed.tolist()


def _refuse(content: Chat | Text, config: ExtractConfig, files: TargetFiles) -> None:
    texts = list(strings(vars(content)))
    if (size := sum(len(text) for _, text in texts)) > MOST_CHARACTERS:
        raise UnmaskableError("far too long", f"{size:,} characters; at most {MOST_CHARACTERS:,} are tokenized")
    tokens = {str(token) for token in files.tokenizer.added_tokens_decoder.values() if token.special}
    for place, text in texts if not config.keep_special_tokens else []:
        found = [(text.find(token), -len(token), token) for token in tokens - {*REASONING_TAGS} if token in text]
        if found:
            raise UnmaskableError("special token in content", f"{place} spells {min(found)[2]!r}")


def render(chat: Chat, config: ExtractConfig, files: TargetFiles, turns: int, *, prompt: bool = False) -> str:
    """Return the text of the first messages, as transformers renders it."""
    kwargs = template_kwargs(config.chat_template_kwargs, chat.tools)
    messages = chat.messages[:turns]
    text = files.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **kwargs)
    return str(text)


Parts = list[tuple[int, str]]
"""Supervised turns, each with its part of the text."""


def plain_dropped(chat: Chat, text: str, config: ExtractConfig) -> set[str]:
    """Return the kinds of parts of a conversation that are not in its text, each looked for from the beginning."""
    kinds = {"system": "system turns", "developer": "developer turns", "user": "user turns", "assistant": "answers"}
    kinds["tool"] = "tool results"
    whole = [_words_of(message) for message in chat.messages if _words_of(message) in text]
    last = max(_answers(chat), default=0)
    dropped = set()
    for turn, message in enumerate(chat.messages):
        words, role = _words_of(message), message["role"]
        times = sum(other.count(words) for other in whole) if words in whole and words else 0
        is_short = role in ("developer", "tool") and len(words) < 64
        if not _stands_in(words, text) or (is_short and text.count(words) < times):
            dropped.add(kinds[role])
        judged = role == "assistant" and (turn == last or config.mask != "last-turn")
        if judged and not _stands_in(message.get("thinking", "").strip(), text):
            dropped.add("reasoning")
    calls = [call["function"] for message in chat.messages for call in message.get("tool_calls", [])]
    tools = [one.get("function", one) for one in chat.tools or config.chat_template_kwargs.get("tools", [])]
    names = Counter(call["name"] for call in calls)
    places = {name: text.count(name) - sum(words.count(name) for words in whole) for name in names}
    for tool in tools:
        name = tool.get("name")
        if not isinstance(name, str) or not name:
            continue
        about = tool.get("description", "").strip() or " ".join(tool.get("parameters", {}).get("properties", {}))
        found = _stands_in(about, text) and name in text
        if name in names and not about:
            found = places[name] > names[name]
        dropped |= set() if found else {"tools"}
        if name in names:
            places[name] -= found
    arguments = [" ".join(text for _, text in strings(call["arguments"])) for call in calls]
    if any(places[name] < times for name, times in names.items()) or not all(_stands_in(a, text) for a in arguments):
        dropped.add("tool calls")
    return dropped


def _words_of(message: dict[str, Any]) -> str:
    content = str(message["content"])
    if message["role"] == "assistant":
        content = content.split("</think>")[-1].split("[/THINK]")[-1]
    return content.strip()


def _stands_in(part: str, text: str) -> bool:
    """Say whether the part is in the text, or three of four of its eight longest words."""
    words = sorted({*re.split(r"\W+", part)} - {""}, key=lambda word: (-len(word), word))[:8]
    if part in text or not words:
        return part in text or any(character in text for character in part)
    spelled = [{word.lower(), json.dumps(word).strip('"').lower()} for word in words]
    return sum(any(one in text.lower() for one in ways) for ways in spelled) >= 0.75 * len(words)


def _from_tags(chat: Chat, config: ExtractConfig, files: TargetFiles) -> tuple[list[int], list[bool], Parts]:
    made: Any = files.tokenizer.apply_chat_template(
        chat.messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
        **template_kwargs(config.chat_template_kwargs, chat.tools),
    )
    [text], [spans] = render_jinja_template(
        [chat.messages],
        return_assistant_tokens_mask=True,
        **{"chat_template": files.template, **template_kwargs(config.chat_template_kwargs, chat.tools)},
        **files.tokenizer.special_tokens_map,
    )
    mask = [False] * len(made["input_ids"])
    for first, last in spans:
        places = enumerate(made["offset_mapping"])
        _mark(mask, [i for i, (begin, end) in places if max(begin, first) < min(end, last)])
    # Of a character that several tokens spell, transformers' own mask has the first token alone.
    assert all(one for one, theirs in zip(mask, made["assistant_masks"], strict=True) if theirs)
    turns = _answers(chat)
    if config.mask == "last-turn" and turns:
        before = render(chat, config, files, turns[-1]) if turns[-1] else ""
        if not render(chat, config, files, len(chat.messages)).startswith(before):
            raise _without_its_prompt(turns[-1])
        mask = [one and begin >= len(before) for one, (begin, _) in zip(mask, made["offset_mapping"], strict=True)]
    pairs = zip(turns, spans, strict=True) if len(turns) == len(spans) else []
    parts = [(turn, text[begin:end]) for turn, (begin, end) in pairs]
    return made["input_ids"], mask, parts[-1:] if config.mask == "last-turn" else parts


def _from_prefixes(chat: Chat, config: ExtractConfig, files: TargetFiles) -> tuple[list[int], list[bool], Parts]:
    text = render(chat, config, files, len(chat.messages))
    made: Any = files.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [False] * len(made["input_ids"])
    turns, parts = _answers(chat), []
    for turn in turns[-1:] if config.mask == "last-turn" else turns:
        if turn == 0:
            raise UnmaskableError("begins with an assistant turn", "its first token cannot be told without a prompt")
        before = render(chat, config, files, turn, prompt=True)
        through = render(chat, config, files, turn + 1)
        if not through.startswith(before):
            raise _without_its_prompt(turn)
        if not text.startswith(through):
            raise UnmaskableError("template rewrites history", f"messages[{turn}] renders otherwise when more follows")
        places = enumerate(made["offset_mapping"])
        _mark(mask, [i for i, (begin, end) in places if len(before) <= begin < end <= len(through)])
        parts.append((turn, text[len(before) : len(through)]))
    return made["input_ids"], mask, parts


def _mark(mask: list[bool], tokens: list[int]) -> None:
    """Supervise the tokens from the first to the last: between them may be blanks whose places were trimmed away."""
    if tokens:
        mask[tokens[0] : tokens[-1] + 1] = [True] * (tokens[-1] + 1 - tokens[0])


def _answers(chat: Chat) -> list[int]:
    return [turn for turn, message in enumerate(chat.messages) if message["role"] == "assistant"]


def _without_its_prompt(turn: int) -> UnmaskableError:
    detail = f"what leads to messages[{turn}] renders otherwise once it is there"
    return UnmaskableError("answer does not follow its prompt", detail)
