"""Every field of every document, forged and sealed again: refused by name, or read without harm; never a traceback."""

import copy as copying
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cache_files import unsealed
from feature_writer import create, fill_cache

from dflash_offline.pipeline.inspect.cache import print_overview
from dflash_offline.pipeline.inspect.overview import overview
from dflash_offline.pipeline.inspect.run import read_run
from dflash_offline.pipeline.inspect.run_report import print_run
from dflash_offline.pipeline.inspect.shard import print_shard, shard_view
from dflash_offline.schemas.checked import PathWithin
from dflash_offline.schemas.commits import Commit
from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.draft.lint import lint_draft
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.evaluation import read_result
from dflash_offline.schemas.manifest import Layout
from dflash_offline.schemas.run import RunRecord
from dflash_offline.schemas.sealed import parse_json, sealed_bytes
from dflash_offline.stages.answers.journal import _entry
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.verify import verify_cache
from dflash_offline.stages.training.checkpoint import TrainState, read_state

DEEP: Any = []
for _ in range(25):
    DEEP = [DEEP]
LIES = (None, "", -1, "../x", 1 << 40, [], "/etc/passwd", 10**30, {}, "a\0b", 1e308, DEEP, "\ud800", True, 0, 1, -1.5)
"""What a field may be made to say; all that JSON can hold and this program's writer would seal."""

Path_ = tuple[str | int, ...]


