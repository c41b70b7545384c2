"""Whoever reads why rows were left out reads what would keep them, too."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import DEEPSEEK_LIKE
from tiny_plan import plan
from tiny_target import WITH_TAGS, WITHOUT_TAGS

from dflash_offline.schemas.errors import BadInputError
from dflash_offline.stages.conversations.advice import left_out

QUESTION = {"role": "user", "content": "How deep is it?"}
ANSWER = {"role": "assistant", "content": "It is 12 m deep, as measured."}
ALONE = {"messages": [QUESTION, ANSWER]}
CALL = {"id": "c1", "type": "function", "function": {"name": "depth", "arguments": "{}"}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
CALLED = {"messages": [QUESTION, CALLS, {"role": "tool", "tool_call_id": "c1", "content": "12"}, ANSWER]}
TWICE = {"messages": [QUESTION, ANSWER, QUESTION, ANSWER]}
FORMATTED = "<|im_start|>user\nHow deep?<|im_end|>\n<|im_start|>assistant\nIt is 12 m deep.<|im_end|>\n"
THINKING = {"thinking": True}
REFUSES_AN_END = (
    "{% if messages[-1].role != 'user' %}{{ raise_exception('A user comes last') }}{% endif %}" + WITHOUT_TAGS
)
WRITES_ANY = {"chat_template": WITHOUT_TAGS}


@pytest.mark.parametrize(
    ("row", "template", "settings", "kept_by"),
    [
        (
            ALONE,
            DEEPSEEK_LIKE,
            {"chat_template_kwargs": THINKING},
            {"chat_template_kwargs": {"enable_thinking": False}},
        ),
        ({"messages": [ANSWER, QUESTION]}, WITHOUT_TAGS, {}, {"chat_template_kwargs": {"chat_template": WITH_TAGS}}),
        ({"messages": [*TWICE["messages"], QUESTION]}, REFUSES_AN_END, {}, {"chat_template_kwargs": WRITES_ANY}),
        ({"text": FORMATTED}, WITHOUT_TAGS, {}, {"keep_special_tokens": True}),
        ({"messages": [QUESTION, {**ANSWER, "content": FORMATTED}]}, WITH_TAGS, {}, {"keep_special_tokens": True}),
        (ALONE, WITH_TAGS, {"max_length": 20, "block_size": 16}, {"max_length": 400}),
        ({"messages": [QUESTION]}, WITH_TAGS, {}, {"mask": "all"}),
        ({"messages": [QUESTION, {**ANSWER, "content": "12"}]}, WITH_TAGS, {"block_size": 16}, {"block_size": 4}),
        (CALLED, WITH_TAGS, {}, {"mask": "last-turn"}),
        ({"text": "12"}, WITH_TAGS, {"block_size": 16}, {"block_size": 2}),
        ({"input_ids": [5] * 9, "loss_mask": [1] * 9}, WITH_TAGS, {"no_reasoning": True}, {"no_reasoning": False}),
    ],
)
def test_every_reason_names_what_keeps_its_rows(
    tmp_path: Path, row: dict[str, Any], template: str, settings: dict[str, Any], kept_by: dict[str, Any]
) -> None:
    with pytest.raises(BadInputError) as caught:
        plan(tmp_path, [row], template, **settings)
    told = next(line for line in str(caught.value).splitlines() if line.startswith("  1 rows: "))
    ((setting, value),) = kept_by.items()
    flag = f"--{setting.replace('_', '-')}"
    assert f"{flag} {value}" in told or flag in told or json.dumps(value) in told
    assert len(plan(tmp_path, [row], template, **{**settings, **kept_by}).samples) == 1


def test_repetitions_and_bad_rows_name_theirs(tmp_path: Path) -> None:

    made = plan(tmp_path, [ALONE, ALONE, {"messages": 3}], skip_bad_rows=True, drop_duplicates=True)
    told = [left_out(reason, count) for reason, count in made.counts()["rejects"].items()]
    assert told == [
        "1 rows: bad row (without --skip-bad-rows the first are named, and rejects.parquet of a cache says what is "
        "wrong with each; mend them)",
        "1 rows: duplicate (without --drop-duplicates they are kept)",
    ]
