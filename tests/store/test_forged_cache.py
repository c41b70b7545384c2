"""Caches of a stranger, every checksum in them right: what they claim is refused by name before it is obeyed.

What their documents may say is in tests/schemas/test_forged_documents.py.
"""

import json
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
import zstandard
from cache_files import sealed_anew, with_chunks
from crc32c import crc32c
from feature_writer import create, fill_cache

from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.manifest import FEATURES, FeatureLayout, Manifest
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.array_metadata import check_metadata, metadata_documents
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.verify import verify_cache

SHARD_TOKENS, WIDTH, CHUNKS = 128, 64, 12
HIDDEN, IDS, MASK = (f"features.zarr/{name}" for name in ("hidden_states/c/0/0/0", "input_ids/c/0", "loss_mask/c/0"))
LAYER_IDS = (1, 2, 4)


@pytest.fixture(scope="module", params=["lossless", "scaled"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("forged") / "cache"
    features = FeatureLayout(kind="scaled", step=1 / 8) if request.param == "scaled" else None
    create(cache, num_shards=2, shard_tokens=SHARD_TOKENS, width=WIDTH, features=features)
    fill_cache(cache)
    return cache


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def read_all(cache: Path) -> None:
    """What training does."""
    reader = Cache.open(cache)
    reader.require_complete()
    for sample in range(len(reader.samples)):
        reader.values(sample)


def refused(cache: Path, *said: str, by_reader: bool = True) -> None:
    """Both verify and, if it reads what was changed, training name what is wrong."""
    texts = [f"{fault.place}: {fault.what}" for fault in verify_cache(cache, Silent())]
    if by_reader:
        with pytest.raises(CacheError) as caught:
            read_all(cache)
        texts.append(str(caught.value))
    assert texts
    for text in texts:
        assert all(word in text for word in said), text


LIES = (None, "pickle", 1 << 62, [], {"name": "pickle", "configuration": {}})


def lies(value: Any) -> Iterator[Any]:
    """Every value that differs from a JSON value in one place."""
    yield from (lie for lie in LIES if json.dumps(lie) != json.dumps(value))
    if isinstance(value, dict):
        yield value | {"unknown": 1}
        for name in value:
            yield {other: known for other, known in value.items() if other != name}
            yield from (value | {name: lie} for lie in lies(value[name]))
    elif isinstance(value, list):
        if value:
            yield [*value, value[0]]
        for place in range(len(value)):
            yield from ([*value[:place], lie, *value[place + 1 :]] for lie in lies(value[place]))


@pytest.mark.parametrize("sound", ["scaled"], indirect=True)
def test_metadata_that_say_anything_else_than_what_is_written_are_refused(copy: Path) -> None:
    layout = Manifest.read(copy).layout
    tried = 0
    for name, document in metadata_documents(layout, LAYER_IDS).items():
        path = copy / "features.zarr" / name / "zarr.json"
        before = path.read_bytes()
        assert json.loads(before) == document
        for lie in lies(document):
            path.write_text(json.dumps(lie))
            with pytest.raises(CacheError, match=r"zarr\.json"):
                check_metadata(copy / FEATURES, layout, LAYER_IDS)
                pytest.fail(f"{name}: {lie}")
            tried += 1
        path.write_bytes(before)
    check_metadata(copy / FEATURES, layout, LAYER_IDS)
    assert tried > 500


@pytest.mark.parametrize("text", ["[" * 100_000, '{"shape": NaN}', "", "nul", '{"a": 1, "a": 1}', "\ud800", "7"])
def test_metadata_that_are_no_plain_json_object_are_refused(copy: Path, text: str) -> None:
    path = copy / "features.zarr/input_ids/zarr.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    sealed_anew(copy)
    refused(copy, "input_ids/zarr.json")


class Executed:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], Any], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("beside", [True, False])
def test_metadata_of_zarrs_second_version_are_never_obeyed(copy: Path, tmp_path: Path, beside: bool) -> None:
    """A filter that unpickles, beside the metadata of the third version or in their place."""
    group, ran = copy / "features.zarr", tmp_path / "ran"
    array = {"zarr_format": 2, "shape": [256], "chunks": [256], "dtype": "|O", "compressor": None, "fill_value": 0}
    forged = {".zgroup": {"zarr_format": 2}}
    for name in ("input_ids", "loss_mask", "feature_center"):
        (group / name).mkdir(exist_ok=True)
        (group / name / "0").write_bytes(pickle.dumps(Executed(ran)))
        forged[f"{name}/.zarray"] = {**array, "order": "C", "filters": [{"id": "pickle"}]}
    for place, document in forged.items():
        path = group / place
        (path if beside else path.with_name("zarr.json")).write_text(json.dumps(document))
    if beside:
        faults = {fault.place for fault in verify_cache(copy, Silent())}
        assert {f"features.zarr/{place}" for place in forged} <= faults
        read_all(copy)
    else:
        sealed_anew(copy)
        assert any("zarr.json: " in fault.what for fault in verify_cache(copy, Silent()))
        with pytest.raises(CacheError, match=r"zarr\.json: "):
            read_all(copy)
    assert not ran.exists()


