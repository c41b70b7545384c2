"""What a chat template leaves out of the text is counted by kind, and nothing that it only writes otherwise is."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_plan import plan
from tiny_target import WITH_TAGS, WITHOUT_TAGS

from dflash_offline.schemas.errors import BadInputError

CALL = {"function": {"name": "depth", "arguments": {"lake": "north end", "unit": 'f"t'}}}
TOOL = {"type": "function", "function": {"name": "depth", "description": "How deep a lake is, in\nmetres."}}
ANSWER = "The north end is 12 m deep, as measured."
CALLING: dict[str, Any] = {
    "tools": [TOOL],
    "messages": [
        {"role": "user", "content": "How deep is the north end?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
        {"role": "tool", "content": "12 m"},
        {"role": "assistant", "content": ANSWER},
    ],
}
# JSON with spaces, as XML, JSON within JSON, and reasoning within the content of a template that trims.
WRITES_ALL = (
    "{% if tools %}<|im_start|>system{{ '\n' + (tools | tojson(indent=2)) }}<|im_end|>{{ '\n' }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content | trim }}</think>{% endif %}"
    "{{ (m.content | tojson) if m.role == 'tool' else (m.content | trim) }}"
    "{% for c in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
CALLS = {
    "json": "{{ c.function | tojson }}",
    "indented": "{{ c.function | tojson(indent=4) }}",
    "in json": "{{ (c.function.arguments | tojson) | tojson }} of {{ c.function.name }}",
    "xml": "<function={{ c.function.name }}>{% for k, v in c.function.arguments | items %}"
    "<parameter={{ k }}>{{ '\n' + v + '\n' }}</parameter>{% endfor %}</function>",
}


def chat(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


@pytest.mark.parametrize("calls", CALLS)
def test_what_is_only_written_otherwise_is_not_called_dropped(tmp_path: Path, calls: str) -> None:
    twice = {**CALLING["messages"][1], "content": None, "tool_calls": [CALL, CALL]}
    several = {**CALLING, "messages": [CALLING["messages"][0], twice, *CALLING["messages"][2:]]}
    thought = {"role": "assistant", "content": "\n\n " + ANSWER + "\n", "reasoning_content": " 12 m \n"}
    spaced = chat(
        {"role": "system", "content": " \n Be brief.\n"},
        {"role": "user", "content": "How deep?\n"},
        {"role": "tool", "content": 'a "quoted"\n\tline \u00e9\u4e2d\u6587'},
        thought,
    )
    made = plan(tmp_path, [CALLING, several, spaced], WRITES_ALL.replace("CALL", CALLS[calls]))
    assert made.counts()["samples"] == 3 and "dropped" not in made.counts()


@pytest.mark.parametrize("template", [WITH_TAGS, WITHOUT_TAGS], ids=["tags", "none"])
def test_calls_tools_and_reasoning_that_are_not_in_the_text_are_counted(tmp_path: Path, template: str) -> None:
    thought = chat(
        {"role": "user", "content": "How deep?"},
        {"role": "assistant", "content": ANSWER, "reasoning_content": "Twelve metres are thirty-nine feet."},
    )
    made = plan(tmp_path, [CALLING, thought, CALLING], template)
    assert made.counts()["dropped"] == {"reasoning": 1, "tool calls": 2, "tools": 2}


def test_turns_of_roles_that_a_template_does_not_know_are_counted(tmp_path: Path) -> None:
    knows_two = (
        "{% for m in messages if m.role in ('user', 'assistant') %}" + WRITES_ALL.split("{% for m in messages %}")[1]
    )
    told = chat(
        {"role": "developer", "content": "Answer in metres."},
        {"role": "system", "content": "You are a surveyor."},
        *CALLING["messages"][:1],
        {"role": "assistant", "content": "Let me see."},
        *CALLING["messages"][2:],  # the result's words are the answer's, too
    )
    made = plan(tmp_path, [told], knows_two)
    assert made.counts()["dropped"] == {"developer turns": 1, "system turns": 1, "tool results": 1}


def test_names_of_speakers_that_are_not_in_the_text_are_counted(tmp_path: Path) -> None:
    named = chat(
        {"role": "user", "content": "How deep is the north end?", "name": "Wordsworth"},
        {"role": "assistant", "content": ANSWER, "name": None},
    )
    assert plan(tmp_path, [named, CALLING], WRITES_ALL.replace("CALL", CALLS["json"])).counts()["dropped"] == {
        "names": 1
    }
    by_name = WRITES_ALL.replace("{{ m.role + '\n' }}{% if", "{{ (m.name or m.role) + '\n' }}{% if")
    assert "dropped" not in plan(tmp_path, [named], by_name).counts()


def test_one_of_two_calls_of_a_name_is_missed(tmp_path: Path) -> None:
    first = WRITES_ALL.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]").replace("CALL", CALLS["json"])
    twice = {**CALLING["messages"][1], "tool_calls": [CALL, CALL]}
    rows = [{**CALLING, "messages": [CALLING["messages"][0], twice, *CALLING["messages"][2:]]}, CALLING]
    assert plan(tmp_path, rows, first).counts()["dropped"] == {"tool calls": 1}


@pytest.mark.parametrize("template", [WITH_TAGS, WITHOUT_TAGS], ids=["tags", "none"])
def test_a_call_of_which_nothing_is_written_is_no_answer_to_learn(tmp_path: Path, template: str) -> None:
    silent = {**CALLING["messages"][1], "content": ""}
    row = {**CALLING, "messages": [CALLING["messages"][0], silent, *CALLING["messages"][2:]]}
    made = plan(tmp_path, [CALLING, row], template)
    assert made.counts()["rejects"] == {"template writes nothing of an answer": 1}
    assert [(one.row, one.detail) for one in made.rejects] == [(2, "of messages[1] nothing is in the text")]
    last = plan(tmp_path, [row], template, mask="last-turn")
    assert len(last.samples) == 1 and last.counts()["dropped"] == {"tool calls": 1, "tools": 1}
    with pytest.raises(BadInputError, match=r"nothing of an answer \(--chat-template-kwargs with a chat_template"):
        plan(tmp_path, [row], template)


def test_an_answer_that_a_template_empties_is_left_out(tmp_path: Path) -> None:
    without_thought = WITHOUT_TAGS.replace("{{ m.content }}", "{{ m.content.split('---')[0] }}")
    emptied = chat({"role": "user", "content": "How deep?"}, {"role": "assistant", "content": "---\n" + ANSWER})
    whole = json.loads(json.dumps(emptied).replace("---", ""))
    made = plan(tmp_path, [emptied, whole], without_thought)
    assert made.counts()["rejects"] == {"template writes nothing of an answer": 1} and len(made.samples) == 1
