"""Planning row by row, plainly: transformers' own rendering, encoding, offsets and assistant masks, one text at a
time. Slow, and the measure of the plan that is made in batches and processes."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
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
from dflash_offline.stages.conversations.loss_mask import REASONING_TAGS, close_turns
from dflash_offline.stages.conversations.rendering import MOST_CHARACTERS, UnmaskableError
from dflash_offline.stages.conversations.sources import Data
from dflash_offline.stages.target.files import TargetFiles


@dataclass
class PlainPlan:
    """Everything that a plan says, in lists."""

    samples: list[tuple[str, int, int, list[int], list[bool], int]] = field(default_factory=list)
    """Source, line, answer, tokens, mask and number of anchors."""
    rejects: list[tuple[str, int, int, str, str]] = field(default_factory=list)
    """Source, line, answer, reason and detail."""
    split: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    supervised_cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Samples some part of which is not in the text, by its kind."""


def plain_plan(config: ExtractConfig, files: TargetFiles) -> PlainPlan:
    """Return the plan of all rows of the data."""
    data, plan, seen = Data(config), PlainPlan(), set[bytes]()
    for row in data.rows():
        place = row.source.name, row.line
        try:
            parts = _row(row, config, data, files, plan, seen)
        except UnmaskableError as error:
            parts = [(0, error)]
        except RowFaultError as error:
            parts = [(0, UnmaskableError("bad row", str(error)))]
        except (TemplateError, ValueError, TypeError, RecursionError) as error:
            parts = [(0, UnmaskableError("bad row", f"is refused by the chat template ({str(error)[:200]})"))]
        made = [_judged(part, config) for part in parts]
        if all(isinstance(one, UnmaskableError) for _, one, _ in made):
            made = [(0, *made[0][1:])]
        for answer, one, cut in made:
            plan.truncated += cut is not None
            plan.supervised_cut += cut or 0
            if isinstance(one, UnmaskableError):
                plan.rejects.append((*place, answer, *one.args))
            else:
                ids, mask, anchors, dropped = one
                plan.samples.append((*place, answer, ids, mask, anchors))
                plan.dropped.update(dropped)
        lengths = [len(one[0]) for _, one, _ in made if not isinstance(one, UnmaskableError)]
        if len(lengths) > 1:
            plan.split.update(conversations=1, samples=len(lengths), more_tokens=sum(lengths) - max(lengths))
    return plan


Sample = tuple[list[int], list[bool], set[str]]
"""Tokens, mask, and kinds of parts that are not in the text."""
Part = tuple[int, Sample | UnmaskableError]
"""The answer that a sample ends with, 0 for a whole row, and the sample or why there is none."""


def _judged(part: Part, config: ExtractConfig) -> tuple[int, Any, int | None]:
    """Return a part as a sample with its anchors or as what it lacks, and how many supervised tokens were cut."""
    answer, made = part
    if isinstance(made, UnmaskableError):
        return answer, made, None
    ids, mask, dropped = made
    cut = sum(mask[config.max_length :]) if len(ids) > config.max_length else None
    ids, mask = ids[: config.max_length], mask[: config.max_length]
    anchors = sum(mask[: max(0, len(mask) - config.block_size + 1)])
    if anchors:
        return answer, (ids, mask, anchors, dropped), cut
    reason = "supervised part too near the end"
    reason = "shorter than one block" if len(ids) < config.block_size else reason
    reason = reason if any(mask) else "no supervised token"
    return answer, UnmaskableError(reason, f"{len(ids)} tokens"), cut


def _row(
    row: Row, config: ExtractConfig, data: Data, files: TargetFiles, plan: PlainPlan, seen: set[bytes]
) -> list[Part]:
    if row.fault:
        raise RowFaultError(row.fault)
    row_format, content = read_content(row.value, data.format.row_format)
    plan.formats[f"{row.source.container}, {row_format}"] += 1
    if config.drop_duplicates:
        digest = content_hash(content)
        if digest in seen:
            raise UnmaskableError("duplicate", "says exactly what an earlier row says")
        seen.add(digest)
    if not isinstance(content, Chat):
        return [(0, (*plain_tokens(content, config, files), set()))]
    try:
        made = plain_tokens(content, config, files)
    except UnmaskableError as error:
        parts = _as_served(content, config, files) if error.args[0] in OF_AN_ANSWER else []
        if not any(isinstance(made, tuple) for _, made in parts):
            raise
        return parts
    return [(0, (*made, plain_dropped(content, render(content, config, files, len(content.messages)), config)))]


