"""What will be replaced is not judged: rows are asked whatever their old answers are."""

import json
from pathlib import Path
from typing import Any

import pytest

from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.answers.dialogues import Answer, Dialogue, read_dialogues
from dflash_offline.stages.conversations.sources import Data
from dflash_offline.stages.regenerate import _notes

ASKED = [{"role": "user", "content": "hi"}]


def dialogue(folder: Path, row: dict[str, Any]) -> Dialogue:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (made,) = read_dialogues(Data(ExtractConfig(data=(path,), target="t", out=folder / "out")))
    return made


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*ASKED, {"role": "assistant"}]},
        {"messages": [*ASKED, {"role": "assistant", "content": ""}]},
        {"messages": [*ASKED, {"role": "assistant", "content": None, "reasoning_content": "Hm."}]},
        {"messages": [*ASKED, {"role": "assistant", "content": "\ud800", "reasoning": 3}]},
        {"messages": [*ASKED, {"role": "assistant", "content": [{"type": "image"}]}]},
        {"messages": [{"role": "system", "content": ""}, *ASKED, {"role": "assistant", "content": " "}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": None}]},
        {"conversations": [*ASKED, {"role": "assistant", "content": ""}]},
        {"prompt": "hi"},
        {"prompt": "hi", "response": None},
        {"prompt": "hi", "response": ""},
        {"prompt": "hi", "completion": "yes"},
        {"prompt": "hi", "messages": None, "text": None},
        {"messages": [*ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
        {"messages": [*ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": 3}}]}]},
        {"messages": [*ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        {"messages": [*ASKED, {"role": "assistant", "tool_calls": "f()"}]},
        {"messages": [*ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "\ud800"}}]}]},
    ],
)
def test_an_old_answer_of_any_kind_or_none_is_asked_anew(tmp_path: Path, row: dict[str, Any]) -> None:
    made = dialogue(tmp_path, row)
    assert made.fault is None and made.questions == [ASKED]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]}, "bad row"),
        ({"messages": ["hi"]}, "bad row"),
        ({"messages": [{"role": ["assistant"], "content": "a"}]}, "bad row"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "bad row"),
        ({"prompt": ""}, "bad row"),
        ({"response": "a"}, "bad row"),
        ({"text": "a"}, "plain text"),
        ({"prompt": "a", "text": "a"}, "plain text"),
        ({"messages": [{"role": "assistant", "content": ""}, *ASKED]}, "no user turn before the first answer"),
    ],
)
def test_what_is_asked_is_judged_as_before(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    made = dialogue(tmp_path, row)
    assert made.fault is not None and made.fault[0] == fault


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


@pytest.mark.parametrize(
    ("row", "marked"),
    [
        ({"messages": [*ASKED, said("a", weight=0), *ASKED, said("b", weight=1)]}, [True, False]),
        ({"messages": [*ASKED, said("a", train="false"), *ASKED, said("b", masked=True)]}, [True, True]),
        ({"messages": [*ASKED, said("a"), *ASKED, said("b")], "weights": [0, 0, 1, 1]}, [True, False]),
        ({"messages": [*ASKED, said("a", loss=False), said("b", loss=False), *ASKED]}, [True, False]),
        ({"messages": [*ASKED, said("a", loss=False), said("b"), *ASKED, said("c", mask=1)]}, [False, False]),
        (
            {
                "conversations": [
                    {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "a", "weight": 0},
                    {"from": "human", "value": "hi"},
                ]
            },
            [True, False],
        ),
    ],
)
def test_the_mark_of_an_old_answer_is_that_of_the_one_in_its_place(
    tmp_path: Path, row: dict[str, Any], marked: list[bool]
) -> None:
    made = dialogue(tmp_path, row)
    assert made.questions == [ASKED, ASKED]
    made.add(Answer(content="new"))
    assert made.prompt(1) == [*ASKED, said("new"), *ASKED]  # no mark is sent
    made.add(Answer(content="newer"))
    answers = [
        said(text, **({"weight": 0} if mark else {})) for text, mark in zip(("new", "newer"), marked, strict=True)
    ]
    assert made.record()["messages"] == [*ASKED, answers[0], *ASKED, answers[1]]
    assert sum(_notes(made)[what] for what in _notes(made) if "marked as context" in what) == sum(marked)
