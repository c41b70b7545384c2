"""On a terminal, every command shows what names, data and records hold, and no terminal obeys it."""

import io
import json
import os
import re
import sys
import threading
import traceback
from pathlib import Path

import pytest
from tiny_target import conversations

from dflash_offline.pipeline.app import main
from dflash_offline.pipeline.safe_output import SafeOutput, guard_output, obeyed, safe
from dflash_offline.pipeline.terminal import open_console

HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egnp\u2066\u200b"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\x0d\x9b31m\u202egnp\u2066\u200b"
OWN = re.compile(r"\x1b\[[0-9;]*m|\x1b\[[AK]|\r")
"""How rich colours and how a bar is drawn again."""
Patch = pytest.MonkeyPatch


def on_a_terminal(monkeypatch: Patch, *arguments: object) -> tuple[int, str]:
    """Return a command's exit code and all that it wrote to its terminal."""
    primary, terminal = os.openpty()
    written: list[bytes] = []

    def read() -> None:
        while True:
            try:
                if not (part := os.read(primary, 65536)):
                    return
            except OSError:  # all of the other side is closed
                return
            written.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    code = 0
    with monkeypatch.context() as patched:
        for name in ("stdout", "stderr"):
            patched.setattr(sys, name, io.TextIOWrapper(io.FileIO(os.dup(terminal), "w"), "utf-8", write_through=True))
        patched.setenv("TERM", "xterm")
        patched.setattr(sys, "argv", ["dflash", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            code = -1
        for name in ("stdout", "stderr"):
            getattr(sys, name).close()
    os.close(terminal)
    reader.join()
    os.close(primary)
    return code, b"".join(written).decode().replace("\r\n", "\n")


def obeys_nothing(shown: str) -> None:
    left = OWN.sub("", shown)
    assert safe(left) == left and "owned\x07" not in shown and "\x1b[2J" not in shown, repr(shown)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("x") / f"name{HOSTILE}"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def hostile_cache(place: Path, target: Path) -> Path:
    rows = conversations(20)
    for row in rows:
        row["messages"][1]["content"] += f" {HOSTILE} \ud7ff\u0301"  # type: ignore[index]
    data = place / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (target_there := place / "target").symlink_to(target)
    with pytest.MonkeyPatch.context() as patch:
        code, shown = on_a_terminal(
            patch, "extract", data, "--target", target_there, "--out", place / "cache", "--block-size", 8
        )
    assert code == 0 and SHOWN in shown.replace("\n  ", ""), shown
    obeys_nothing(shown)
    return place / "cache"


@pytest.mark.parametrize(
    "arguments",
    [[], ["--sample", 0], ["--shard", 0], ["--layers"], ["--top", "longest"]],
    ids=lambda value: " ".join(map(str, value)),
)
def test_a_cache_is_inspected_without_obeying_what_it_holds(
    arguments: list[object], hostile_cache: Path, monkeypatch: Patch
) -> None:
    code, shown = on_a_terminal(monkeypatch, "inspect", hostile_cache, *arguments)
    assert code == 0 and r"\x1b]0;" in OWN.sub("", shown), shown
    obeys_nothing(shown)


@pytest.mark.parametrize(
    "command",
    [
        "inspect X",
        "verify X",
        "export X --out Y",
        "train X --out Y",
        "extract X --target X --out Y",
        "regenerate X --target X --out Y",
        "eval X --cache X",
        "extract --config X",
        "inspect X --sample 0 --target X",
        "X",
        "extract --X",
        "train c --out Y --steps X",
        "export r --out Y --format X",
    ],
)
def test_no_message_of_any_command_is_obeyed(command: str, place: Path, monkeypatch: Patch) -> None:
    path = str(place / "nothing")
    arguments = [word.replace("X", path).replace("Y", str(place / "new")) for word in command.split(" ")]
    code, shown = on_a_terminal(monkeypatch, *arguments)
    assert code in (1, 2) and "Traceback" not in shown, shown
    obeys_nothing(shown)


def test_rows_that_are_refused_are_shown_as_text(target: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    data = tmp_path / f"a{HOSTILE}.jsonl"
    data.write_text(json.dumps({"messages": [{"role": HOSTILE, "content": 1}], HOSTILE: "\ud800"}) + "\n")
    code, shown = on_a_terminal(monkeypatch, "extract", data, "--target", target, "--out", tmp_path / "cache")
    assert code == 1 and r"\x1b]0;owned" in shown, shown
    obeys_nothing(shown)


@pytest.mark.slow
def test_a_draft_is_trained_exported_and_evaluated_without_obeying_anything(
    hostile_cache: Path, place: Path, target: Path, monkeypatch: Patch
) -> None:
    run, draft, prompts = place / "run", place / "draft", place / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a red dog", "kind": HOSTILE}) + "\n")
    evaluate = ["--prompts", prompts, "--max-new-tokens", 4]
    for arguments in (
        ["train", hostile_cache, "--out", run, "--steps", 3, "--draft-layers", 1, "--num-anchors", 4],
        ["inspect", run],
        ["export", run, "--out", draft],
        ["verify", draft],
        ["verify", hostile_cache, "--target", target, "--samples", 1],
        ["eval", draft, "--target", target, *evaluate],
    ):
        code, shown = on_a_terminal(monkeypatch, *arguments)
        assert code == 0 and r"\x1b]0;" in OWN.sub("", shown), shown
        obeys_nothing(shown)


def test_bugs_and_what_libraries_print_are_shown_as_text(monkeypatch: Patch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "ascii"))
    guard_output()
    guard_output()
    print(HOSTILE, "é\t.", "\udcff", file=sys.stderr)
    sys.stderr.writelines([HOSTILE])
    try:
        raise RuntimeError(HOSTILE)
    except RuntimeError:
        traceback.print_exc()
    sys.stderr.flush()
    assert isinstance(sys.stderr, SafeOutput)
    said = sys.stderr.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert said.startswith(f"{SHOWN} \\xe9\t. \\udcff\n{SHOWN}Traceback") and said.endswith(f"RuntimeError: {SHOWN}\n")
    obeyed(sys.stderr).write("\x1b[A")
    sys.stderr.flush()
    assert sys.stderr.buffer.getvalue().endswith(b"\x1b[A")  # type: ignore[attr-defined]


def test_a_console_colours_and_shows_what_it_is_given(monkeypatch: Patch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "utf-8"))
    guard_output()
    open_console().print(HOSTILE, soft_wrap=True)
    sys.stdout.flush()
    shown = sys.stdout.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert shown.startswith(r"\x1b]0;owned") and r"\x9b31m\u202egnp" in shown  # rich drops some controls itself
    assert safe(shown) == shown


def test_ordinary_text_is_not_changed() -> None:
    text = "a\tb\n日本語\u3000é🙂 ±½ العربية עברית \xa0—"
    assert safe(text) == text
