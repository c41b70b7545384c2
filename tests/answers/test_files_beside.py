"""What lies beside the new file, or where it is made, and is not of `dflash regenerate` stays as it is."""

from collections.abc import Callable
from pathlib import Path

import pytest
from chat_server import ChatServer
from test_server import chats, expected, run, save

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.sealed import sealed_bytes
from dflash_offline.stages import regenerate as stage

FOREIGN: dict[str, Callable[[Path, Path], object]] = {
    "text": lambda path, _: path.write_text("my notes\n"),
    "rows of another kind": lambda path, _: path.write_text('{"source": "a", "row": 1}\n'),
    "a sealed document of another kind": lambda path, _: path.write_bytes(sealed_bytes({"format": "dflash-cache"})),
    "nothing": lambda path, _: path.touch(),
    "a folder": lambda path, _: path.mkdir(),
    "a link": lambda path, elsewhere: path.symlink_to(elsewhere),
    "a dangling link": lambda path, elsewhere: path.symlink_to(elsewhere.with_name("gone")),
}


@pytest.mark.parametrize("what", ["rejects", "provenance"])
@pytest.mark.parametrize("how", FOREIGN)
def test_what_was_not_made_here_is_named_before_anything_is_asked(tmp_path: Path, what: str, how: str) -> None:
    data, out = save(tmp_path / "chats.jsonl", chats(3)), tmp_path / "new.jsonl"
    elsewhere, path = tmp_path / "elsewhere", Path(f"{out}.{what}")
    elsewhere.write_text("do not touch\n")
    FOREIGN[how](path, elsewhere)
    before = path.lstat()
    with ChatServer() as server, pytest.raises(DflashError, match=f"{path} would be replaced"):
        run(data, out, server)
    assert not server.requests and not out.exists() and elsewhere.read_text() == "do not touch\n"
    after = path.lstat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)


def test_what_came_while_answers_were_made_is_named_and_the_answers_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = save(tmp_path / "chats.jsonl", chats(3)), tmp_path / "new.jsonl"
    write = stage.write_synced
    for place in (Path(f"{out}.rejects"), out):

        def put_then_write(path: Path, content: object, place: Path = place) -> str:
            place.write_text("mine\n")
            return write(path, content)  # type: ignore[arg-type]

        monkeypatch.setattr(stage, "write_synced", put_then_write)
        with ChatServer() as server, pytest.raises(DflashError, match=f"{place} (would be replaced|was made by)"):
            run(data, out, server)
        assert place.read_text() == "mine\n"
        place.unlink()
    monkeypatch.setattr(stage, "write_synced", write)
    with ChatServer() as server:
        run(data, out, server)
        assert not server.requests
    assert out.read_text() == expected(chats(3))


def test_files_of_an_earlier_call_are_replaced(tmp_path: Path) -> None:
    rows = chats(3)
    data, out = save(tmp_path / "chats.jsonl", [*rows, {"messages": []}]), tmp_path / "new.jsonl"
    with ChatServer() as server:
        run(data, out, server, skip_bad_rows=True)
    assert len(Path(f"{out}.rejects").read_text().splitlines()) == 1
    out.unlink()
    save(data, rows)
    with ChatServer() as server:
        run(data, out, server)
    assert out.read_text() == expected(rows) and not Path(f"{out}.rejects").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "new.jsonl", "new.jsonl.provenance"]


def test_answers_are_not_kept_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = save(tmp_path / "chats.jsonl", chats(3)), tmp_path / "new.jsonl"
    folder, elsewhere = Path(f"{out}.partial"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    with ChatServer() as server, pytest.raises(DflashError, match=f"{folder} is a link to {elsewhere}"):
        run(data, out, server)
    assert not [*elsewhere.iterdir()]
    folder.unlink()

    def stop(*_written: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, ChatServer() as server, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "write_synced", stop)
        run(data, out, server)
    answers = (folder / "answers").read_bytes() + b"half a line"
    (elsewhere / "answers").write_bytes(answers)
    (folder / "answers").unlink()
    (folder / "answers").symlink_to(elsewhere / "answers")
    with ChatServer() as server, pytest.raises(DflashError, match="answers is a link to"):
        run(data, out, server)
    assert (elsewhere / "answers").read_bytes() == answers


def test_what_somebody_put_beside_the_answers_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = save(tmp_path / "chats.jsonl", chats(3)), tmp_path / "new.jsonl"
    notes = Path(f"{out}.partial/notes")
    write = stage.write_synced
    monkeypatch.setattr(stage, "write_synced", lambda path, rows: (notes.write_text("mine"), write(path, rows))[1])
    with ChatServer() as server:
        run(data, out, server)
        assert run(data, out, server).num_answers_now == 0
    assert notes.read_text() == "mine" and out.read_text() == expected(chats(3))
