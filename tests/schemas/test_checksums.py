"""A draft whose files are not as they were written is found, and read by nothing; one without checksums is read."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from running import dflash, refused
from safetensors.torch import load_file, save_file

from dflash_offline.schemas.draft.checksums import checksums_bytes
from dflash_offline.schemas.draft.formats import FORMATS
from dflash_offline.schemas.draft.lint import lint_draft
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.sealed import sealed_bytes
from dflash_offline.stages.draft.weights import load_draft
from dflash_offline.stages.export import export
from dflash_offline.stages.training.checkpoint import list_checkpoints

FILES = ("README.md", "checksums.json", "config.json", "model.safetensors")


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp("draft") / kind for kind in FORMATS}
    for kind, folder in folders.items():
        export(run, folder, kind=kind)
    return folders


@pytest.fixture()
def draft(exported: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported["zlab"], tmp_path / "draft"))


def damaged(content: bytes, by: random.Random) -> bytes:
    """Return a file with a flipped bit or another byte somewhere, or cut there."""
    at, how = by.randrange(len(content)), by.randrange(3)
    if how == 2:
        return content[:at]
    other = content[at] ^ 1 << by.randrange(8) if how else (content[at] + by.randrange(1, 256)) % 256
    return content[:at] + bytes([other]) + content[at + 1 :]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_flipped_or_cut_byte_of_a_draft_is_found(exported: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder, by = Path(shutil.copytree(exported[kind], tmp_path / "draft")), random.Random(kind)
    assert sorted(path.name for path in folder.iterdir()) == [*FILES] and lint_draft(folder) == []
    for name in FILES:
        whole = (folder / name).read_bytes()
        for _ in range(12):
            (folder / name).write_bytes(damaged(whole, by))
            rules = {fault.rule for fault in lint_draft(folder)}
            assert rules == {"card"} if name == "README.md" else "checksum" in rules
        (folder / name).write_bytes(whole)
    (folder / "model.safetensors").unlink()
    assert {"checksum", "weights"} <= {fault.rule for fault in lint_draft(folder)}


def change_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


def change_checksums(folder: Path) -> None:
    path = folder / "checksums.json"
    path.write_text(path.read_text().replace("a", "b", 1))


@pytest.mark.parametrize("change", [change_weights, change_config, change_checksums])
def test_no_command_reads_a_changed_draft(
    draft: Path, cache: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    change(draft)
    checked = dflash("verify", draft)
    assert checked.exit_code == 1 and "(checksum)" in checked.stdout
    refused(dflash("eval", draft, "--cache", cache), f"{draft} was damaged or changed", "remove")
    more = ("--out", tmp_path / "run", "--steps", 1, "--device", "cpu")
    refused(dflash("train", cache, "--init-from", draft, *more), f"{draft} was damaged or changed", "remove")
    (draft / "checksums.json").unlink()  # as the message says
    load_draft(draft)


def test_a_changed_card_is_said_and_is_no_fault(draft: Path) -> None:
    (draft / "README.md").write_text("---\nlicense: mit\n---\n")
    checked = dflash("verify", draft)
    assert checked.exit_code == 0 and "README.md has sha256" in checked.stdout and "no client" in checked.stdout
    load_draft(draft)


def test_a_draft_of_others_needs_no_checksums_and_an_older_export_gets_them(run: Path, draft: Path) -> None:
    (draft / "checksums.json").unlink()
    path = draft / "model.safetensors"
    assert lint_draft(draft) == []
    load_draft(draft)
    before = load_file(path)
    export(run, draft)
    assert (draft / "checksums.json").is_file() and lint_draft(draft) == []
    (draft / "checksums.json").unlink()
    save_file(before, path, metadata={"format": "pt"})  # as others publish them
    assert lint_draft(draft) == []


def test_a_changed_checkpoint_is_found_and_starts_no_run(cache: Path, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    checkpoint = list_checkpoints(copy)[-1]
    assert lint_draft(checkpoint) == [] or {f.rule for f in lint_draft(checkpoint)}.isdisjoint({"checksum"})
    change_weights(checkpoint)
    assert "checksum" in {fault.rule for fault in lint_draft(checkpoint)}
    more = ("--out", tmp_path / "next", "--steps", 1, "--device", "cpu")
    refused(dflash("train", cache, "--init-from", checkpoint, *more), "state.json says")


@pytest.mark.parametrize(
    "files", [{"../outside": "0" * 64}, {"/dev/zero": "0"}, ["config.json"], {"config.json": 3}, None]
)
def test_checksums_of_other_things_are_refused_and_not_followed(draft: Path, files: object) -> None:
    (draft / "checksums.json").write_bytes(sealed_bytes({"files": files}))
    assert [fault.what for fault in lint_draft(draft)] == ["does not map names of files beside it to their sha256"]
    with pytest.raises(DflashError, match="does not map names"):
        load_draft(draft)


def test_what_is_no_file_is_missing(draft: Path) -> None:
    (draft / "endless").symlink_to("/dev/zero")
    (draft / "checksums.json").write_bytes(checksums_bytes({"endless": "0" * 64}))
    assert [fault.what for fault in lint_draft(draft)] == [f"is missing; checksums.json says {'0' * 64}"]
