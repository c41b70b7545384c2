"""Every kind of damage is found, named, and redone alone."""

import errno
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_writer import create, features, fill_cache
from processes import FORKING
from typer.testing import CliRunner

from dflash_offline.pipeline.app import app
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.manifest import MANIFEST
from dflash_offline.schemas.sealed import read_sealed, sealed_bytes
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.leftovers import SKIPPED_LOCK
from dflash_offline.stages.store.verify import repair, verify_cache
from dflash_offline.stages.store.writer import ShardWriter

HIDDEN = "features.zarr/hidden_states/c/{}/0/0"


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copy"))


def test_a_sound_cache_has_no_fault(cache: Path) -> None:
    assert verify_cache(cache, Silent()) == []


def test_every_flipped_byte_of_every_file_is_found(copy: Path) -> None:
    chance = random.Random(0)
    for path in sorted(path for path in copy.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for position in chance.sample(range(len(content)), 1):
            broken = bytearray(content)
            broken[position] ^= 1 << chance.randrange(8)
            path.write_bytes(broken)
            assert verify_cache(copy, Silent()), f"{path}, byte {position} of {len(content)}"
        path.write_bytes(content)
    assert verify_cache(copy, Silent()) == []


def test_a_reader_never_decodes_a_flipped_byte_silently(copy: Path) -> None:
    chance, path = random.Random(1), copy / HIDDEN.format(0)
    content = path.read_bytes()
    members = Cache.open(copy).samples.samples_of_shard(0).tolist()
    sound = [Cache.open(copy).codes(sample) for sample in members]
    for position in chance.sample(range(len(content)), 30):
        broken = bytearray(content)
        broken[position] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        refused = 0
        reader = Cache.open(copy)
        for sample, before in zip(members, sound, strict=True):
            try:
                np.testing.assert_array_equal(reader.codes(sample), before)
            except CacheError:
                refused += 1
        assert refused or _in_padding(reader, position)


def _in_padding(reader: Cache, position: int) -> bool:
    """Say whether a byte lies in a chunk that no sample uses."""
    layout = reader.manifest.layout
    shard = reader._shard(0)
    chunk = int(np.searchsorted(shard._index[:, 0], position, "right")) - 1
    slot = chunk // layout.num_layers * layout.chunk_tokens
    members = reader.samples.samples_of_shard(0)
    last = members[-1]
    return bool(slot >= reader.samples.start[last] + reader.samples.num_tokens[last])


def _swap(copy: Path) -> None:
    a, b = (copy / HIDDEN.format(shard) for shard in (0, 1))
    a.rename(copy / "x")
    b.rename(a)
    (copy / "x").rename(b)


def _truncate(copy: Path) -> None:
    path = copy / HIDDEN.format(1)
    path.write_bytes(path.read_bytes()[:-1])


def _drop_record(copy: Path) -> None:
    (copy / "commits/000001.json").unlink()


def _drop_file(copy: Path) -> None:
    (copy / "features.zarr/loss_mask/c/1").unlink()


def _lie_about_statistics(copy: Path) -> None:
    path = copy / "commits/000001.json"
    record = json.loads(path.read_text())
    del record["checksum"]
    record["layers"][0]["mean"] += 0.5
    path.write_bytes(sealed_bytes(record))


@pytest.mark.parametrize("harm", [_swap, _truncate, _drop_record, _drop_file, _lie_about_statistics])
def test_repair_and_extract_redo_just_the_faulty_shards(
    cache: Path, copy: Path, extract_config: dict[str, object], harm: Callable[[Path], None]
) -> None:
    harm(copy)
    faults = verify_cache(copy, Silent())
    shards = [0, 1] if harm is _swap else [1]
    assert repair(copy, faults) == (
        [] if harm is _drop_record else shards
    )  # without a record nothing is to be forgotten
    assert extract(ExtractConfig(**extract_config, out=copy), Silent()).shards_written == len(shards)
    assert verify_cache(copy, Silent()) == []
    assert (copy / HIDDEN.format(1)).read_bytes() == (cache / HIDDEN.format(1)).read_bytes()


def test_a_damaged_chunk_is_named_with_shard_and_sample(copy: Path) -> None:
    path = copy / HIDDEN.format(1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (fault,) = verify_cache(copy, Silent())
    assert fault.shard == 1 and fault.place == HIDDEN.format(1)
    assert "Sample " in fault.what and "chats.jsonl:" in fault.what and "layer" in fault.what


def test_the_command_exits_1_with_a_line_a_fault_and_0_when_sound(copy: Path) -> None:
    sound = CliRunner().invoke(app, ["verify", str(copy)])
    assert sound.exit_code == 0 and "is sound" in sound.stdout
    _drop_file(copy)
    broken = CliRunner().invoke(app, ["verify", str(copy), "--json"])
    assert broken.exit_code == 1
    (fault,) = json.loads(broken.stdout)["faults"]
    place = {"place": "features.zarr/loss_mask/c/1", "array": "hidden_states", "shard": 1}
    assert fault == {**place, "what": "is missing", "missing": False}


def test_repair_comes_before_the_target_is_run(copy: Path, target: Path) -> None:
    _drop_file(copy)
    result = CliRunner().invoke(app, ["verify", str(copy), "--target", str(target), "--repair"])
    assert result.exit_code == 1 and "Forgot shards 1" in result.stdout
    assert not (copy / "commits/000001.json").exists()


def test_a_sealed_document_of_another_kind_is_a_fault_and_no_crash(copy: Path) -> None:
    shutil.copy(copy / "manifest.json", copy / "commits/000001.json")
    (fault,) = verify_cache(copy, Silent())
    assert fault.shard == 1 and "is not what this version reads" in fault.what


def test_a_cache_copied_without_its_empty_folders_goes_on(copy: Path, extract_config: dict[str, object]) -> None:
    shutil.rmtree(copy / "tmp")
    config = ExtractConfig(**extract_config, out=copy)
    assert extract(config, Silent()).shards_written == 0
    (copy / "commits/000001.json").unlink()
    assert extract(config, Silent()).shards_written == 1


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A complete cache of two shards of made-up features."""
    create(tmp_path / "made", num_shards=2, shard_tokens=128)
    fill_cache(tmp_path / "made")
    return tmp_path / "made"


def said(*arguments: object) -> tuple[int, str]:
    """Return exit code and output of `dflash verify`."""
    result = CliRunner().invoke(app, ["verify", *map(str, arguments), "--quiet"])
    return result.exit_code, result.stdout


def _redo_shard_1(cache: Path, at_it: Any, go_on: Any) -> None:
    """What a worker does: hold the shard, write it, record it."""
    opened = Cache(cache)
    writer = ShardWriter(opened)
    with writer.claim(1, wait=True) as ours:
        assert ours
        at_it.set()
        assert go_on.wait(60)
        time.sleep(0.1)
        writer.commit(1, features(opened.manifest, opened.samples, 1, opened.codec.fill))


@pytest.mark.parametrize("harm", [_truncate, _drop_record])
def test_what_a_live_worker_finishes_is_not_forgotten(made: Path, harm: Callable[[Path], None]) -> None:
    harm(made)
    at_it, go_on = FORKING.Event(), FORKING.Event()
    worker = FORKING.Process(target=_redo_shard_1, args=(made, at_it, go_on))
    worker.start()
    assert at_it.wait(60)
    faults = verify_cache(made, Silent())
    assert {fault.shard for fault in faults} == {1}
    if harm is _drop_record:
        assert repair(made, faults) == []  # at once: nothing of the shard is to be forgotten
    go_on.set()
    assert repair(made, faults) == []
    worker.join(60)
    assert worker.exitcode == 0 and verify_cache(made, Silent()) == []


def test_repair_says_what_it_forgot_and_what_was_done_meanwhile(made: Path) -> None:
    _truncate(made)
    faults = verify_cache(made, Silent())
    fill_cache(made)
    assert repair(made, faults) == []
    _drop_record(made)
    code, text = said(made, "--repair")
    assert code == 1 and "Forgot" not in text and "--repair" not in text and "Next: the `dflash extract` that" in text


def test_a_damaged_static_file_hides_neither_the_others_nor_a_bad_shard(made: Path) -> None:
    for name in ("rejects.parquet", "target/config.json"):
        (made / name).write_bytes((made / name).read_bytes()[:-1])
    _truncate(made)
    code, text = said(made, "--repair")
    assert "no record yet" not in text  # of the shard that was just forgotten
    assert code == 1 and "Forgot shards 1." in text and "Next: mend" in text and "then: the `dflash extract`" in text
    for name in ("rejects.parquet", "target/config.json"):
        assert re.search(rf"^{name}: has .* bytes, .*; restore it from a copy of this cache; without", text, re.M)
    assert [fault.missing for fault in verify_cache(made, Silent()) if fault.shard == 1] == [True]


@pytest.mark.parametrize("name", ["samples.parquet", "features.zarr/input_ids/zarr.json"])
def test_without_the_plan_and_the_metadata_no_shard_is_judged(made: Path, name: str) -> None:
    (made / name).unlink()
    _truncate(made)
    (fault,) = verify_cache(made, Silent())
    assert fault.place == name and "Until then no shard can be judged" in fault.what
    assert repair(made, [fault]) == []


def test_files_that_a_reader_may_take_for_the_caches_are_faults(made: Path) -> None:
    misleading = [
        "target/chat_template.jinja",
        "commits/000002.json",
        "commits/1.json",
        "features.zarr/hidden_states/c/2/0/0",
        "features.zarr/hidden_states/c/0/1/0",
        "features.zarr/input_ids/c/01",
        "features.zarr/more/zarr.json",
        "features.zarr/.zattrs",
    ]
    for name in misleading:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text("{}")
    faults = verify_cache(made, Silent())
    assert {fault.place for fault in faults} == {*misleading} and all("move it" in fault.what for fault in faults)
    code, text = said(made)
    assert code == 1 and "8 faults.\nNext: mend" in text and "--repair" not in text


def test_files_that_no_reader_opens_are_told_and_no_faults(made: Path) -> None:
    (made / "report.html").write_text("<p>")
    (made / "run").mkdir()
    for name in ("commits/.nfs00001", "target/._config.json", "target/config.json~", "target/Thumbs.db"):
        (made / name).write_text("")
    (made / SKIPPED_LOCK).touch()
    code, text = said(made)
    assert code == 0 and "lie commits/.nfs00001, report.html, run, target/._config.json, target/Thumbs.db, ..." in text
    assert "skipped" not in str(json.loads(said(made, "--json")[1])["other_files"])
    (made / "commits/000001.json").unlink()
    code, text = said(made)
    assert code == 1 and "1 shard has files but no record yet, 1 first" in text
    assert json.loads(said(made, "--json")[1])["unrecorded_shards"] == [1]


@pytest.mark.parametrize("options", [[], ["--json"], ["--repair"]])
def test_a_folder_that_is_neither_cache_nor_draft_is_refused(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name, found in (("typo", "there is no such folder"), ("empty", "it has no manifest.json")):
        result = CliRunner().invoke(app, ["verify", str(tmp_path / name), *options])
        assert result.exit_code == 1 and not result.stdout
        assert f"{tmp_path / name} is not a feature cache, nor a draft: {found}. Name" in result.stderr


def test_a_slot_of_no_sample_that_holds_a_feature_is_found(tmp_path: Path) -> None:
    manifest = create(tmp_path / "made", num_shards=1, shard_tokens=160)
    cache = Cache(tmp_path / "made", manifest)
    samples = cache.samples
    codes = features(manifest, samples, 0, cache.codec.fill)
    within, behind = int(samples.num_tokens[0]), 159
    assert within % 32 and samples.start[-1] + samples.num_tokens[-1] <= 128, "one beside a sample, one without"
    codes[within, 1, 7] = codes[behind] = 0
    ShardWriter(cache).commit(0, codes)
    (fault,) = verify_cache(tmp_path / "made", Silent())
    assert fault.shard == 0 and "something else than fill in 2 slots" in fault.what


def test_counts_of_the_plan_that_do_not_hold_are_found(tmp_path: Path) -> None:
    create(tmp_path / "made", num_shards=1)
    document = read_sealed(tmp_path / "made" / MANIFEST)
    del document["checksum"]
    document["plan"]["block_size"] += 1
    document["plan"]["tokens"] += 1
    (tmp_path / "made" / MANIFEST).write_bytes(sealed_bytes(document))
    fill_cache(tmp_path / "made")
    anchors, tokens = verify_cache(tmp_path / "made", Silent())
    assert "have another number of anchors for blocks of 9 than" in anchors.what
    assert f"tokens, the manifest says {document['plan']['tokens']}" in tokens.what


def failing_at(broken: Path, number: int) -> Any:
    """Return a `Path.open` that gives one file's name this fault."""
    right = Path.open

    def opened(path: Path, *arguments: Any, **named: Any) -> Any:
        if path == broken:
            raise OSError(number, os.strerror(number), str(path))
        return right(path, *arguments, **named)

    return opened


@pytest.mark.parametrize(("name", "shard"), [(HIDDEN.format(1), 1), ("rejects.parquet", None)])
def test_a_file_that_cannot_be_read_is_a_fault_among_the_others(
    made: Path, monkeypatch: pytest.MonkeyPatch, name: str, shard: int | None
) -> None:
    (made / "features.zarr/loss_mask/c/0").unlink()
    monkeypatch.setattr(Path, "open", failing_at(made / name, errno.EIO))
    found = {(fault.place, fault.shard): fault.what for fault in verify_cache(made, Silent())}
    assert found.keys() == {("features.zarr/loss_mask/c/0", 0), (name, shard)}
    assert "cannot be read: Input/output error" in found[name, shard]
    code, text = said(made, "--repair")
    assert code == 1 and f"Forgot shards 0{'' if shard is None else ', 1'}." in text


@pytest.mark.parametrize("name", [HIDDEN.format(1), "commits/000001.json", "rejects.parquet"])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES])
def test_what_is_not_a_files_own_fault_forgets_no_shard(
    made: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    monkeypatch.setattr(Path, "open", failing_at(made / name, number))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        verify_cache(made, Silent())
    assert caught.value.filename == str(made / name)
    code, _ = said(made, "--repair")
    monkeypatch.undo()
    assert code == 1 and verify_cache(made, Silent()) == []
