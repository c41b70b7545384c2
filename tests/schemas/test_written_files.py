"""What is written is new, readable as the umask says, and only in its own folder; what is another's stays."""

import json
import os
import resource
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cache_files import content
from feature_writer import create, fill_cache
from running import dflash, refused
from safetensors.torch import load_file, save

from dflash_offline.schemas import locks
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.files import append, building_name, open_kept, publish, write_output, write_synced
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.draft.weights import save_weights
from dflash_offline.stages.export import export
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.leftovers import remove_locks
from dflash_offline.stages.train import train
from dflash_offline.stages.training.checkpoint import list_checkpoints

SETTINGS: dict[str, object] = {"draft_layers": 1, "num_anchors": 4, "device": "cpu", "save_every": 1, "ema": 0.5}

FINISHED: dict[str, object] = {"steps": 4, "draft_layers": 1, "num_anchors": 4, "device": "cpu"}
"""Settings of the finished run that all tests share."""


def trained(cache: Path, out: Path, steps: int, **settings: object) -> None:
    train(TrainConfig(**SETTINGS | settings, caches=(cache,), out=out, steps=steps), Silent())


class Told(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@contextmanager
def most_bytes(size: int) -> Iterator[None]:
    """Let no file of this process become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture()
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder outside of any output, with a file in it; both must stay as they are."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "precious").write_text("do not touch\n")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["precious"]
    assert (folder / "precious").read_text() == "do not touch\n"


@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_every_file_and_folder_has_the_rights_that_the_umask_leaves(
    extract_config: dict[str, object], cache: Path, tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        if umask == 0o027:
            extract(ExtractConfig(**extract_config | {"limit": 8}, out=tmp_path / "out/cache"), Silent())
        trained(tmp_path / "out/cache" if umask == 0o027 else cache, tmp_path / "out/run", 1, val_samples=1)
        for kind in ("zlab", "transformers"):
            export(tmp_path / "out/run", tmp_path / "out" / kind, kind=kind)
        assert dflash("inspect", tmp_path / "out/run", "--html", tmp_path / "out/page.html").exit_code == 0
    finally:
        os.umask(before)
    found = [*(tmp_path / "out").rglob("*")]
    assert len([path for path in found if path.name.endswith(".safetensors")]) == (6 if umask == 0o027 else 5)
    for path in found:
        everything = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == everything & ~umask, path


def test_weights_are_written_as_safetensors_writes_them_and_always_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(2, 2).to(torch.bfloat16),
        "ü.half": torch.randn(7).half(),
        "step": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "turned": torch.randn(4, 3).T,
    }
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for number, metadata in enumerate(({"format": "pt"}, None)):
        sha256 = save_weights(tmp_path / f"{number}", tensors, metadata)
        assert (tmp_path / f"{number}").read_bytes() == save(plain, metadata) and len(sha256) == 64
    many = {name: name for name in "zyxabc"}
    written = {save_weights(tmp_path / f"many-{number}", tensors, many) for number in range(5)}
    assert len(written) == 1
    loaded = load_file(tmp_path / "many-0")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_same_export_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(run, tmp_path / name)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert first == second and {"checksums.json", "model.safetensors"} < first.keys()


@pytest.mark.parametrize("name", [".run.json", ".config.toml", ".metrics.jsonl", "metrics.jsonl", ".lock"])
def test_no_file_of_a_run_is_written_through_a_link(
    cache: Path, run: Path, tmp_path: Path, elsewhere: Path, name: str
) -> None:
    out = Path(shutil.copytree(run, tmp_path / "run"))
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(elsewhere / "precious")
    settings = FINISHED | {"caches": (cache,), "out": out}
    if name in ("metrics.jsonl", ".lock"):
        with pytest.raises(DflashError, match=f"{name} is a link to {elsewhere}"):
            train(TrainConfig(**settings), Silent())
    else:
        train(TrainConfig(**settings), Silent())
    assert (out / name).is_symlink()


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_no_folder_of_a_run_is_written_through_a_link(
    cache: Path, run: Path, tmp_path: Path, elsewhere: Path, name: str
) -> None:
    out = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(out / name)
    (out / name).symlink_to(elsewhere)
    with pytest.raises(DflashError, match=f"{name} is a link to {elsewhere}"):
        train(TrainConfig(**FINISHED, caches=(cache,), out=out), Silent())


@pytest.mark.parametrize("name", ["commits", "tmp", "features.zarr/hidden_states/c", "features.zarr/input_ids/c"])
def test_no_shard_is_written_through_a_link(tmp_path: Path, elsewhere: Path, name: str) -> None:
    create(tmp_path / "cache", num_shards=2)
    folder = tmp_path / "cache" / name
    if folder.exists():
        shutil.move(folder, tmp_path / "moved")
    folder.symlink_to(elsewhere)
    with pytest.raises(DflashError, match=f"{folder} is a link to {elsewhere}"):
        fill_cache(tmp_path / "cache")


@pytest.mark.parametrize("name", ["tmp/000000.lock", "features.zarr/mask", "commits/000000.json"])
def test_a_link_in_a_files_place_is_refused_or_replaced_and_never_followed(
    tmp_path: Path, elsewhere: Path, name: str
) -> None:
    create(tmp_path / "cache", num_shards=1)
    path = tmp_path / "cache" / name
    path.symlink_to(elsewhere / ("precious" if "lock" in name else "new"))
    if "lock" in name:
        with pytest.raises(DflashError, match=f"{path} is a link"):
            fill_cache(tmp_path / "cache")
    else:
        fill_cache(tmp_path / "cache")


def plant_link(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere / "precious")


def plant_hard_link(path: Path, elsewhere: Path) -> None:
    path.hardlink_to(elsewhere / "precious")


def plant_dangling_link(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere / "new")


PLANT = (plant_link, plant_hard_link, plant_dangling_link)


@pytest.mark.parametrize("plant", PLANT)
def test_a_new_file_is_never_written_into_what_is_there(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[Path, Path], None]
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda _bytes: "known")
    plant(building_name(tmp_path / "found.json"), elsewhere)
    with pytest.raises(DflashError, match="nothing is written over it"):
        publish([b"new"], path=tmp_path / "found.json")
    plant(building_name(tmp_path / "page.html"), elsewhere)
    with pytest.raises(DflashError, match="nothing is written over it"):
        write_output(tmp_path / "page.html", b"new")
    assert not (tmp_path / "found.json").exists() and not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("plant", [*PLANT, lambda path, _: path.mkdir(), lambda path, _: os.mkfifo(path)])
def test_a_log_is_added_to_only_where_it_is_a_file_of_one_name(
    tmp_path: Path, elsewhere: Path, plant: Callable[[Path, Path], None]
) -> None:
    plant(tmp_path / "log", elsewhere)
    with pytest.raises(DflashError, match=r"log is (a link to|no plain file)"):
        open_kept(tmp_path / "log", "a")


def test_what_does_not_fit_leaves_nothing_of_it_and_is_named(tmp_path: Path) -> None:
    with open_kept(tmp_path / "log", "a") as log:
        append(log, b"whole line\n")
        with most_bytes(15), pytest.raises(OSError, match="File too large") as caught:
            append(log, b"another line\n")
        assert caught.value.filename == str(tmp_path / "log")
        append(log, b"next\n")
    assert (tmp_path / "log").read_bytes() == b"whole line\nnext\n"
    with most_bytes(15), pytest.raises(OSError, match="File too large") as caught:
        publish([b"x" * 100], path=tmp_path / "file")
    assert caught.value.filename == str(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize("size", [1_000, 20_000])
def test_a_run_that_meets_a_limit_says_where_and_goes_on_without_it(cache: Path, tmp_path: Path, size: int) -> None:
    arguments = ["train", cache, "--out", tmp_path / "run", "--steps", 2, "--draft-layers", 1, "--num-anchors", 4]
    arguments += ["--device", "cpu", "--save-every", 1, "--quiet"]
    with most_bytes(size):
        refused(dflash(*arguments), "File too large", f"{tmp_path / 'run'}", "go on from the last checkpoint")
    assert not list(tmp_path.rglob("*.building-*"))
    assert dflash(*arguments).exit_code == 0
    arguments[3] = tmp_path / "whole"
    assert dflash(*arguments).exit_code == 0
    last = "checkpoints/step-0000002/model.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


@pytest.mark.parametrize("size", [100, 2_000, 10_000])
def test_an_export_that_meets_a_limit_says_where_and_leaves_nothing(run: Path, tmp_path: Path, size: int) -> None:
    with most_bytes(size):
        refused(dflash("export", run, "--out", tmp_path / "draft"), f"{tmp_path / 'draft'}: File too large")
    assert not list(tmp_path.iterdir())


def test_what_somebody_keeps_beside_and_in_checkpoints_stays(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trained(cache, out, 4, keep=9)
    first, second, *_ = list_checkpoints(out)
    folder = first.parent
    shutil.copytree(first, folder / f"{first.name}-backup")
    for name in ("step-notes", ".step-mine", ".step-0000009.old", ".step-0000001.7"):
        (folder / name).mkdir()
        (folder / name / "notes").write_text("mine")
    (second / "notes").write_text("mine")
    (folder / "step-0000000").symlink_to(tmp_path / "nowhere")
    killed = folder / ".step-0000002.77"  # of an older version
    shutil.copytree(first, killed)
    (out / "config.toml").unlink()
    before = content(second)
    saved = TrainConfig(**SETTINGS | {"keep": 1}, caches=(cache,), out=out, steps=4)
    (folder / "step-0000004").rename(tmp_path / "last")  # so that a step is done again, and old ones are removed
    train(saved, Silent())
    left = {path.name for path in folder.iterdir()}
    theirs = {"step-0000001-backup", "step-notes", ".step-mine", ".step-0000009.old", ".step-0000001.7", "step-0000000"}
    best = json.loads((folder / "step-0000004/state.json").read_text())["best_step"]
    assert left == {*theirs, second.name, "step-0000004", *([f"step-{best:07d}"] if best else [])}
    assert content(second) == before


def test_what_is_in_a_checkpoints_place_is_named_and_stays(cache: Path, tmp_path: Path) -> None:
    trained(cache, tmp_path / "run", 2, keep=9)
    folder = tmp_path / "run/checkpoints"
    shutil.rmtree(folder / "step-0000002")
    (folder / "step-0000002").write_text("mine")
    with pytest.raises(DflashError, match=r"step-0000002 has the name of a checkpoint and no state.json"):
        trained(cache, tmp_path / "run", 2, keep=9)
    assert (folder / "step-0000002").read_text() == "mine"


def test_locks_that_are_not_ours_stay_in_a_complete_cache(tmp_path: Path) -> None:
    create(tmp_path / "cache", num_shards=1)
    for name in ("mine.lock", "12.lock", "000000.lock", "skipped.lock"):
        (tmp_path / "cache/tmp" / name).touch()
    remove_locks(tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache/tmp").iterdir()) == ["12.lock", "mine.lock"]


def test_what_is_named_like_something_being_built_goes_only_with_its_whole_name(
    tmp_path: Path, elsewhere: Path
) -> None:
    dead = f"{socket.gethostname()}-999999999-0123abcd"
    for name in (f".x.building-{dead}", ".x.building-notes"):
        (tmp_path / name).write_text("half")
    (tmp_path / f".x.building-{dead[:-1]}e").symlink_to(elsewhere)
    os.utime(tmp_path / ".x.building-notes", (0, 0))
    left = {path.name for path in locks.remove_unfinished(tmp_path / "x")}
    assert left == {f".x.building-{dead[:-1]}e", ".x.building-notes"}


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "not text": lambda log: log.replace(b'"loss"', b'"l\xffss"', 1),
    "no end": lambda log: log.replace(b"}\n", b"\n", 1),
    "zeros": lambda log: b"\0" * 20 + log[20:],
    "no step": lambda log: log.replace(b'"step": ', b'"stop": ', 1),
    "a step in words": lambda log: log.replace(b'"step": 4', b'"step": "4"', 1),
    "very deep": lambda log: b"[" * 100_000 + b"\n" + log,
    "cut": lambda log: log + log[:10],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_log_is_set_aside_and_its_sound_rows_are_kept(
    cache: Path, run: Path, tmp_path: Path, how: str
) -> None:
    path = Path(shutil.copytree(run, tmp_path / "run")) / "metrics.jsonl"
    config = TrainConfig(**FINISHED, caches=(cache,), out=path.parent)
    whole = path.read_bytes()
    damaged = DAMAGE[how](whole)
    path.write_bytes(damaged)
    train(config, told := Told())
    assert path.with_name("metrics.jsonl.damaged").read_bytes() == damaged
    kept = [line for line in damaged.splitlines(keepends=True) if line in whole.splitlines(keepends=True)]
    assert path.read_bytes() == b"".join(kept) and len(kept) >= len(whole.splitlines()) - 1
    assert [line for line in told.lines if "are damaged" in line and "metrics.jsonl.damaged" in line]
    train(config, told := Told())  # what is set aside is said once
    assert not [line for line in told.lines if "are damaged" in line]


def test_write_synced_refuses_a_file_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DflashError, match="is there already"):
        write_synced(tmp_path / "file", [b"new"])
    assert (tmp_path / "file").read_text() == "mine"
