# ruff: noqa: E501
"""Every shape of chat template with every shape of row: what is supervised is what the model would have said, nothing
else, and nothing that the messages hold is missing unsaid.

What a model would have said is written out by hand for each family, and does not come from rendering its template.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from template_families import FAMILIES, Family, content_of
from tiny_target import save_tokenizer
from transformers import AutoTokenizer, Qwen3Config

from dflash_offline.schemas.errors import BadInputError
from dflash_offline.schemas.manifest import SAMPLES
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations.loss_mask import ConversationEncoder
from dflash_offline.stages.conversations.plan import Plan, make_plan
from dflash_offline.stages.conversations.sources import Data
from dflash_offline.stages.target.files import TargetFiles

DEPTH = {
    "type": "function",
    "function": {
        "name": "depthgauge",
        "description": "Soundings of waters.",
        "parameters": {"type": "object", "properties": {"lake": {"type": "string"}}},
    },
}


def user(words: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": words, **more}


def answer(words: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": words, **more}


def call(lake: str, number: int, *, text: bool = False) -> dict[str, Any]:
    arguments: Any = {"lake": lake}
    function = {"name": "depthgauge", "arguments": json.dumps(arguments) if text else arguments}
    return {"id": f"functions.depthgauge:{number}", "type": "function", "function": function}


def result(words: str, number: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"functions.depthgauge:{number}", "name": "depthgauge", "content": words}


ROWS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [user("Which lake?"), answer("Windermere it is.")]},
    "system": {"messages": [{"role": "system", "content": "Speak tersely."}, user("Which lake?"), answer("Buttermere.")]},
    "several turns": {
        "messages": [user("Hello there"), answer("Greetings."), user("Onward?"), answer("Forthwith."), user("So?"), answer("Done.")]
    },
    "reasoning": {
        "messages": [
            user("Hello there"),
            answer("Greetings.", reasoning_content="Politeness matters."),
            user("Onward?"),
            answer("Forthwith.", reasoning_content="Haste pleases."),
        ]
    },
    "tool call": {
        "tools": [DEPTH],
        "messages": [user("How deep?"), answer("", tool_calls=[call("Ullswater", 0)]), result("62 fathoms", 0), answer("Sixty-two.")],
    },
    "parallel calls": {
        "tools": [DEPTH],
        "messages": [
            user("How deep?"),
            answer("Checking.", tool_calls=[call("Ullswater", 0, text=True), call("Grasmere", 1, text=True)]),
            result("62 fathoms", 0),
            result("21 ells", 1),
            answer("Both known."),
        ],
    },
    "developer": {"messages": [{"role": "developer", "content": "Speak tersely."}, user("Which lake?"), answer("Buttermere.")]},
    "empty parts": {
        "tools": [DEPTH],
        "messages": [
            {"role": "system", "content": ""},
            user("How deep?"),
            {"role": "assistant", "content": None, "tool_calls": [call("Ullswater", 0)]},
            result("", 0),
            answer("Nobody knows."),
        ],
    },
    "lists of parts": {
        "messages": [
            user([{"type": "text", "text": "Which "}, {"type": "text", "text": "lake?"}]),
            answer([{"type": "text", "text": "Windermere "}, {"type": "text", "text": "it is."}]),
        ]
    },
    "trailing user": {"messages": [user("Hello there"), answer("Greetings."), user("Onward?")]},
    "names": {"messages": [user("Which lake?", name="Wordsworth"), answer("Buttermere.")]},
}  # fmt: skip


@cache
def target_of(name: str, folder: Path) -> TargetFiles:
    family = FAMILIES[name]
    save_tokenizer(folder, family.template, special=family.special, eos=family.ends[0])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(end) for end in family.ends]
    config = Qwen3Config(vocab_size=400, eos_token_id=ends)
    return TargetFiles(folder=folder, name=name, config=config, tokenizer=tokenizer, template=family.template)


def planned(folder: Path, target: TargetFiles, row: dict[str, Any]) -> Plan:
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = ExtractConfig(
        data=(folder / "rows.jsonl",),
        target=target.name,
        out=folder / "cache",
        block_size=2,
        chunk_tokens=16,
        skip_bad_rows=True,
    )
    return make_plan(config, Data(config), ConversationEncoder(target, config), 64, folder, lambda _rows: None)


def parts_by_kind(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Return each part of a row that a template may drop, with the name of its kind."""
    kinds = {"system": "system turns", "developer": "developer turns", "user": "user turns", "tool": "tool results"}
    parts = [(kinds.get(m["role"], "answers"), content_of(m)) for m in row["messages"]]
    parts += [("reasoning", m["reasoning_content"]) for m in row["messages"] if "reasoning_content" in m]
    parts += [("names", m["name"]) for m in row["messages"] if "name" in m and m["role"] != "tool"]
    parts += [("tools", tool["function"]["description"]) for tool in row.get("tools", ())]
    for message in row["messages"]:
        for one in message.get("tool_calls", ()):
            arguments = one["function"]["arguments"]
            parts.append(("tool calls", (json.loads(arguments) if isinstance(arguments, str) else arguments)["lake"]))
    return [(kind, text) for kind, text in parts if text]


@pytest.mark.parametrize("name", FAMILIES)
def test_supervised_is_what_the_model_would_have_said(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    target = target_of(name, tmp_path / "target")
    problems = {shape: told for shape, row in ROWS.items() if (told := problem(tmp_path, family, target, shape, row))}
    assert not problems


def problem(folder: Path, family: Family, target: TargetFiles, shape: str, row: dict[str, Any]) -> str:
    """Return what is wrong with how a row was taken; empty if nothing is."""
    reason = family.refuses.get(shape)
    try:
        plan = planned(folder, target, row)
    except BadInputError as error:
        return "" if reason and reason in str(error) else f"{error}, not for {reason!r}"
    if reason:
        return f"kept, not left out for {reason!r}"
    table = sorted(pq.read_table(plan.folder / SAMPLES).to_pylist(), key=lambda one: one["answer"])
    tokens = [list(zip(one["input_ids"], one["loss_mask"], strict=True)) for one in table]
    supervised = ["".join(target.tokenizer.decode([i for i, is_said in one if is_said])) for one in tokens]
    text = "".join(target.tokenizer.decode([i for i, _ in one]) for one in tokens)
    answers = [turn for turn, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    said = "".join(family.said(row["messages"][turn]) for turn in answers)
    found = "".join(supervised)
    for end in family.ends if family.ends_in_next else ():
        found = found.replace(end, "")
    if found != said:
        return f"supervised is {found!r}, not {said!r}"
    heard = row["messages"][: answers[-1] + 1]  # nobody learns from what follows
    missing = {kind for kind, part in parts_by_kind({**row, "messages": heard}) if part not in text}
    return "" if missing == {*plan.dropped} else f"missing {missing}, said {set(plan.dropped)}, in {text!r}"