def test_zarr_python_writes_the_same_metadata_and_reads_the_scales(sound: Path, tmp_path: Path) -> None:
    """The documents say what zarr-python would write, so that what it wrote before is read as well."""
    opened = zarr.open_group(str(sound / "features.zarr"), mode="r")
    cache = Cache.open(sound)
    for name, document in metadata_documents(cache.layout, LAYER_IDS).items():
        node = opened[name] if name else opened
        said = {key: value for key, value in node.metadata.to_dict().items() if key != "consolidated_metadata"}
        assert json.loads(json.dumps(said, default=str))["attributes"] == document["attributes"]
    if cache.codec.center is None:
        return
    for name, scale in (("feature_center", cache.codec.center), ("feature_step", cache.codec.step)):
        np.testing.assert_array_equal(opened[name][:], scale)
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
    other = zarr.create_group(str(tmp_path / "cut"), zarr_format=3)
    other.create_array(
        "feature_step", data=opened["feature_step"][:], chunks=(2, 40), dimension_names=["layer", "feature"]
    )
    changed = shutil.copytree(sound, tmp_path / "changed")
    shutil.rmtree(changed / "features.zarr/feature_step")
    shutil.copytree(tmp_path / "cut/feature_step", changed / "features.zarr/feature_step")
    check_metadata(changed / FEATURES, cache.layout, LAYER_IDS)
    np.testing.assert_array_equal(Cache(changed).codec.step, cache.codec.step)


def bomb(num_bytes: int) -> bytes:
    """A zstd frame of some hundred bytes that says and holds so many zeros."""
    return zstandard.ZstdCompressor(level=1).compress(bytes(num_bytes))


def split_frame(item_size: int, num_bytes: int, streams: list[bytes]) -> bytes:
    """A Blosc frame of one block of split planes."""
    body = b"".join(len(stream).to_bytes(4, "little") + stream for stream in streams)
    return struct.pack("<4B4I", 2, 1, 1 | 4 << 5, item_size, num_bytes, num_bytes, 20 + len(body), 20) + body


def set_first(frame: bytes) -> Callable[[list[bytes]], None]:
    def change(frames: list[bytes]) -> None:
        frames[0] = frame

    return change


@pytest.mark.parametrize("length", [1, 4096, 64 << 20])
def test_a_chunk_that_becomes_more_or_less_than_its_chunk_is_refused(copy: Path, length: int) -> None:
    for name, num_chunks, size, held in ((HIDDEN, CHUNKS, 2, 4096), (IDS, 1, 4, 512), (MASK, 1, 1, 128)):
        before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        frame = split_frame(size, held, [bomb(length)] * size)
        path = copy / name
        path.write_bytes(with_chunks(path.read_bytes(), num_chunks, set_first(frame)))
        sealed_anew(copy)
        if not (length == 4096 and name == HIDDEN):
            refused(copy, name, by_reader=name == HIDDEN)
        for path, content in before.items():
            path.write_bytes(content)


@pytest.mark.parametrize("place", [(0, 1 << 63), (1 << 40, 100), (0, 3), (0, 0), ((1 << 64) - 1, 2), (5, 1 << 31)])
def test_an_index_that_points_outside_is_refused(copy: Path, place: tuple[int, int]) -> None:
    for name, num_chunks in ((HIDDEN, CHUNKS), (IDS, 1)):
        path = copy / name
        content = path.read_bytes()
        index = bytearray(content[-4 - 16 * num_chunks : -4])
        index[-16:] = struct.pack("<2Q", *place)
        path.write_bytes(content[: -4 - len(index)] + index + crc32c(bytes(index)).to_bytes(4, "little"))
        with suppress(struct.error):  # of the one chunk of the ids no checksum can be told
            sealed_anew(copy)
        refused(copy, name if name == HIDDEN else "", by_reader=name == HIDDEN)
        path.write_bytes(content)
        sealed_anew(copy)


@pytest.mark.parametrize("count", [600, pytest.param(60_000, marks=pytest.mark.slow)])
def test_forged_frames_neither_crash_the_decoder_nor_take_memory_nor_leave_anything_unwritten(count: int) -> None:
    program = Path(__file__).with_name("forged_chunks.py")
    ended = subprocess.run([sys.executable, program, str(count), str(count)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    tried = [int(word) for word in ended.stdout.split()]
    assert tried[1] == count and tried[0] > count / 2


def test_reading_forged_chunks_takes_no_memory_to_speak_of(copy: Path) -> None:
    """Measured from outside: frames of a few KiB that say they hold 2 GiB."""
    claim = bytearray(bomb(1 << 20))
    assert claim[4] >> 6 == 2, "the size that it claims is the four bytes from the sixth"
    struct.pack_into("<I", claim, 5, (1 << 31) - 1)
    path = copy / HIDDEN
    path.write_bytes(with_chunks(path.read_bytes(), CHUNKS, set_first(split_frame(2, 4096, [bytes(claim)] * 2))))
    sealed_anew(copy)
    code = (
        "import sys; from pathlib import Path\n"
        "from dflash_offline.stages.store.verify import verify_cache\n"
        "from dflash_offline.stages.progress import Silent\n"
        "print([fault.what for fault in verify_cache(Path(sys.argv[1]), Silent())])\n"
        "print(Path('/proc/self/status').read_text())"  # the system's count, which getrusage mixes with the parent's
    )
    ended = subprocess.run([sys.executable, "-c", code, copy], capture_output=True, text=True)
    assert ended.returncode == 0 and "zstd frame" in ended.stdout, ended.stderr
    assert int(ended.stdout.split("VmHWM:")[1].split()[0]) < 1 << 20  # KiB
