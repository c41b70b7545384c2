"""Conversations to samples: masks, places, rejects and bad rows."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_plan import plan, target_files
from tiny_target import WITH_TAGS, WITHOUT_TAGS, conversations
from transformers import AutoTokenizer

from dflash_offline.schemas.errors import BadInputError, DflashError
from dflash_offline.stages.conversations.loss_mask import close_turns
from dflash_offline.stages.conversations.plan import Plan, refuse_ids_beyond_table
from dflash_offline.stages.target.mask_token import choose_mask_token

TAGS_WITHOUT_END = WITH_TAGS.replace(
    "{{ m.content }}<|im_end|>{% endgeneration %}", "{{ m.content }}{% endgeneration %}<|im_end|>"
)


def supervised_text(plan: Plan, sample: int, tmp_path: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    ids = plan.samples.input_ids(sample)[plan.samples.loss_mask(sample)]
    return str(tokenizer.decode(ids.tolist()))


@pytest.mark.parametrize("template", [WITH_TAGS, WITHOUT_TAGS, TAGS_WITHOUT_END], ids=["tags", "none", "no end"])
def test_supervised_are_the_assistants_words_and_the_end_of_turn(tmp_path: Path, template: str) -> None:
    rows = conversations(6)
    made = plan(tmp_path, rows, template)
    assert len(made.samples) == 6
    for sample, row in enumerate(rows):
        messages = row["messages"]
        assert isinstance(messages, list)
        answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
        assert supervised_text(made, sample, tmp_path) == "".join(answers)


@pytest.mark.parametrize(
    ("supervised", "closed"),
    [
        ("0111000", "0110000"),  # holds the end: cut after it
        ("0000100", "0000110"),  # lacks it, and it comes next: taken
        ("0000001", "0000001"),  # neither
        ("1100000", "1110000"),  # a special token that ends no answer (5) does not cut the run
    ],
)
def test_a_run_ends_at_the_token_that_ends_an_answer(supervised: str, closed: str) -> None:
    ids, end = np.array([5, 6, 9, 7, 5, 9, 5], np.uint32), np.array([9], np.uint32)
    mask = np.array([char == "1" for char in supervised])
    made = close_turns(ids, mask, end, lambda _ids: False)
    assert "".join("1" if token else "0" for token in made) == closed


def test_blanks_after_a_run_that_has_no_end_are_not_supervised() -> None:
    ids, mask = np.array([5, 6, 7, 7, 8], np.uint32), np.array([0, 1, 1, 1, 0], np.bool_)
    made = close_turns(ids, mask, np.array([9], np.uint32), lambda part: part.tolist() == [7])
    assert made.tolist() == [False, True, False, False, False]


def test_a_conversation_that_begins_with_an_answer_is_counted_where_there_are_no_tags(tmp_path: Path) -> None:
    backwards = {"messages": [{"role": "assistant", "content": "the cat sees " * 5}, {"role": "user", "content": "a"}]}
    made = plan(tmp_path, [*conversations(2), backwards], WITHOUT_TAGS)
    assert made.counts()["rejects"] == {"begins with an assistant turn": 1}


def test_a_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    made = plan(tmp_path, conversations(3))
    files = target_files(tmp_path / "target", WITH_TAGS)
    refuse_ids_beyond_table(files, made)
    beyond = {"input_ids": [7, 304, 9, 9, 900], "loss_mask": [1] * 5}
    made = plan(tmp_path, [*conversations(1), beyond, {**beyond, "input_ids": [303, 304, 9, 9, 305]}])
    with pytest.raises(DflashError, match=r"Sample 1 \(rows.jsonl:2\) holds token 304"):
        refuse_ids_beyond_table(files, made)


def test_samples_start_on_chunks_and_never_cross_a_shard(tmp_path: Path) -> None:
    made = plan(tmp_path, conversations(40))
    samples = made.samples
    assert made.shard_tokens % 16 == 0 and (samples.start % 16 == 0).all()
    assert (samples.start // made.shard_tokens == samples.shard).all()
    assert ((samples.start + samples.num_tokens - 1) // made.shard_tokens == samples.shard).all()
    assert (samples.start[1:] >= samples.start[:-1] + samples.num_tokens[:-1]).all()


def test_every_row_is_a_sample_or_a_counted_reject(tmp_path: Path) -> None:
    short = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    silent = {"messages": [{"role": "user", "content": "the cat sees the dog " * 4}]}
    made = plan(tmp_path, [*conversations(5), short, silent])
    counts = made.counts()
    assert counts["samples"] + sum(counts["rejects"].values()) == 7
    assert counts["rejects"] == {"no supervised token": 1, "supervised part too near the end": 1}


def test_a_long_conversation_is_cut_and_counted(tmp_path: Path) -> None:
    made = plan(tmp_path, conversations(6), max_length=40)
    whole = plan(tmp_path, conversations(6)).samples
    counts = made.counts()
    assert counts["truncated"] == (whole.num_tokens > 40).sum() > 0 and made.samples.num_tokens.max() == 40
    assert counts["truncated_supervised"] == whole.num_supervised.sum() - made.samples.num_supervised.sum() > 0


BAD_ROWS = {
    '{"messages": [': "is not JSON",
    "[1, 2]": "is a JSON list",
    '{"note": "x"}': "has none of the keys of a row (its keys are ['note']",
    '{"messages": [], "messages": []}': "has the key 'messages' twice",
    '{"messages": [{"role": "user", "content": "\\u12"}]}': "is not JSON",
    '{"messages": []}': "has no list 'messages'",
    '{"messages": ["hi"]}': "messages[0] of type str",
    '{"messages": [{"role": "robot", "content": "x"}]}': "messages[0].role 'robot'",
    '{"messages": [{"role": "user"}]}': "messages[0].content of type NoneType",
    '{"messages": [{"role": "user", "content": 3}]}': "messages[0].content of type int",
    '{"messages": [{"role": "user", "content": "  "}]}': "an empty messages[0].content",
    '{"messages": [{"role": "user", "content": "\\ud800"}]}': "unpaired surrogate",
}


def test_bad_rows_are_named_with_file_line_and_fault(tmp_path: Path) -> None:
    good = [json.dumps(row) for row in conversations(2)]
    with pytest.raises(BadInputError) as error:
        plan(tmp_path, [*good, *BAD_ROWS])
    text = str(error.value)
    for line, fault in enumerate(BAD_ROWS.values(), start=3):
        assert f"rows.jsonl:{line} " in text and fault in text
    assert "--skip-bad-rows" in text


def test_skipped_bad_rows_are_counted_and_the_good_kept(tmp_path: Path) -> None:
    good = [json.dumps(row) for row in conversations(2)]
    made = plan(tmp_path, [good[0], *BAD_ROWS, good[1]], skip_bad_rows=True)
    assert len(made.samples) == 2
    assert made.counts()["rejects"] == {"bad row": len(BAD_ROWS)}


def test_only_the_first_twenty_bad_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="and 5 more"):
        plan(tmp_path, ["nonsense"] * 25)


def test_data_without_a_sample_says_why(tmp_path: Path) -> None:
    silent = {"messages": [{"role": "user", "content": "the cat sees the dog"}]}
    with pytest.raises(BadInputError, match="2 rows: no supervised token"):
        plan(tmp_path, [silent, silent])
    with pytest.raises(BadInputError, match=r"within its first 5 tokens \(--max-length\)"):
        plan(tmp_path, conversations(3), max_length=5)


def test_the_mask_token_is_a_reserved_one_that_no_sample_contains(tmp_path: Path) -> None:
    made = plan(tmp_path, conversations(3))
    files = target_files(tmp_path / "target", WITH_TAGS)
    assert choose_mask_token(files, made.samples, made.first_uses, None) == files.tokenizer.convert_tokens_to_ids(
        "<|mask|>"
    )
    assert choose_mask_token(files, made.samples, made.first_uses, 303) == 303
    with pytest.raises(DflashError, match="no row of the target's embedding table"):
        choose_mask_token(files, made.samples, made.first_uses, 304)
    used = int(made.samples.input_ids(0)[5])
    with pytest.raises(DflashError, match=r"occurs in the data, first in rows\.jsonl:1"):
        choose_mask_token(files, made.samples, made.first_uses, used)


def test_samples_are_ordered_by_length_within_windows_and_keep_their_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dflash_offline.stages.conversations.places.WINDOW", 2)
    settings = {"shard_mib": 1, "slot_bytes": 2048}  # 512 slots a shard
    rows = conversations(60)
    plain, made = plan(tmp_path, rows, **settings), plan(tmp_path, rows, by_length=True, **settings)
    table, numbers = made.samples, plain.samples.num_tokens
    slots = np.cumsum(-(-numbers // 16) * 16)
    window = (slots - 1) // (2 * made.shard_tokens)
    assert window[-1] >= 3
    expected: list[int] = []
    for number in range(int(window[-1]) + 1):
        members = [i for i in range(60) if window[i] == number]
        expected += sorted(members, key=lambda i: numbers[i] if number % 2 else -numbers[i])
    assert (table.row - 1).tolist() == expected != list(range(60))
    for sample, row in enumerate(expected):
        assert np.array_equal(table.input_ids(sample), plain.samples.input_ids(row))
        assert np.array_equal(table.loss_mask(sample), plain.samples.loss_mask(row))
        assert table.num_anchors[sample] == plain.samples.num_anchors[row]
    assert (np.diff(table.start) > 0).all() and (table.start // made.shard_tokens == table.shard).all()
    assert made.counts() == plain.counts()
    used = np.flatnonzero(made.first_uses >= 0)
    assert np.array_equal(used, np.flatnonzero(plain.first_uses >= 0))
    assert np.array_equal(table.row[made.first_uses[used]], plain.samples.row[plain.first_uses[used]])