OF_AN_ANSWER = (
    "begins with an assistant turn",
    "answer does not follow its prompt",
    "template rewrites history",
    "template refuses the turns up to an answer",
)


def _as_served(chat: Chat, config: ExtractConfig, files: TargetFiles) -> list[Part]:
    """Return each answer as the last turn of the conversation that ends with it. Of those whose prompts begin with the
    text that ends with the answer before, all are supervised in the last one's."""
    alone = replace(config, mask="last-turn")
    parts: list[tuple[int, list[int], UnmaskableError | None]] = []
    turns = _answers(chat)
    for number, turn in enumerate(turns, start=1):
        if config.mask == "last-turn" and turn != turns[-1]:
            continue
        until = Chat(chat.messages[: turn + 1], chat.tools)
        try:
            plain_tokens(until, alone, files)
        except UnmaskableError as error:
            parts.append((number, [turn], error))
            continue
        known = [i for i, (_, _, error) in enumerate(parts) if error is None]
        tagged = "{% generation %}" in _template(config, files)
        prompt = render(chat, config, files, turn, prompt=not tagged)
        if known and prompt.startswith(render(chat, config, files, parts[known[-1]][1][-1] + 1)):
            parts[known[-1]] = number, [*parts[known[-1]][1], turn], None
        else:
            parts.append((number, [turn], None))
    made: list[Part] = []
    for number, joined, error in parts:
        if error is not None:
            made.append((number, error))
            continue
        until = Chat(chat.messages[: joined[-1] + 1], chat.tools)
        ids, mask = plain_tokens(until, alone, files)
        for turn in joined[:-1]:  # its tokens stand at the same places of the longer text
            text = render(chat, config, files, turn + 1)
            begin = len(render(chat, config, files, turn, prompt=True))
            mask = _marked_too(until, config, files, mask, begin, len(text))
        dropped = plain_dropped(until, render(until, config, files, len(until.messages)), alone, joined[0])
        made.append((number, (ids, mask, dropped)))
    return made


def _marked_too(
    chat: Chat, config: ExtractConfig, files: TargetFiles, mask: list[bool], first: int, last: int
) -> list[bool]:
    """Return the mask of a conversation with the tokens within some of its text's characters marked as well."""
    text = render(chat, config, files, len(chat.messages))
    made: Any = files.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    marked = [False] * len(mask)
    places = enumerate(made["offset_mapping"])
    _mark(marked, [i for i, (begin, end) in places if first <= begin < end <= last])
    closed = _closed(made["input_ids"], marked, files)
    return [one or other for one, other in zip(mask, closed, strict=True)]


def _template(config: ExtractConfig, files: TargetFiles) -> str:
    return str(config.chat_template_kwargs.get("chat_template", files.template))


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
    mask_of = _from_tags if "{% generation %}" in _template(config, files) else _from_prefixes
    ids, mask, parts = mask_of(content, config, files)
    dropped = plain_dropped(content, render(content, config, files, len(content.messages)), config)
    for turn, part in parts if dropped & {"answers", "tool calls"} else []:
        message = content.messages[turn]
        said = [_words_of(message), message.get("reasoning", "").strip()]
        said += [call["function"]["name"] for call in message.get("tool_calls", [])]
        if not [one for one in said if one and _stands_in(one, part)]:
            raise UnmaskableError("template writes nothing of an answer", f"of messages[{turn}] nothing is in the text")
    return ids, _closed(ids, mask, files)


def _closed(ids: list[int], mask: list[bool], files: TargetFiles) -> list[bool]:
    closed: list[bool] = close_turns(
        np.array(ids, np.uint32),
        np.array(mask, np.bool_),
        np.array(sorted(files.end_ids()), np.uint32),
        lambda part: not files.tokenizer.decode(part.tolist()).strip(),
    ).tolist()
    return closed


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


def plain_dropped(chat: Chat, text: str, config: ExtractConfig, first: int | None = None) -> set[str]:
    """Return the kinds of parts of a conversation that are not in its text, each looked for from the beginning; of the
    thoughts only those from the message `first` on."""
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
        judged = judged if first is None else role == "assistant" and turn >= first
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
        try:
            before = render(chat, config, files, turn, prompt=True)
            through = render(chat, config, files, turn + 1)
        except (TemplateError, ValueError, TypeError, RecursionError) as error:
            detail = f"those up to messages[{turn}] cannot be rendered ({str(error)[:200]})"
            raise UnmaskableError("template refuses the turns up to an answer", detail) from error
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
