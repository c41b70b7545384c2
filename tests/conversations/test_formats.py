"""Every way to write rows, read the same; what data arguments name; weights, limits and duplicates."""

import gzip
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from chat_templates import TWO, encoder
from data_rows import write_arrow
from tiny_target import conversations

from dflash_offline.schemas.errors import BadInputError
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.option import options
from dflash_offline.stages.conversations import content
from dflash_offline.stages.conversations.files import CONTAINERS, Row, identify, read_rows
from dflash_offline.stages.conversations.loss_mask import ConversationEncoder
from dflash_offline.stages.conversations.plan import Plan, make_plan
from dflash_offline.stages.conversations.sources import Data

Rows = list[dict[str, Any]]


def as_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_parquet(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    return path


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def arrow_stream(batches: int, rows: int) -> bytes:
    sink = pa.BufferOutputStream()
    batch = pa.RecordBatch.from_pylist([{"text": "a"}] * rows)
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        for _ in range(batches):
            stream.write_batch(batch)
    return bytes(sink.getvalue())


def save_dataset(folder: Path, rows: Rows) -> Path:
    """Write rows as the `datasets` library saves them to disk: Arrow streams, and a state that lists them."""
    folder.mkdir()
    half = len(rows) // 2
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (rows[:half], rows[half:]), strict=True):
        write_arrow(folder / name, part, stream=True)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


WRITERS: dict[str, Callable[[Path, Rows], Path]] = {
    "jsonl": lambda f, rows: write_bytes(f / "a.jsonl", as_lines(rows)),
    "jsonl, no newline, a BOM": lambda f, rows: write_bytes(f / "a.jsonl", b"\xef\xbb\xbf" + as_lines(rows).rstrip()),
    "jsonl named json": lambda f, rows: write_bytes(f / "a.json", as_lines(rows)),
    "jsonl.gz": lambda f, rows: write_bytes(f / "a.jsonl.gz", gzip.compress(as_lines(rows))),
    "jsonl.zst": lambda f, rows: write_bytes(f / "a.jsonl.zst", zstandard.compress(as_lines(rows))),
    "json": lambda f, rows: write_bytes(f / "a.json", json.dumps(rows, indent=1).encode()),
    "json without a name": lambda f, rows: write_bytes(f / "chats", json.dumps(rows).encode()),
    "parquet": lambda f, rows: write_parquet(f / "a.parquet", rows),
    "arrow file": lambda f, rows: write_arrow(f / "a.arrow", rows, stream=False),
    "arrow stream": lambda f, rows: write_arrow(f / "a.arrow", rows, stream=True),
    "saved dataset": lambda f, rows: save_dataset(f / "saved", rows),
}
SHAREGPT = {"user": "human", "assistant": "gpt"}
WHOLE = (
    "<|im_start|>user\ntwo cats<|im_end|>\n<|im_start|>assistant\na red dog<|im_end|>\n"
    "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nthe bird sees<|im_end|>\n"
)
SHORT = WHOLE[: WHOLE.index("<|im_start|>user\none")]
ROW_FORMATS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "messages": (
        {"messages": TWO, "id": "x"},
        {
            "assistant": "a red dog<|im_end|>the bird sees<|im_end|>",
            "last-turn": "the bird sees<|im_end|>",
            "all": WHOLE,
        },
    ),
    "messages of parts": (
        {"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in TWO]},
        {
            "assistant": "a red dog<|im_end|>the bird sees<|im_end|>",
            "last-turn": "the bird sees<|im_end|>",
            "all": WHOLE,
        },
    ),
    "sharegpt": (
        {"conversations": [{"from": SHAREGPT[m["role"]], "value": m["content"]} for m in TWO]},
        {
            "assistant": "a red dog<|im_end|>the bird sees<|im_end|>",
            "last-turn": "the bird sees<|im_end|>",
            "all": WHOLE,
        },
    ),
    "prompt-response": (
        {"prompt": "two cats", "response": "a red dog"},
        {"assistant": "a red dog<|im_end|>", "last-turn": "a red dog<|im_end|>", "all": SHORT},
    ),
    "text": ({"text": "one bird"}, dict.fromkeys(("assistant", "last-turn", "all"), "one bird")),
    "tokens": (
        {"input_ids": [*b"a red dog!"], "loss_mask": [0, 0, 1, 1, 0, 0, 1, 1, 1, 0]},
        {},
    ),
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ConversationEncoder]:
    rules = ("assistant", "last-turn", "all")
    return {rule: encoder(tmp_path_factory.mktemp(rule), "none", mask=rule) for rule in rules}


