"""What the commands print of a whole pipeline, redirected: no bars, no colours, what was made and what to do next."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from running import dflash
from tiny_target import save_conversations
from typer.testing import Result

from dflash_offline.pipeline.app import app

COMMANDS = ["extract", "inspect", "verify", "train", "export", "eval"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name has to be quoted."""
    return tmp_path_factory.mktemp("my place")


@pytest.fixture(scope="module")
def pipeline(target: Path, place: Path) -> dict[str, list[object]]:
    """Return the arguments of every command."""
    data = save_conversations(place / "chats.jsonl", 30)
    cache, run, draft = (place / name for name in ("cache", "run", "draft"))
    return {
        "extract": [data, "--target", target, "--out", cache, "--block-size", 8, "--shard-mib", 1],
        "inspect": [cache],
        "verify": [cache, "--target", target, "--samples", 2],
        "train": [cache, "--out", run, "--steps", 3, "--draft-layers", 1, "--num-anchors", 4],
        "export": [run, "--out", draft],
        "eval": [draft, "--target", target, "--cache", cache, "--limit", 1, "--max-new-tokens", 4, "--threads", 1],
    }


@pytest.fixture(scope="module")
def printed(pipeline: dict[str, list[object]]) -> dict[str, Result]:
    """Return what each of the commands printed, in turn."""
    return {name: dflash(name, *arguments) for name, arguments in pipeline.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_redirected_output_holds_no_colour_and_no_bar(command: str, printed: dict[str, Result]) -> None:
    result = printed[command]
    assert result.exit_code == 0, result.output
    for text in (result.stdout, result.stderr):
        assert not set("\033\r") & set(text) and "it/s" not in text and not re.search(r"%\|", text)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "inspect"])
def test_a_finished_command_ends_with_what_it_made_and_what_comes_next(
    command: str, printed: dict[str, Result], place: Path
) -> None:
    lines = printed[command].stdout.splitlines()
    following = [line.removeprefix("Next: ") for line in lines if line.startswith("Next: ")]
    assert len(following) == 1 and any(str(place) in line for line in lines)
    arguments = shlex.split(following[0])
    if arguments[0] == "dflash":
        typer.main.get_command(app).commands[arguments[1]].make_context(arguments[1], arguments[2:])
        assert not re.search(r"\b[A-Z]{3,}\b", following[0].replace(str(place), "")), "a placeholder is no argument"
    else:
        assert command == "eval" and str(place / "draft" / "README.md") in following[0]


@pytest.mark.parametrize("command", ["extract", "verify", "train", "export", "eval"])
def test_with_json_logs_every_line_is_an_event_and_quiet_prints_none(
    command: str, pipeline: dict[str, list[object]], printed: dict[str, Result]
) -> None:
    assert printed[command].exit_code == 0
    result = dflash(command, *pipeline[command], "--log-format", "json", "--json")
    events = [json.loads(line) for line in result.stderr.splitlines()]
    assert events[-1]["event"] == "finished" and events[-1]["exit_code"] == result.exit_code == 0
    assert isinstance(json.loads(result.stdout), dict)
    if command in ("verify", "eval"):
        (end,) = [event for event in events if event["event"] == "end" and event["what"] in ("Verifying", "Decoding")]
        assert end["done"] == end["total"] and end["seconds"] > 0 and end["unit"] in ("shards", "prompts")
    assert dflash(command, *pipeline[command], "--quiet").stderr == ""


def test_an_error_with_json_logs_is_an_event(place: Path) -> None:
    result = dflash("train", place / "nothing", "--out", place / "new", "--log-format", "json")
    error, finished = (json.loads(line) for line in result.stderr.splitlines())
    assert result.exit_code == 1 and "is not a feature cache" in error["message"]
    assert error["event"] == "error" and finished["event"] == "finished" and finished["exit_code"] == 1
