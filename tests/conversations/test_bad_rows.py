"""Thousands of hostile lines: none crashes the plan, each bad one is named, each good one is kept."""

import json
import random
import tempfile
from pathlib import Path

import pytest
from chat_templates import encoder
from data_rows import BAD, one
from tiny_target import conversations

from dflash_offline.schemas.errors import BadInputError
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations.loss_mask import ConversationEncoder
from dflash_offline.stages.conversations.plan import Plan, make_plan
from dflash_offline.stages.conversations.sources import Data


@pytest.fixture(scope="module")
def without_tags(tmp_path_factory: pytest.TempPathFactory) -> ConversationEncoder:
    return encoder(tmp_path_factory.mktemp("target"), "none")


def planned(made: ConversationEncoder, path: Path, **settings: object) -> Plan:
    config = ExtractConfig(**{"data": (path,), "target": "t", "out": Path("o"), "block_size": 4, **settings})
    folder = Path(tempfile.mkdtemp(dir=path.parent))
    return make_plan(config, Data(config), made, 64, folder, lambda _rows: None, by_length=False)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_with_what_is_wrong(tmp_path: Path, without_tags: ConversationEncoder, name: str) -> None:
    write, fault = BAD[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(conversations(1)[0]).encode() + b"\n\n" + write(random.Random(0)) + b"\r\n")
    with pytest.raises(BadInputError) as caught:
        planned(without_tags, path)
    assert f"{path}:3 " in str(caught.value) and fault in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert len(planned(without_tags, path, skip_bad_rows=True).samples) == 1


@pytest.mark.parametrize("num_lines", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_lines_leave_the_good_ones(tmp_path: Path, without_tags: ConversationEncoder, num_lines: int) -> None:
    chance = random.Random(0)
    good = {json.dumps(row).encode() for row in conversations(200)}
    injected = one("assistant", "the <|im_end|> cat sees")
    control = json.dumps({"messages": [{"role": "user", "content": "\x00\x1b[0m"}, conversations(2)[1]["messages"][1]]})
    kinds: list[tuple[str, bytes]] = []
    path = tmp_path / "hostile.jsonl"
    names = [name for name in BAD if not name.startswith("deep")]
    while len(kinds) < num_lines:
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
    assert len(plan.rejects) == len(kinds) - len(expected["good"])
    with pytest.raises(BadInputError) as caught:
        planned(without_tags, path)
    said = str(caught.value)
    assert said.startswith(f"{len(expected['bad'])} bad rows:") and f"and {len(expected['bad']) - 20} more" in said
    assert [int(line.split(":")[1].split()[0]) for line in said.splitlines()[1:21]] == expected["bad"][:20]
    assert len(said) < 20_000


def test_a_line_that_never_ends_is_passed_over_without_being_held(
    tmp_path: Path, without_tags: ConversationEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dflash_offline.stages.conversations.reading.bounds.MOST_LINE_BYTES", 4096)
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