def planned(made: ConversationEncoder, *data: Path | str, **settings: Any) -> Plan:
    paths = tuple(Path(path) for path in data)
    config = ExtractConfig(data=paths, target="t", out=Path("o"), block_size=2, mask=made.config.mask, **settings)
    folder = Path(tempfile.mkdtemp(dir=paths[0].parent))
    return make_plan(config, Data(config), made, 64, folder, lambda _rows: None, by_length=False)


@pytest.mark.parametrize("rule", ["assistant", "last-turn", "all"])
@pytest.mark.parametrize("row_format", ROW_FORMATS)
@pytest.mark.parametrize("container", WRITERS)
def test_every_format_under_every_mask_rule_decodes_to_the_expected_text(
    tmp_path: Path, encoders: dict[str, ConversationEncoder], container: str, row_format: str, rule: str
) -> None:
    row, expected = ROW_FORMATS[row_format]
    path = WRITERS[container](tmp_path, [row] * 10)
    plan = planned(encoders[rule], path)
    samples = plan.samples
    assert len(samples) == 10 and plan.rejects == []
    if container == "saved dataset":
        assert samples.row.tolist() == [1, 2, 3, 4, 5] * 2
    else:
        assert samples.row.tolist() == list(range(1, 11)) and samples.sources == (path.name,)
    tokenizer = encoders[rule].tokenizer
    for sample in (0, 9):
        supervised = samples.input_ids(sample)[samples.loss_mask(sample)].tolist()
        if row_format == "tokens":
            first = {"assistant": [2, 3, 6, 7, 8], "last-turn": [6, 7, 8], "all": range(10)}[rule]
            assert supervised == [row["input_ids"][i] for i in first]
        else:
            assert tokenizer.decode(supervised) == expected[rule]
    name = row_format.removesuffix(" of parts")
    assert list(plan.counts()["formats"]) == [f"{identify(path).container if path.is_file() else 'arrow'}, {name}"]


def values(path: Path, **settings: Any) -> list[Any]:
    return [row.fault or row.value for row in read_rows(identify(path, **settings))]


@pytest.mark.parametrize("pieces", [1, 7, 1000])
def test_a_json_array_is_read_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    rows = [{"text": 'a"],[{"' * n, "n": [n, {"x": -1.5e3}]} for n in range(9)]
    for number, text in enumerate((json.dumps(rows), json.dumps(rows, indent=2), f" \n{json.dumps(rows)} \n", "[]")):
        path = write_bytes(tmp_path / f"{number}.json", text.encode())
        file = identify(path)
        with monkeypatch.context() as patch:
            patch.setattr("dflash_offline.stages.conversations.reading.json_text.PIECE", pieces)
            assert [row.value for row in read_rows(file)] == ([] if text == "[]" else rows)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'[{"text": "a"}, {"text": ', "after row 1: row 2 is broken or unfinished"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "row 1 is followed by '{'"),
        ("a.json", b'[{"text": "a"}] [1]', "more follows the end"),
        ("a.json", b'{\n"text": "a"\n}\n{"text": "a"}', "more follows the end"),
        ("a.json", b'[{"text": "\xff"}]', "invalid start byte"),
        ("a.json", b"[" * 100_000, "recursion"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9000)[:-20], "Compressed file ended"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-5], "marker was reached. Get the whole file."),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0) + b"more", "bytes that are not gzip follow"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9000) + b"PK", "after row 9000: bytes that are not gzip"),
        ("a.json", b'[{"text": "a"}, {"text": oops}, {"text": "b"}]', "row 2 is broken (Expecting value), and where"),
        (
            "a.json",
            b'[{"text": "a"}, {text: "a"}, {"text": "b"}]',
            "row a line (jsonl), where --skip-bad-rows leaves it out.",
        ),
        ("a.arrow", arrow_stream(batches=4, rows=3)[:-200], "as arrow after row 6: Expected to be able to read"),
        ("a.arrow", arrow_stream(batches=2, rows=200)[:-200], "as arrow after row 200: Expected to be able to read"),
        ("a.parquet", b"PAR1 but not really", "as parquet after row 0"),
        ("a.arrow", b"ARROW1 but not really", "as arrow after row 0"),
    ],
)
def test_a_file_that_breaks_off_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    with pytest.raises(BadInputError) as caught:
        values(write_bytes(tmp_path / name, content))
    assert said in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_a_zst_file_may_have_several_frames_and_must_be_whole(tmp_path: Path) -> None:
    frames = zstandard.compress(b'{"text": "a"}\n') + zstandard.compress(b'{"text": "b"}\n')
    assert values(write_bytes(tmp_path / "a.zst", frames)) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(BadInputError, match="cannot be read"):
        values(write_bytes(tmp_path / "b.zst", frames[:-5]))