def places(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Every place within a JSON value; of a list's items the first."""
    parts = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for name, part in parts:
        yield (*at, name)
        yield from places(part, (*at, name))


def forgeries(document: dict[str, Any], step: int) -> Iterator[tuple[Path_, Any, dict[str, Any]]]:
    """Documents that differ in one place: another value, or, said as "absent", none; and another name.

    With a step of 1 every place tells every lie, with another one of so many of them, in turns.
    """
    for number, place in enumerate(places(document)):
        for lie in (*LIES, "absent", "renamed")[number % step :: step]:
            forged = copying.deepcopy(document)
            *parents, last = place
            parent: Any = forged
            for name in parents:
                parent = parent[name]
            if lie == "absent":
                del parent[last]
            elif lie == "renamed" and isinstance(last, str):
                parent["../" + last] = parent.pop(last)
            else:
                parent[last] = lie
            yield place, lie, forged


def sealed(document: dict[str, Any]) -> bytes:
    return sealed_bytes(document)


def attempt(path: Path, place: Path_, lie: Any, *uses: Callable[[], object]) -> int:
    """Use a forged file; returns how often it was refused, each time by its own name."""
    refused = 0
    for use in uses:
        try:
            use()
        except DflashError as error:
            refused += 1
            assert path.name in str(error) or path.parent.name in str(error), (place, lie, str(error))
        except Exception as error:
            raise AssertionError(f"{path.name}: {'.'.join(map(str, place))} as {str(lie)[:40]!r}: {error!r}") from error
    return refused


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("documents") / "cache"
    create(cache, num_shards=1, shard_tokens=96, width=8)
    fill_cache(cache)
    return cache


def train_reads(cache: Path) -> None:
    """What training does before it loads torch's part."""
    opened = Cache.open(cache)
    opened.require_complete()
    opened.usable()
    opened.codes(0)


def inspects(cache: Path) -> None:
    opened = Cache(cache)
    print_overview(overview(opened))
    print_shard(shard_view(opened, 0))


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_every_forged_field_of_a_manifest_is_refused_or_does_no_harm(
    made: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    path = made / "manifest.json"
    before = {file: file.read_bytes() for file in (path, made / "commits/000000.json")}
    refused = tried = 0
    for place, lie, forged in forgeries(unsealed(path), step):
        path.write_bytes(sealed(forged))
        refused += attempt(path, place, lie, lambda: train_reads(made), lambda: inspects(made))
        attempt(path, place, lie, lambda: verify_cache(made, Silent()))
        tried += 1
        capsys.readouterr()
    for file, content in before.items():
        file.write_bytes(content)
    assert verify_cache(made, Silent()) == [] and refused > tried > 500 / step


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_every_forged_field_of_a_record_is_a_fault_or_does_no_harm(
    made: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    path = made / "commits/000000.json"
    before, tried, found = path.read_bytes(), 0, 0
    for place, lie, forged in forgeries(unsealed(path), step):
        path.write_bytes(sealed(forged))
        attempt(made, place, lie, lambda: train_reads(made), lambda: inspects(made))
        faults = verify_cache(made, Silent())
        found += bool(faults)
        tried += 1
        capsys.readouterr()
    path.write_bytes(before)
    assert verify_cache(made, Silent()) == [] and found > tried / 2 > 100 / step


def test_a_manifest_whose_shapes_are_forged_with_all_else_right_is_refused(made: Path, tmp_path: Path) -> None:
    """Records, checksums and metadata say the same: only the files themselves do not."""
    for number, (name, value) in enumerate(
        [("num_shards", 999_999), ("shard_tokens", 1 << 28), ("chunk_tokens", 1), ("hidden_size", 1 << 26)]
    ):
        copy = Path(shutil.copytree(made, tmp_path / str(number)))
        document = unsealed(copy / "manifest.json")
        document["layout"][name] = value
        if name == "hidden_size":
            document["decoder"][name] = value
        (copy / "manifest.json").write_bytes(sealed_bytes(document))
        record = unsealed(copy / "commits/000000.json")
        record["manifest"] = json.loads((copy / "manifest.json").read_text())["checksum"]
        (copy / "commits/000000.json").write_bytes(sealed_bytes(record))
        assert attempt(copy, (name,), value, lambda copy=copy: train_reads(copy)) == 1
        assert verify_cache(copy, Silent())


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["run.json", "state.json", "eval.json", "metrics.jsonl", "config.json"])
def test_every_forged_field_of_a_run_is_refused_or_does_no_harm(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, step: int
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    checkpoint = max((copy / "checkpoints").glob("step-*"))
    path = checkpoint / name if name in ("state.json", "config.json") else copy / name
    is_sealed, uses = name in ("run.json", "state.json"), [lambda: print_run(read_run(copy))]
    if name == "run.json":
        uses.append(lambda: RunRecord.read(copy))
    elif name == "state.json":
        uses.append(lambda: read_state(checkpoint))
    elif name == "config.json":
        uses = [lambda: DraftConfig.read(checkpoint), lambda: lint_draft(checkpoint)]
    elif name == "eval.json":
        group = {"pooled": 3.5, "mean": 3.5, "prompts": 2}
        path.write_text(json.dumps({
            **{"acceptance": group, "acceptance_by_kind": {"short": group}, "config": {"temperature": 0.0}},
            **{"trained": {"run": "0" * 64, "step": 4}, "dtype": "float32", "device": "cpu", "block_size": 8},
            **{"drafted_by_slot": [2], "accepted_by_slot": [1], "offline": False, "speedup": 1.5},
            **{"proposals": [{"name": "drawn", "acceptance": group}], "prompt_set": {"name": "a", "dataset": "b"}},
            **{"service": {"num_speculative_tokens": 1, "passes": [{"concurrency": 1, "round_s": 0.1}]}},
            **{"draft_lengths": {"expected": [{"concurrency": 1, "num_speculative_tokens": 1, "speedup": [1.5]}]}},
        }))  # fmt: skip
        uses.append(lambda: read_result(path, "Name another."))
    content = path.read_text()
    document = unsealed(path) if is_sealed else json.loads(content.splitlines()[-1] if name[-1] == "l" else content)
    tried = 0
    for place, lie, forged in forgeries(document, step):
        written = sealed(forged) if is_sealed else json.dumps(forged).encode()
        path.write_bytes(written)
        attempt(copy, place, lie, *uses) if name != "metrics.jsonl" else attempt(path, place, lie, *uses)
        capsys.readouterr()
        tried += 1
    assert tried > 100 / step


def test_every_forged_field_of_a_kept_answer_is_refused_or_does_no_harm() -> None:
    row = {"row": 0, "content": "yes", "reasoning": "why", "fault": "", "detail": ""}
    for place, lie, forged in forgeries(row, 1):
        content = json.dumps(forged).encode()
        line = b"%08x %s\n" % (zlib.crc32(content), content)
        attempt(Path("answers"), place, lie, lambda line=line: _entry(line, Path("answers")))


def test_every_field_of_the_typed_documents_has_a_type_and_refuses_others() -> None:
    """From the dataclasses: a new field without a range is noticed here."""
    sound = {
        Layout: {"num_shards": 1, "shard_tokens": 8, "chunk_tokens": 8, "num_layers": 1, "hidden_size": 8},
        TrainState: {"step": 1},
        Commit: None,
        DraftConfig: None,
    }
    for kind, document in sound.items():
        for field in msgspec.inspect.type_info(kind).fields:
            assert not isinstance(field.type, msgspec.inspect.AnyType), f"{kind.__name__}.{field.name} has no type"
        if document:
            msgspec.convert(document, kind)
            for name in document:
                for lie in ("x", -1, 10**30, None, [1], 1.5):
                    with pytest.raises(msgspec.ValidationError):
                        msgspec.convert({**document, name: lie}, kind)


NOT_PLAIN = ["[" * 50_000, '{"a":' * 50_000, "[" * 33 + "]" * 33, '{"a":1,"a":1}', '"\\ud800"', "\xff", "", "{"]


@pytest.mark.parametrize("text", [*NOT_PLAIN, "NaN", "[Infinity]", "1e999", "9" * 5000])
def test_json_that_is_not_plain_is_refused_with_the_files_name(text: str) -> None:
    with pytest.raises(DflashError, match=r"forged\.json cannot be read as JSON"):
        parse_json(text.encode("latin-1"), Path("forged.json"))
    assert parse_json(b"[" * 32 + b"]" * 32, Path("forged.json"))


def test_names_of_files_lie_within_their_folder() -> None:
    for name in ("a", "a/b", "...", "a/.b", "é/x y"):
        assert msgspec.convert(name, PathWithin) == name
    for name in ("", ".", "..", "/a", "../a", "a/..", "a/../b", "./a", "a//b", "a/", "a\0b", "a\\b", "x" * 5000):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(name, PathWithin)
