"""Rows as data of the field has them: empty turns that say nothing, and turns in another shape than a list."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_plan import plan
from tiny_target import WITHOUT_TAGS

from dflash_offline.stages.conversations.content import Chat, RowFaultError, read_content

QUESTION = {"role": "user", "content": "How deep is it?"}
ANSWER = {"role": "assistant", "content": "It is 12 m deep, as measured."}
TURNS = [QUESTION, ANSWER]
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "rm", "arguments": {}}}]}


def read(row: dict[str, Any]) -> list[tuple[str, str]]:
    _, content = read_content(row)
    assert isinstance(content, Chat)
    return [(message["role"], message["content"]) for message in content.messages]


SAID = [("user", "How deep is it?"), ("assistant", "It is 12 m deep, as measured.")]


@pytest.mark.parametrize("content", ["", None, " \n", []])
@pytest.mark.parametrize("role", ["system", "developer"])
def test_an_empty_system_turn_is_none(role: str, content: object) -> None:
    empty = {"role": role, "content": content}
    assert read({"messages": [empty, *TURNS]}) == SAID
    assert read({"messages": [QUESTION, empty, ANSWER]}) == SAID
    assert read({"messages": [{"role": role}, *TURNS]}) == SAID
    assert read({"conversations": [empty, *TURNS]}) == SAID


def test_an_empty_system_turn_of_sharegpt_is_none() -> None:
    turns = [{"from": "human", "value": QUESTION["content"]}, {"from": "gpt", "value": ANSWER["content"]}]
    for empty in ("", None):
        assert read({"conversations": [{"from": "system", "value": empty}, *turns]}) == SAID
        assert read({"system": empty, "conversations": turns}) == SAID


@pytest.mark.parametrize("result", ["", None, []])
def test_a_tool_that_said_nothing_has_an_empty_turn(tmp_path: Path, result: object) -> None:
    row = {"messages": [QUESTION, CALL, {"role": "tool", "content": result}, ANSWER]}
    assert read(row) == [SAID[0], ("assistant", ""), ("tool", ""), SAID[1]]
    said = {"conversations": [*row["messages"][:2], {"from": "observation", "value": result}, ANSWER]}
    assert read(said) == read(row)
    template = WITHOUT_TAGS.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}")
    assert len(plan(tmp_path, [row], template).samples) == 1


@pytest.mark.parametrize(
    "turn", [{"role": "user"}, {"role": "user", "content": " "}, {"role": "assistant", "content": ""}]
)
def test_an_empty_question_or_answer_is_still_a_fault(turn: dict[str, Any]) -> None:
    with pytest.raises(RowFaultError, match=r"messages\[0\]\.content"):
        read({"messages": [turn, *TURNS]})
    with pytest.raises(RowFaultError, match="only empty system turns"):
        read({"messages": [{"role": "system", "content": ""}]})


def test_turns_may_be_written_as_a_text_of_json() -> None:
    assert read({"messages": json.dumps(TURNS)}) == read({"conversations": " " + json.dumps(TURNS)}) == SAID
    with pytest.raises(RowFaultError, match="has messages whose text is not JSON"):
        read({"messages": "[{"})


def test_null_under_another_layouts_key_is_no_layout() -> None:
    assert read({"messages": None, "conversations": TURNS}) == SAID
    assert read({"input_ids": None, "loss_mask": None, "text": None, "messages": TURNS}) == SAID
    assert read({"messages": None, "prompt": QUESTION["content"], "response": ANSWER["content"]}) == SAID


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"messages": {"role": ["user"], "content": ["a"]}}, "has no list 'messages' but one object of the keys"),
        (
            {"conversations": {"from": ["gpt"], "value": ["a"]}},
            r"'conversations' but one object of the keys \['from', ",
        ),
        ({"messages": []}, "has no list 'messages' but an empty one"),
        ({"messages": None}, "has no list 'messages' but nothing"),
        ({"messages": "How deep?"}, "has no list 'messages' but str"),
        (
            {"prompt": [QUESTION], "response": "a"},
            "has prompt that is a list of messages; expected a text, or all turns",
        ),
        ({"prompt": "a", "response": [ANSWER]}, "has response that is a list of messages"),
    ],
)
def test_a_fault_says_what_stands_in_place_of_the_turns(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(RowFaultError, match=fault):
        read(row)
