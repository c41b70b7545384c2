"""Turns that the data marks as context are not learned, however it writes that; a mark that is unclear is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_plan import plan
from tiny_target import WITH_TAGS, WITHOUT_TAGS
from tokenizers import Tokenizer

from dflash_offline.schemas.errors import BadInputError
from dflash_offline.stages.conversations.plan import Plan

FIRST = {"role": "assistant", "content": "It is 12 m deep, as measured."}
SECOND = {"role": "assistant", "content": "No, there is no fish in it."}
ASKED = [{"role": "user", "content": "How deep is it?"}, {"role": "user", "content": "Is there a fish in it?"}]
SYSTEM = {"role": "system", "content": ""}
BOTH, LAST, NONE = FIRST["content"] + SECOND["content"], SECOND["content"], ""
# Writes an answer otherwise once more follows.
REWRITES = WITH_TAGS.replace("{{ m.content", "{{ '<past>' if m.role == 'assistant' and not loop.last }}{{ m.content")
SHAPES = {"tags": WITH_TAGS, "none": WITHOUT_TAGS, "rewritten": REWRITES}


def turns(first: dict[str, Any], second: dict[str, Any] | None = None, asked: dict[str, Any] | None = None) -> Any:
    one, two = ({**question, **(asked or {})} for question in ASKED)
    return [{**SYSTEM}, one, {**FIRST, **first}, two, {**SECOND, **(second or {})}]


def chats(first: dict[str, Any], second: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"messages": turns(first, second), **more}


def sharegpt(first: dict[str, Any]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    spoken = [{"from": names[t.pop("role")], "value": t.pop("content"), **t} for t in turns(first)]
    return {"system": "Be brief.", "conversations": spoken[1:]}


def supervised(made: Plan) -> str:
    """Return what is supervised in all samples, in the order of the samples."""
    samples, folder = made.samples, made.folder.parent / "target"
    decode = Tokenizer.from_file(str(folder / "tokenizer.json")).decode
    return "".join(decode(samples.input_ids(n)[samples.loss_mask(n)].tolist()) for n in range(len(samples)))


MARKED: dict[str, tuple[dict[str, Any], str]] = {
    "weight": (chats({"weight": 0}, {"weight": 1}), LAST),
    "weight of both": (chats({"weight": 1}, {"weight": 1.0}), BOTH),
    "weight as a float": (chats({"weight": 0.0}), LAST),
    "train": (chats({"train": False}, {"train": True}), LAST),
    "training": (chats({"training": False}, {"training": None}), LAST),
    "trainable": (chats({"trainable": False}), LAST),
    "loss": (chats({"loss": False}, {"loss": True}), LAST),
    "loss as a word": (chats({"loss": "false"}, {"loss": "True"}), LAST),
    "loss_mask of a turn": (chats({"loss_mask": 0}, {"loss_mask": 1}), LAST),
    "masked": (chats({"masked": True}, {"masked": False}), LAST),
    "null": (chats({"weight": None, "train": None}), BOTH),
    "sharegpt": (sharegpt({"weight": 0}), LAST),
    "sharegpt, train": (sharegpt({"train": False}), LAST),
    "a list": (chats({}, loss_mask=[0, 0, 0, 0, 1]), LAST),
    "a list of weights": (chats({}, weights=[None, None, 0, None, None]), LAST),
    "a list and a turn": (chats({"weight": 0}, loss_mask=[0, 0, 1, 0, 1]), LAST),
    "the row": (chats({}, train=True), BOTH),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MARKED)
def test_what_is_marked_as_context_is_not_supervised(tmp_path: Path, name: str, shape: str) -> None:
    row, expected = MARKED[name]
    made = plan(tmp_path, [row], SHAPES[shape])
    assert supervised(made).replace("<past>", "") == expected
    notes = {"answers marked as context": 1} if expected == LAST else {}
    assert made.counts().get("notes", {}) == notes
    said = "\n".join(text for _, text in made.facts())
    assert ("noted: answers marked as context in 1 samples (the data marks them" in said) == bool(notes)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_of_them_may_be_context_and_the_first_learned(tmp_path: Path, shape: str) -> None:
    row = chats({"weight": 1}, {"weight": 0})
    assert supervised(plan(tmp_path, [row], SHAPES[shape])) == FIRST["content"]
    with pytest.raises(BadInputError, match=r"1 rows: marked as context \(the data marks .* --mask assistant keeps"):
        plan(tmp_path, [row], SHAPES[shape], mask="last-turn")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_context_alone_is_left_out_with_what_would_keep_it(tmp_path: Path, shape: str) -> None:
    row = chats({"weight": 0}, {"weight": 0})
    made = plan(tmp_path, [row, chats({})], SHAPES[shape])
    assert made.counts()["rejects"] == {"marked as context": 1}
    assert [reject.detail for reject in made.rejects] == ["messages[3] is marked as context"]
    made = plan(tmp_path, [row], SHAPES[shape], mask="all")
    assert made.counts()["notes"] == {"answers marked as context, and supervised": 1}
    assert FIRST["content"] in supervised(made)


def test_a_conversation_may_begin_with_an_answer_that_is_context(tmp_path: Path) -> None:
    row = {"messages": [{**FIRST, "weight": 0}, *turns({})[3:]]}
    assert supervised(plan(tmp_path, [row], WITHOUT_TAGS)) == LAST


def test_marks_of_others_and_of_rows_that_no_mask_follows_are_said(tmp_path: Path) -> None:
    learned = {"messages": turns({"weight": 0}, asked={"weight": 1})}
    every = {"messages": [{**turn, "weight": 1} for turn in turns({})]}  # as a column's default writes it
    made = plan(tmp_path, [learned, every, chats({}, weight=0.3)])
    assert made.counts()["notes"] == {
        "answers marked as context": 1,
        "turns of others marked to be learned": 1,
        "weight of the whole row": 1,
    }
    assert supervised(made) == LAST + BOTH + BOTH


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (chats({"weight": 0.5}), r"messages[2].weight 0.5; expected 0 or false (context), or 1 or true (learned)"),
        (chats({"weight": 2}), "messages[2].weight 2; expected"),
        (chats({"loss": 1.83}), "messages[2].loss 1.83; expected"),
        (chats({"train": "later"}), "messages[2].train 'later'; expected"),
        (chats({"masked": 3}), "messages[2].masked 3; expected 0 or false (learned), or 1 or true (context)"),
        (chats({"mask": True}), "messages[2].mask, of which it cannot be told"),
        (chats({"weight": 1, "train": False}), "messages[2] that is both learned and context by its train and weight"),
        (chats({"train_detail": [{"begin_offset": 0}]}), "messages[2].train_detail, which marks parts of a turn"),
        (chats({}, loss_mask=[0, 1]), "a list 'loss_mask' of 2 beside 5 messages"),
        (chats({}, mask=[0, 0, 1, 0, 1]), "the row's mask, of which it cannot be told"),
        (chats({"content": [{"type": "text", "text": "a", "train": False}]}), "content[0] marked as context; expected"),
        (sharegpt({"weight": 0.1}), "conversations[1].weight 0.1"),
    ],
)
def test_a_mark_that_is_unclear_is_refused_by_name(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    with pytest.raises(BadInputError) as caught:
        plan(tmp_path, [row])
    assert fault in str(caught.value) and "rows.jsonl:1 has" in str(caught.value)
    assert len(plan(tmp_path, [row, chats({})], skip_bad_rows=True).samples) == 1


def test_marks_in_columns_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [chats({"weight": 0}, loss_mask=None), chats({}, loss_mask=[0, 0, 0, 0, 1]), chats({})]
    pq.write_table(pa.Table.from_pylist([json.loads(json.dumps(row)) for row in rows]), tmp_path / "a.parquet")
    made = plan(tmp_path, [], data=(tmp_path / "a.parquet",))
    assert supervised(made) == LAST + LAST + BOTH
