"""Columns of Parquet and Arrow mean what their types say: JSON at any depth, maps, views; other types are refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dflash_offline.schemas.errors import BadInputError
from dflash_offline.stages.conversations.files import identify, read_rows

JSON = pa.json_()
CALL = {"type": "function", "function": {"name": "f", "arguments": {"depth": None, "of": ["a", 1]}}}
TURNS = [{"role": "user", "content": "how deep?"}, {"role": "assistant", "content": '"12"', "tool_calls": [CALL]}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "default": None}}}]


def text(value: Any) -> str:
    return json.dumps(value)


def write(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with (pa.ipc.new_stream if path.suffix == ".ipc" else pa.ipc.new_file)(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


def values(path: Path) -> list[Any]:
    return [row.fault or row.value for row in read_rows(identify(path))]


def typed(cells: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return an array with the types of another of the same storage, which pyarrow makes of no values itself."""
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, cells)
    if pa.types.is_struct(kind):
        parts = [typed(part, field.type) for part, field in zip(cells.flatten(), kind, strict=True)]
        return pa.StructArray.from_arrays(parts, fields=list(kind))
    if pa.types.is_map(kind):
        return pa.MapArray.from_arrays(cells.offsets, cells.keys, typed(cells.items, kind.item_type))
    if pa.types.is_nested(kind):
        return type(cells).from_arrays(cells.offsets, typed(cells.flatten(), kind.value_type))
    return cells


def storage(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return kind.storage_type
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, storage(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(kind.key_type, storage(kind.item_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(storage(kind.value_type))
    return pa.list_(storage(kind.value_type)) if pa.types.is_list(kind) else kind


def column(kind: pa.DataType, *cells: Any) -> pa.Array:
    return typed(pa.array(cells, storage(kind)), kind)


TURN = pa.struct([("role", pa.string()), ("content", JSON), ("tool_calls", JSON)])
STRUCTS = [{"role": t["role"], "content": text(t["content"]), "tool_calls": text(t.get("tool_calls"))} for t in TURNS]
TYPED: dict[str, tuple[dict[str, pa.Array], dict[str, Any]]] = {
    "a column": ({"messages": column(JSON, text(TURNS))}, {"messages": TURNS}),
    "in a list": (
        {
            "messages": column(pa.list_(JSON), [text(turn) for turn in TURNS]),
            "tools": column(pa.list_(JSON), [text(tool) for tool in TOOLS]),
        },
        {"messages": TURNS, "tools": TOOLS},
    ),
    "in structs in a list": ({"messages": column(pa.large_list(TURN), STRUCTS)}, {"messages": TURNS}),
    "in a map in structs": (
        {
            "messages": column(
                pa.list_(pa.struct([("role", pa.string()), ("calls", pa.map_(pa.string(), JSON))])),
                [{"role": "user", "calls": [("a", "null"), ("b", '{"c": [null]}')]}],
            )
        },
        {"messages": [{"role": "user", "calls": {"a": None, "b": {"c": [None]}}}]},
    ),
    "of long texts": ({"messages": column(pa.json_(pa.large_string()), text(TURNS))}, {"messages": TURNS}),
    "beside null": ({"messages": column(JSON, text(TURNS)), "text": column(JSON, None)}, {"messages": TURNS}),
    "a text": ({"text": column(JSON, text("one bird"))}, {"text": "one bird"}),
}
PLAIN: dict[str, pa.DataType] = {
    "large": pa.large_string(),
    "view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "large dictionary": pa.dictionary(pa.int8(), pa.large_string()),
}


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".ipc"])
@pytest.mark.parametrize("name", TYPED)
def test_json_is_read_as_what_it_means(tmp_path: Path, name: str, ending: str) -> None:
    columns, expected = TYPED[name]
    assert values(write(tmp_path / f"a{ending}", pa.table(columns))) == [expected]


def test_json_of_a_parquet_file_that_no_arrow_library_wrote(tmp_path: Path) -> None:
    pq.write_table(pa.table({"messages": column(JSON, text(TURNS))}), tmp_path / "a.parquet", store_schema=False)
    assert values(tmp_path / "a.parquet") == [{"messages": TURNS}]


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ("[{", "has messages[] of JSON that is not JSON"),
        ('{"role": "user", "role": "system"}', "has messages[] of JSON that has the key 'role' twice"),
        ("[" * 200 + "]" * 200, "has messages[] of JSON that is nested more than 100 deep"),
    ],
)
def test_json_that_is_none_is_one_bad_row(tmp_path: Path, cell: str, fault: str) -> None:
    good = [text(turn) for turn in TURNS]
    path = write(tmp_path / "a.parquet", pa.table({"messages": column(pa.list_(JSON), good, [cell], good)}))
    first, bad, last = values(path)
    assert first == last == {"messages": TURNS} and fault in bad


@pytest.mark.parametrize("name", PLAIN)
def test_texts_of_every_type_are_texts(tmp_path: Path, name: str) -> None:
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", PLAIN[name])]))
    said = [{"role": "user", "content": "a" * 40}, {"role": "assistant", "content": "b"}]
    cells = pa.array([said, said], pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))
    if "dictionary" in name:
        turns = cells.flatten()
        content = turns.field("content").dictionary_encode().cast(PLAIN[name])
        both = pa.StructArray.from_arrays([turns.field("role"), content], fields=list(kind.value_type))
        cells = pa.ListArray.from_arrays(cells.offsets, both)
    table = pa.table({"messages": cells if "dictionary" in name else cells.cast(kind)})
    assert values(write(tmp_path / "a.arrow", table)) == [{"messages": said}] * 2


class Picture(pa.ExtensionType):
    def __init__(self) -> None:
        super().__init__(pa.string(), "tests.picture")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> "Picture":
        return cls()


@pytest.mark.parametrize(
    ("kind", "cell", "said"),
    [
        (Picture(), "a", "column text is of the type 'tests.picture'; expected text, numbers"),
        (pa.list_(Picture()), ["a"], "column text[] is of the type 'tests.picture'"),
        (pa.list_(pa.struct([("content", Picture())])), [{"content": "a"}], "column text[].content is of the type"),
        (pa.uuid(), b"0" * 16, "column text is of the type 'arrow.uuid'"),
        (pa.map_(pa.int32(), pa.string()), [(1, "a")], "column text is a map whose keys are of type int32"),
    ],
)
def test_a_type_that_no_row_is_written_in_is_refused_by_its_column(
    tmp_path: Path, kind: pa.DataType, cell: Any, said: str
) -> None:
    table = pa.table({"text": column(kind, cell), "picture": column(Picture(), "a")})
    for ending in (".arrow", ".parquet"):
        with pytest.raises(BadInputError) as caught:
            values(write(tmp_path / f"a{ending}", table))
        assert said in str(caught.value)
    other = pa.table({"text": ["one bird"], "picture": column(Picture(), "a")})  # a column that no row is made of
    assert values(write(tmp_path / "b.arrow", other)) == [{"text": "one bird"}]
