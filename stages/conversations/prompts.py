"""Reading prompts from JSONL and turning them into the tokens a target is given."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from dflash_offline.schemas.errors import BadInputError
from dflash_offline.stages.bounds import bounded
from dflash_offline.stages.conversations.chat_tokenizer import template_origin
from dflash_offline.stages.conversations.content import RowFaultError, checked_text, read_messages, template_kwargs
from dflash_offline.stages.conversations.files import Row, identify, read_rows, refuse_bad_rows
from dflash_offline.stages.conversations.reading.public_sets import (
    SETS,
    chosen_rows,
    fetched_rows,
    named_set,
    turns_of,
)
from dflash_offline.stages.conversations.rendering import MOST_RENDERED

WHAT_TO_DO = (
    'Each line is an object with either "messages", a list of {"role": ..., "content": ...} objects, or "prompt", '
    'a text; "kind" may name a group.'
)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt: a conversation that the target is to continue, or a text as it is."""

    place: str
    """File and line."""
    messages: list[dict[str, Any]] | None = None
    """Without the assistant turns at the end."""
    tools: list[dict[str, Any]] | None = None
    """Functions that the conversation's target may call."""
    text: str | None = None
    kind: str | None = None
    """Group that statistics are given for."""
    then: tuple[str, ...] = ()
    """What the user says next, each after the answer to all before it."""


def read_prompts(path: Path, limit: int | None = None, seed: int = 0) -> list[Prompt]:
    """Return the file's first `limit` prompts; `BadInputError` naming every line that is not one.

    `path` may name a public set instead, of which the seed draws `limit` prompts.
    """
    if named := named_set(path):
        return _set_prompts(*named, limit, seed)
    _refuse_misspelt(path)
    prompts: list[Prompt] = []
    faults: list[str] = []
    for count, row in enumerate(read_rows(identify(path)), start=1):
        try:
            prompts.append(_prompt(row))
        except RowFaultError as fault:
            faults.append(f"{row.place} {fault}")
        if count == limit:
            break
    refuse_bad_rows(faults, WHAT_TO_DO)
    if not prompts:
        raise BadInputError(f"{path} holds no prompt. {WHAT_TO_DO}")
    return prompts


def _set_prompts(name: str, file: Path | None, limit: int | None, seed: int) -> list[Prompt]:
    """Return the prompts of a public set, from a local copy where one is named."""
    if file is None:
        rows = [(f"{name}:{i}", row) for i, row in enumerate(fetched_rows(name), start=1)]
    else:
        read = list(read_rows(identify(file)))
        refuse_bad_rows([f"{row.place} {row.fault}" for row in read if row.fault], "Fetch the file again.")
        rows = [(row.place, row.value) for row in read]
    prompts = []
    for place, row in (rows[i] for i in chosen_rows(len(rows), limit, seed)):
        (first, *others), kind = turns_of(name, row, place)
        messages = [{"role": "user", "content": first}]
        prompts.append(Prompt(place=place, messages=messages, kind=kind, then=tuple(others)))
    if not prompts:
        raise BadInputError(f"{file or name} holds no row. Fetch it again.")
    return prompts


def _refuse_misspelt(path: Path) -> None:
    """Raise `BadInputError` for what is no file and has no ending either, so that a public set may have been meant."""
    if not path.exists() and len(path.parts) == 1 and not path.suffix:
        near = difflib.get_close_matches(path.name, SETS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise BadInputError(
            f"{path} is no file here, and no public set of prompts; expected a file, or one of {', '.join(SETS)}.{hint}"
        )


def encode_prompt(prompt: Prompt, tokenizer: Any, chat_template_kwargs: Mapping[str, Any]) -> list[int]:
    """Return the prompt's tokens; a conversation is rendered up to where the assistant's answer begins."""
    if prompt.messages is None:
        ids: list[int] = tokenizer(prompt.text)["input_ids"]
    else:
        with bounded(template_origin(tokenizer, chat_template_kwargs), prompt.place):
            try:
                text = tokenizer.apply_chat_template(
                    prompt.messages,
                    tokenize=False,
                    add_generation_prompt=True,
                    **template_kwargs(chat_template_kwargs, prompt.tools),
                )
            except (TemplateError, ValueError) as error:
                raise BadInputError(
                    f"{prompt.place} cannot be rendered with the target's chat template: {error}. "
                    f'Change the conversation, or give the rendered text as "prompt".'
                ) from error
        if len(text) > MOST_RENDERED:
            raise BadInputError(
                f"{prompt.place} becomes {len(text):,} characters with the target's chat template; expected at most "
                f"{MOST_RENDERED:,}. Remove the line, or mend the template."
            )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise BadInputError(f"{prompt.place} becomes no token at all; expected at least one. Remove the line.")
    return ids


def _prompt(row: Row) -> Prompt:
    """Return the prompt that a line is; `RowFaultError` if it is none."""
    value, kind = row.value, row.value.get("kind")
    if row.fault:
        raise RowFaultError(row.fault)
    if kind is not None:
        checked_text(kind, "a kind")
    if ("prompt" in value) == ("messages" in value):
        keys = ", ".join(sorted(value)[:8]) or "none"
        raise RowFaultError(f"needs either 'messages' or 'prompt', and not both (its keys: {keys})")
    if "prompt" in value:
        if text := checked_text(value["prompt"], "a prompt"):
            return Prompt(place=row.place, text=text, kind=kind)
        raise RowFaultError("has an empty prompt")
    chat = read_messages(value)
    if messages := _open_turns(chat.messages):
        return Prompt(place=row.place, messages=messages, tools=chat.tools, kind=kind)
    raise RowFaultError("has only assistant turns; expected one to answer")


def _open_turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]