def test_a_format_can_be_forced(tmp_path: Path, encoders: dict[str, ConversationEncoder]) -> None:
    both = {"messages": TWO, "text": "one bird"}
    path = write_bytes(tmp_path / "a.txt", as_lines([both]))
    made = planned(encoders["assistant"], path, input_format="jsonl,text")
    assert encoders["assistant"].tokenizer.decode(made.samples.input_ids(0).tolist()) == "one bird"
    with pytest.raises(BadInputError, match="cannot be read as parquet"):
        planned(encoders["assistant"], path, input_format="parquet")
    with pytest.raises(BadInputError, match=r"xml.*expected one of json, jsonl"):
        planned(encoders["assistant"], path, input_format="xml")


def test_help_and_completion_of_the_option_name_every_format() -> None:
    option = options(ExtractConfig)["input_format"]
    assert sorted(option.completions) == sorted((*CONTAINERS, *content.ROW_FORMATS))
    assert all(re.search(rf"\b{name}\b", option.help) for name in option.completions)


def test_columns_without_rows_are_not_read_and_nulls_are_no_keys(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": "b"}, {"role": "user", "content": "a"}], "image": b"x"}
    ]
    assert values(write_parquet(tmp_path / "a.parquet", rows)) == [{"messages": rows[0]["messages"]}]


def test_a_string_of_arrow_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    array = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    found = values(tmp_path / "a.parquet")
    assert found[0] == {"text": "a"} and "is damaged (" in found[1] and "UTF8" in found[1] and found[2] == {"text": "c"}


def test_spoiled_arrow_bytes_never_lead_out_of_the_file(tmp_path: Path) -> None:
    rows = [{"messages": TWO}] * 40
    whole = write_arrow(tmp_path / "whole.arrow", rows, stream=True).read_bytes()
    chance, outcomes = random.Random(0), set()
    for _ in range(300):
        spoiled = bytearray(whole)
        at = chance.randrange(8, len(whole))
        spoiled[at : at + 8] = chance.randbytes(8)
        path = write_bytes(tmp_path / "spoiled.arrow", spoiled)
        try:
            found = values(path)
        except BadInputError:
            outcomes.add("refused")
        else:
            outcomes.add(
                "same" if found == rows else "named" if any("is damaged" in str(v) for v in found) else "other"
            )
    assert {"refused", "same", "named"} <= outcomes


def lines(tmp_path: Path, name: str, count: int) -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_bytes(path, as_lines([{"text": f"{name} {i}"} for i in range(count)]))


def drawn(*data: Path | str, **settings: Any) -> tuple[list[Row], Data]:
    config = ExtractConfig(data=tuple(Path(path) for path in data), target="t", out=Path("o"), **settings)
    found = Data(config)
    return list(found.rows()), found


