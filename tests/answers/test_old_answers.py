"""What will be replaced is not judged: rows are asked whatever their old answers are."""

import json
from pathlib import Path
from typing import Any

import pytest

from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.answers.dialogues import Dialogue, read_dialogues
from dflash_offline.stages.conversations.sources import Data

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
