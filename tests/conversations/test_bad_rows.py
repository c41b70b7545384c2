"""Thousands of hostile lines: none crashes the plan, each bad one is named, each good one is kept."""

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_masks import masker
from tiny_target import conversations

from dflash_offline.schemas.errors import BadInputError
from dflash_offline.schemas.samples import write_rejects
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations.loss_mask import Masker
from dflash_offline.stages.conversations.plan import Plan, make_plan
from dflash_offline.stages.conversations.sources import Data

NUM_LINES = 10_000
DEEP = 100_000


def one(role: object, content: object, **more: object) -> bytes:
    """Return a line whose second message is the one given."""
    question = {"role": "user", "content": "two"}
    return json.dumps({"messages": [question, {"role": role, "content": content, **more}]}).encode()


BAD: dict[str, tuple[Callable[[random.Random], bytes], str]] = {
    "broken UTF-8": (lambda r: one("user", "a").replace(b"two", bytes([r.choice([0x80, 0xC3, 0xFF])])), "is not UTF-8"),
    "surrogate bytes": (lambda r: one("user", "a").replace(b"two", b"\xed\xa0\x80"), "is not UTF-8"),
    "UTF-16": (lambda r: one("user", "a").decode().encode("utf-16-be").replace(b"\n", b""), "is not JSON"),
    "a NUL byte": (lambda r: b"\0" + one("user", "a"), "is not JSON"),
    "cut": (lambda r: (line := one("user", "a"))[: r.randrange(1, len(line))], "is not JSON"),
    "raw control character": (lambda r: one("user", "a").replace(b"two", bytes([r.randrange(1, 9)])), "is not JSON"),
    "unpaired surrogate": (lambda r: one("assistant", "\ud800"), "unpaired surrogate"),
    "null": (lambda r: b"null", "is a JSON NoneType"),
    "number": (lambda r: str(r.random()).encode(), "is a JSON float"),
    "huge number": (lambda r: b"9" * 5000, "is not JSON"),
    "list": (lambda r: b"[" + one("user", "a") + b"]", "is a JSON list"),
    "deep": (lambda r: b"[" * DEEP, "is nested more than 100 deep"),
    "deep object": (lambda r: b'{"messages":' * DEEP, "is nested more than 100 deep"),
    "no keys": (lambda r: b"{}", "has none of the keys"),
    "null messages": (lambda r: b'{"messages": null}', "has no list 'messages'"),
    "null turn": (lambda r: b'{"messages": [null]}', "messages[0] of type NoneType"),
    "number as role": (lambda r: one(r.choice([1, None, [], {}, True]), "a"), "messages[1].role"),
    "number as content": (lambda r: one("user", r.choice([1, 1.5, {}, True, [3]])), "messages[1].content"),
    "picture": (lambda r: one("user", [{"type": "image_url", "image_url": "x"}]), "'image_url'; expected parts"),
    "empty turn": (lambda r: one("assistant", r.choice(["", " ", "\n\t", None])), "messages[1].content"),
    "doubled key": (lambda r: one("user", "a").replace(b'{"role"', b'{"role": "user", "role"'), "'role' twice"),
    "string as calls": (lambda r: one("assistant", "a", tool_calls="x"), "tool_calls of type str"),
    "nameless call": (lambda r: one("assistant", "a", tool_calls=[{"function": {}}]), "without a function"),
    "calls not JSON": (
        lambda r: one("assistant", "a", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
        "is not JSON",
    ),
    "number as reasoning": (lambda r: one("assistant", "a", reasoning_content=3), "reasoning_content of type int"),
    "tools": (lambda r: json.dumps({**json.loads(one("user", "a")), "tools": [3]}).encode(), "tools that are not"),
    "ShareGPT": (lambda r: b'{"conversations": [{"from": "robot", "value": "a"}]}', "conversations[0].from 'robot'"),
    "ShareGPT null": (lambda r: b'{"conversations": [{"from": "gpt", "value": null}]}', "conversations[0].content"),
    "response": (lambda r: b'{"prompt": "a", "response": 3}', "response.content of type int"),
    "text": (lambda r: b'{"text": ["a"]}', "text of type list"),
    "tokens": (lambda r: b'{"input_ids": [1, -2], "loss_mask": [1, 1]}', "input_ids that are not all"),
    "mask": (lambda r: b'{"input_ids": [1, 2], "loss_mask": [1, 2]}', "loss_mask that is not all"),
    "lengths": (lambda r: b'{"input_ids": [1, 2], "loss_mask": [1]}', "2 input_ids and a loss_mask of 1"),
    "tokens as text": (lambda r: b'{"input_ids": "1 2", "loss_mask": "1 2"}', "input_ids of type str"),
}


@pytest.fixture(scope="module")
def without_tags(tmp_path_factory: pytest.TempPathFactory) -> Masker:
    return masker(tmp_path_factory.mktemp("target"), "none")


def planned(made: Masker, path: Path, **settings: object) -> Plan:
    config = ExtractConfig(**{"data": (path,), "target": "t", "out": Path("o"), "block_size": 4, **settings})
    folder = Path(tempfile.mkdtemp(dir=path.parent))
    return make_plan(config, Data(config), made, 64, folder, lambda _rows: None)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_with_what_is_wrong(tmp_path: Path, without_tags: Masker, name: str) -> None:
    write, fault = BAD[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(conversations(1)[0]).encode() + b"\n\n" + write(random.Random(0)) + b"\r\n")
    with pytest.raises(BadInputError) as caught:
        planned(without_tags, path)
    assert f"{path}:3 " in str(caught.value) and fault in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert len(planned(without_tags, path, skip_bad_rows=True).samples) == 1


def test_ten_thousand_hostile_lines_leave_the_good_ones(tmp_path: Path, without_tags: Masker) -> None:
    chance = random.Random(0)
    good = {json.dumps(row).encode() for row in conversations(200)}
    injected = one("assistant", "the <|im_end|> cat sees")
    control = json.dumps({"messages": [{"role": "user", "content": "\x00\x1b[0m"}, conversations(2)[1]["messages"][1]]})
    kinds: list[tuple[str, bytes]] = []
    path = tmp_path / "hostile.jsonl"
    names = [name for name in BAD if not name.startswith("deep")]
    while len(kinds) < NUM_LINES:
        name = chance.choice(names)
        kinds += [("bad", BAD[name][0](chance)), ("good", chance.choice(sorted(good)))]
        kinds += [("injected", injected), ("good", control.encode())][: chance.randrange(3)]
    large = b'{"messages": [{"role": "user", "content": "' + b"a" * 50_000_000
    kinds += [
        ("long", large + b'"}]}'),
        ("bad", large),
        ("bad", large + b'", "role": 3}]}'),
        ("bad", BAD["deep"][0](chance)),
    ]
    path.write_bytes(b"\n".join(line for _, line in kinds) + b"\n")
    del large

    plan = planned(without_tags, path, skip_bad_rows=True)
    expected = {
        kind: [i for i, (k, _) in enumerate(kinds, start=1) if k == kind]
        for kind in ("good", "bad", "injected", "long")
    }
    assert plan.samples.row.tolist() == expected["good"]
    assert [reject.row for reject in plan.rejects if reject.reason == "bad row"] == expected["bad"]
    assert [reject.row for reject in plan.rejects if reject.reason == "special token in content"] == expected[
        "injected"
    ]
    assert [reject.row for reject in plan.rejects if reject.reason == "far too long"] == expected["long"]
    write_rejects(tmp_path / "rejects.parquet", plan.rejects)
    assert pq.read_table(tmp_path / "rejects.parquet").num_rows == len(kinds) - len(expected["good"])
    with pytest.raises(BadInputError) as caught:
        planned(without_tags, path)
    said = str(caught.value)
    assert said.startswith(f"{len(expected['bad'])} bad rows:") and f"and {len(expected['bad']) - 20} more" in said
    assert [int(line.split(":")[1].split()[0]) for line in said.splitlines()[1:21]] == expected["bad"][:20]
    assert len(said) < 20_000


def test_a_line_that_never_ends_is_passed_over_without_being_held(
    tmp_path: Path, without_tags: Masker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dflash_offline.stages.conversations.files.MOST_LINE_BYTES", 4096)
    good = json.dumps(conversations(1)[0])
    path = tmp_path / "a.jsonl"
    path.write_text(f"{good}\n{'x' * 9000}\n{good}\n{'x' * 4095}\n{good}\n{'x' * 5000}")
    plan = planned(without_tags, path, skip_bad_rows=True)
    assert plan.samples.row.tolist() == [1, 3, 5]
    assert [(reject.row, reject.detail[:14]) for reject in plan.rejects] == [
        (2, "is longer than"),
        (4, "is not JSON (E"),
        (6, "is longer than"),
    ]