def test_folders_and_globs_are_read_in_the_order_of_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("d/b.jsonl", "d/a/c.jsonl.gz.jsonl", "d/.hidden/x.jsonl", "e.jsonl"):
        lines(tmp_path, name, 1)
    (tmp_path / "d/README.md").write_text("no data")
    assert [row.source.name for row in drawn(tmp_path / "d")[0]] == ["a/c.jsonl.gz.jsonl", "b.jsonl"]
    assert [row.source.name for row in drawn(tmp_path / "*")[0]] == ["a/c.jsonl.gz.jsonl", "b.jsonl", "e.jsonl"]
    monkeypatch.chdir(tmp_path)
    assert [row.source.name for row in drawn("**/b*.jsonl")[0]] == ["b.jsonl"]
    for nothing in ("f*.jsonl", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(BadInputError, match="names no data file"):
            drawn(nothing)


def test_a_pipe_is_no_data_for_it_could_be_read_only_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(BadInputError, match="is not a file or a folder"):
        drawn(tmp_path / "a.jsonl")
    for several in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(BadInputError, match="names no data file"):
            drawn(several)


def test_a_saved_dataset_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        save_dataset(both / split, [{"text": split}] * 4)
    with pytest.raises(BadInputError, match=r"the splits test, train\. Name the folder of one"):
        drawn(both)
    assert len(drawn(both / "test")[0]) == 4
    (both / "test/state.json").write_text('{"_data_files": 3}')
    with pytest.raises(BadInputError, match="does not list a saved dataset's files"):
        drawn(both / "test")


def test_a_weight_takes_its_share_mixed_by_seed(tmp_path: Path) -> None:
    a, b = lines(tmp_path, "a.jsonl", 1000), lines(tmp_path, "b.jsonl", 1000)
    rows, data = drawn(f"{a}:0.3", b, seed=1)
    names = [row.source.name for row in rows]
    assert 250 < names.count("a.jsonl") < 350 and names.count("b.jsonl") == 1000
    assert data.num_not_drawn == 1000 - names.count("a.jsonl")
    assert len({row.place for row in rows}) == len(rows)
    assert 30 < names[:200].count("a.jsonl") < 70  # mixed, not one after the other
    assert [row.place for row in drawn(f"{a}:0.3", b, seed=1)[0]] == [row.place for row in rows]
    assert [row.place for row in drawn(f"{a}:0.3", b, seed=2)[0]] != [row.place for row in rows]
    assert [row.place for row in drawn(f"{a}:0.3", b, seed=1, limit=50)[0]] == [row.place for row in rows[:50]]


def test_without_weights_rows_keep_their_order_and_a_limit_takes_the_first(tmp_path: Path) -> None:
    a, b = lines(tmp_path, "a.jsonl", 3), lines(tmp_path, "b:0.5", 2)  # a file of that very name
    assert [row.value["text"] for row in drawn(a, b, seed=3)[0]] == [
        "a.jsonl 0",
        "a.jsonl 1",
        "a.jsonl 2",
        "b:0.5 0",
        "b:0.5 1",
    ]
    assert len(drawn(a, b, limit=4)[0]) == 4
    with pytest.raises(BadInputError, match=r"has weight 1\.5; expected more than 0 and at most 1"):
        drawn(f"{a}:1.5")


def test_exact_duplicates_are_dropped_and_counted_where_asked(
    tmp_path: Path, encoders: dict[str, ConversationEncoder]
) -> None:
    rows = conversations(4)
    path = write_bytes(tmp_path / "a.jsonl", as_lines([*rows, *rows[:2], {**rows[0], "id": 7}]))
    again = write_parquet(tmp_path / "b.parquet", rows)
    assert len(planned(encoders["assistant"], path, again).samples) == 11
    counts = planned(encoders["assistant"], path, again, drop_duplicates=True).counts()
    assert counts["samples"] == 4 and counts["rejects"] == {"duplicate": 7}


def test_a_hub_id_needs_the_datasets_library_and_is_read_from_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dflash_offline.stages.conversations.sources.find_spec", lambda _name: None)
    with pytest.raises(BadInputError, match=r"pip install 'dflash-offline\[hub\]'"):
        drawn("owner/chats")
    for nothing in ("nowhere.jsonl", "data/nowhere.jsonl", "/nowhere/a"):
        with pytest.raises(BadInputError, match="is not a file or a folder"):
            drawn(nothing)
    saved = save_dataset(tmp_path / "saved", [{"text": "a"}] * 4)
    asked = []

    def load_dataset(name: str, split: str | None = None) -> Any:
        asked.append((name, split))
        if split == "none":
            raise ValueError("Unknown split")
        whole = SimpleNamespace(cache_files=[{"filename": str(path)} for path in sorted(saved.glob("*.arrow"))])
        return whole if split else {"train": whole}

    monkeypatch.setattr("dflash_offline.stages.conversations.sources.find_spec", lambda _name: True)
    monkeypatch.setitem(
        sys.modules,
        "datasets",
        SimpleNamespace(load_dataset=load_dataset, get_dataset_config_names=lambda _name: ["default"]),
    )
    assert len(drawn("owner/chats:0.5")[0]) + drawn("owner/chats:0.5")[1].num_not_drawn == 4
    assert len(drawn("owner/chats@test")[0]) == 4
    assert asked[-1] == ("owner/chats", "test") and asked[0] == ("owner/chats", None)
    with pytest.raises(BadInputError, match="owner/chats@none cannot be loaded: Unknown split"):
        drawn("owner/chats@none")


class Instruction(SimpleNamespace):
    """The part of `datasets.ReadInstruction` that is used, for whole numbers."""

    @classmethod
    def from_spec(cls, spec: str) -> "Instruction":
        return cls(parts=[re.fullmatch(r"(\w+)\[(\d*):(\d*)\]", part) for part in spec.split("+")])

    def to_absolute(self, lengths: dict[str, int]) -> list[SimpleNamespace]:
        parts = [match.groups() for match in self.parts]
        return [SimpleNamespace(splitname=n, from_=int(a or 0), to=int(b or lengths[n])) for n, a, b in parts]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub whose every dataset has splits of ten rows in two files; the splits that were asked for."""
    splits = {split: save_dataset(tmp_path / split, [{"text": f"{split} {i}"} for i in range(10)]) for split in "ab"}
    asked: list[str] = []

    class Dataset(SimpleNamespace):
        def __len__(self) -> int:
            parts = Instruction.from_spec(self.split).to_absolute(dict.fromkeys("ab", 10))
            return sum(part.to - part.from_ for part in parts)

    def load_dataset(name: str, split: str) -> Dataset:
        asked.append(f"{name}@{split}")
        files = [path for part in splits if part in split for path in sorted(splits[part].glob("*.arrow"))]
        info = SimpleNamespace(splits=dict.fromkeys("ab", SimpleNamespace(num_examples=10)))
        return Dataset(cache_files=[{"filename": str(path)} for path in files], info=info, split=split)

    monkeypatch.setattr("dflash_offline.stages.conversations.sources.find_spec", lambda _name: True)
    library = SimpleNamespace(
        load_dataset=load_dataset, ReadInstruction=Instruction, get_dataset_config_names=lambda _name: ["default"]
    )
    monkeypatch.setitem(sys.modules, "datasets", library)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return asked


@pytest.mark.parametrize("name", ["owner/chats", "chats"])
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("a[2:4]", ["a 2", "a 3"]),
        ("a[4:7]", ["a 4", "a 5", "a 6"]),  # of both files
        ("a[:1]+b[9:]", ["a 0", "b 9"]),
        ("b[6:]", ["b 6", "b 7", "b 8", "b 9"]),
        ("a+b", [f"{split} {i}" for split in "ab" for i in range(10)]),
    ],
)
def test_a_slice_of_a_hub_split_is_those_rows_alone(hub: list[str], name: str, split: str, expected: list[str]) -> None:
    rows, data = drawn(f"{name}@{split}")
    assert [row.value["text"] for row in rows] == expected
    assert hub[0] == f"{name}@{split}"
    assert len(drawn(f"{name}@{split}:1.0")[0]) == len(expected)
    cuts = {key: rows for key, rows in data.identity().items() if key.endswith("_rows")}
    assert bool(cuts) == ("[" in split)
    if cuts:
        assert data.identity() != drawn(f"{name}@a[:3]")[1].identity()


def test_what_exists_here_is_read_though_a_hub_split_could_be_meant(hub: list[str], tmp_path: Path) -> None:
    lines(tmp_path / "elsewhere", "owner/chats@a1", 2)  # a file that the brackets match
    assert len(drawn("owner/chats@a[1:2]")[0]) == 2
    lines(tmp_path / "elsewhere", "owner/chats@a[1:2]", 3)  # one of that very name
    assert len(drawn("owner/chats@a[1:2]")[0]) == 3
    assert len(drawn("owner/chats@*")[0]) == 5
    for glob in ("v[12].jsonl", "owner/chats@v[12].jsonl", "a/b/c@a[1:2]"):
        with pytest.raises(BadInputError, match="names no data file"):
            drawn(glob)
    assert not hub
    with pytest.raises(BadInputError, match="is not a file or a folder"):
        drawn("chats.jsonl@a[1:2]")


def test_a_slice_without_the_datasets_library_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dflash_offline.stages.conversations.sources.find_spec", lambda _name: None)
    for split in ("train[:100]", "train[10:20]", "train[:1%]", "train[:5%]+test[-3:]", "train[:20%](closest)"):
        with pytest.raises(BadInputError, match=r"pip install 'dflash-offline\[hub\]'"):
            drawn(f"owner/chats@{split}")
