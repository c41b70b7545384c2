"""Answers from a real server on loopback that misbehaves: no row is lost, doubled or out of order."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from chat_server import NONSENSE, ChatServer, answer_to
from running import dflash, refused, without_torch

from dflash_offline.schemas.errors import BadInputError, DflashError, MismatchError
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages import regenerate as stage
from dflash_offline.stages.answers import servers as server_module
from dflash_offline.stages.answers.exchange import retry_after_s
from dflash_offline.stages.answers.server_retries import PROBE, ServersGoneError
from dflash_offline.stages.regenerate import Regenerated, regenerate
from dflash_offline.stages.stop import signal_of, stops_raised

Rows = list[dict[str, Any]]
QUICK: dict[str, Any] = {"backoff_s": 0.005, "rest_s": 0.02, "model": "tiny"}


def chats(count: int) -> Rows:
    """Return conversations of one to three turns, some with a system turn; what is said first names the row."""
    rows = []
    for index in range(count):
        messages = [{"role": "system", "content": "Be brief."}] if index % 4 == 0 else []
        for turn in range(1 + index % 3):
            messages += [
                {"role": "user", "content": f"row {index} turn {turn}"},
                {"role": "assistant", "content": "the corpus's own words"},
            ]
        rows.append({"messages": messages})
    return rows


def save(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def expected(rows: Rows, source: str = "chats.jsonl") -> str:
    """Return the new file, made row by row without any server."""
    lines = []
    for index, row in enumerate(rows):
        messages: list[dict[str, Any]] = []
        for message in row["messages"]:
            messages.append(message if message["role"] != "assistant" else said(messages))
        lines.append(json.dumps({"messages": messages, "source": f"{source}:{index + 1}"}) + "\n")
    return "".join(lines)


def said(messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "assistant", "content": answer_to(messages)}


def run(data: Path, out: Path, *servers: ChatServer, **settings: Any) -> Regenerated:
    urls = tuple(server.url for server in servers)
    return regenerate(RegenerateConfig(data=(data,), out=out, servers=urls, **{**QUICK, **settings}))


def rejects(out: Path) -> Rows:
    return [json.loads(line) for line in Path(f"{out}.rejects").read_text().splitlines()]


def by_chance(seed: int, *faults: str) -> Callable[[str, int], str | None]:
    """Return a rule by which a request's first tries fail half of the time."""

    def fault(content: str, tries: int) -> str | None:
        chance = random.Random(f"{seed} {content} {tries}")
        return chance.choice(faults) if tries < 4 and chance.random() < 0.5 else None

    return fault


def test_two_misbehaving_servers_lose_double_and_misplace_no_row(tmp_path: Path) -> None:
    rows = chats(60)
    data, out = save(tmp_path / "chats.jsonl", rows), tmp_path / "new.jsonl"
    faults = ("slow", "429", "500", "503", "cut", *NONSENSE)
    with ChatServer(by_chance(1, *faults)) as one, ChatServer(by_chance(2, *faults)) as other:
        done = run(data, out, one, other, timeout_s=0.5, concurrency=12, row_tries=1000, rests=1000)
    assert out.read_text() == expected(rows)
    assert done.num_rows == 60 and done.num_answers == 120 == done.num_answers_now and not done.left_out
    assert set(one.faults + other.faults) == {*faults, "none"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "new.jsonl", "new.jsonl.provenance"]


def test_answers_that_are_none_leave_their_rows_out_counted_and_named(tmp_path: Path) -> None:
    rows = chats(30)
    kinds = {"row 3 turn 0": "length", "row 4 turn 1": "empty", "row 7 turn 0": "tool", "row 8 turn 2": "400"}
    kinds |= {"row 9 turn 0": "filter", "row 12 turn 0": "reasoning"}
    data, out = save(tmp_path / "chats.jsonl", rows), tmp_path / "new.jsonl"
    with ChatServer(lambda content, _tries: kinds.get(content)) as server:
        done = run(data, out, server)
    reasons = ["truncated answer", "empty answer", "call of a tool cannot be read", "refused by the server"]
    reasons.append("answer ended otherwise")
    assert done.left_out == dict.fromkeys(sorted(reasons), 1) and done.num_rows == 25
    assert [(one["row"], one["reason"]) for one in rejects(out)] == list(zip([4, 5, 8, 9, 10], reasons, strict=True))
    assert "turn 2: status 400: told to say 400" in rejects(out)[3]["detail"]
    new = [json.loads(line) for line in out.read_text().splitlines()]
    assert [int(row["source"].split(":")[1]) for row in new] == [n for n in range(1, 31) if n not in (4, 5, 8, 9, 10)]
    with_reasoning = next(row for row in new if row["source"].endswith(":13"))
    assert with_reasoning["messages"][-1]["reasoning_content"] == "because"


def test_a_row_that_always_fails_is_left_out_while_the_others_are_answered(tmp_path: Path) -> None:
    rows = chats(20)
    data, out = save(tmp_path / "chats.jsonl", rows), tmp_path / "new.jsonl"
    with ChatServer(lambda content, _tries: "500" if content == "row 1 turn 1" else None) as server:
        done = run(data, out, server, concurrency=2, row_tries=3)
    assert done.left_out == {"no answer from the server": 1}
    assert "turn 1: 3 tries; the last: status 500" in rejects(out)[0]["detail"]
    assert server.faults["500"] == 3


def test_a_row_that_always_fails_is_left_out_where_it_is_the_only_one(tmp_path: Path) -> None:
    data, out = save(tmp_path / "chats.jsonl", chats(5)), tmp_path / "new.jsonl"
    dead = {"row 4 turn 0", PROBE.questions[0][0]["content"]}
    with ChatServer(lambda content, _tries: "500" if content in dead else None) as server:
        with pytest.raises(ServersGoneError):  # not the row's fault, for nothing else is answered either
            run(data, out, server, rests=2, row_tries=1000)  # however long the others take
        assert server.probes == 2
        dead.remove("Say yes.")
        done = run(data, out, server)
    assert done.left_out == {"no answer from the server": 1} and done.num_answers_now == 1
    assert [row["source"] for row in map(json.loads, out.read_text().splitlines())] == [
        f"chats.jsonl:{n}" for n in (1, 2, 3, 4)
    ]


def test_a_server_that_goes_away_stops_the_command_and_it_is_resumed(tmp_path: Path) -> None:
    rows = chats(40)
    data, out = save(tmp_path / "chats.jsonl", rows), tmp_path / "new.jsonl"
    answered = 0

    def goes_away(_content: str, _tries: int) -> str | None:
        nonlocal answered
        answered += 1
        return "503" if answered > 25 else None

    with ChatServer(goes_away) as server, pytest.raises(ServersGoneError, match="No server answers") as gone:
        run(data, out, server, concurrency=4, rests=2)
    assert server.url in str(gone.value) and "status 503" in str(gone.value)
    assert not out.exists() and (tmp_path / "new.jsonl.partial").is_dir()
    with ChatServer() as back:
        done = run(data, out, back, concurrency=3)
    assert out.read_text() == expected(rows)
    assert done.num_answers_now == len(back.requests) == done.num_answers - 25


def test_the_command_says_that_a_server_is_gone_and_exits_with_1(tmp_path: Path) -> None:
    data, out = save(tmp_path / "chats.jsonl", chats(3)), tmp_path / "new.jsonl"
    with ChatServer() as server:
        pass
    result = dflash("regenerate", data, "--server", server.url, "--model", "m", "--out", out, "--backoff-s", 0.01)
    refused(result, "No server answers", server.url, "cannot connect", "See that --server is right")


@pytest.mark.parametrize("status", ["401", "404", "301"])
def test_wrong_settings_stop_at_once(status: str, tmp_path: Path) -> None:
    data = save(tmp_path / "chats.jsonl", chats(50))
    with ChatServer(lambda _content, _tries: status) as server, pytest.raises(DflashError, match=f"status {status}"):
        run(data, tmp_path / "new.jsonl", server, concurrency=2)
    assert len(server.requests) <= 2


def test_refusals_alone_stop_the_command_and_none_is_kept(tmp_path: Path) -> None:
    rows = chats(60)
    data, out = save(tmp_path / "chats.jsonl", rows), tmp_path / "new.jsonl"
    with (
        ChatServer(lambda _content, _tries: "400") as server,
        pytest.raises(DflashError, match="all left out: refused by the server"),
    ):
        run(data, out, server)
    with ChatServer() as server:
        run(data, out, server)
    assert out.read_text() == expected(rows)


def test_a_few_refusals_before_the_first_answer_are_kept(tmp_path: Path) -> None:
    rows = chats(12)
    data, out = save(tmp_path / "chats.jsonl", rows), tmp_path / "new.jsonl"
    with ChatServer(lambda content, _tries: "400" if content < "row 5" else None) as server:
        done = run(data, out, server, concurrency=1)
    assert done.left_out == {"refused by the server": 7} and done.num_rows == 5  # rows 10 and 11 come before 5 as text
    with ChatServer(lambda _content, _tries: "400") as server, pytest.raises(DflashError, match="all left out"):
        run(data, tmp_path / "other.jsonl", server)


def test_a_dead_server_gets_few_requests_and_costs_no_row(tmp_path: Path) -> None:
    rows = chats(60)
    data, out = save(tmp_path / "chats.jsonl", rows), tmp_path / "new.jsonl"
    with ChatServer(lambda _content, _tries: "500") as dead, ChatServer(seconds=0.002) as alive:
        done = run(data, out, dead, alive, concurrency=4, rest_s=60.0)
    assert out.read_text() == expected(rows) and done.num_rows == 60
    assert 5 <= len(dead.requests) <= 5 + 4  # what was on its way when it was laid to rest


def test_a_server_that_comes_back_is_used_again(tmp_path: Path) -> None:
    rows = chats(60)
    data, out = save(tmp_path / "chats.jsonl", rows), tmp_path / "new.jsonl"
    asked = 0

    def away_for_a_while(_content: str, _tries: int) -> str | None:
        nonlocal asked
        asked += 1
        return "503" if 10 < asked <= 20 else None

    with ChatServer(away_for_a_while, seconds=0.005) as one, ChatServer(seconds=0.005) as other:
        run(data, out, one, other, concurrency=4)
    assert out.read_text() == expected(rows)
    assert one.faults["none"] > 10


def test_retry_after_is_waited_for(tmp_path: Path) -> None:
    data = save(tmp_path / "chats.jsonl", chats(1))
    with ChatServer(lambda _content, tries: "429" if tries < 3 else None) as server:
        run(data, tmp_path / "new.jsonl", server, backoff_s=0.0, server_tries=10)
    gaps = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert len(gaps) == 3 and min(gaps) >= 0.05


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("2", 2, 2),
        ("0.5", 0.5, 0.5),
        ("-3", 0, 0),
        ("9e9", 600, 600),
        ("soon", 0, 0),
        ("nan", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 600, 600),
        ("", 0, 0),
    ],
)
def test_retry_after_is_seconds_or_an_instant(text: str, low: float, high: float) -> None:
    assert low <= retry_after_s({"retry-after": text}) <= high


def test_requests_on_their_way_are_bounded_and_busy_servers_spared(tmp_path: Path) -> None:
    data = save(tmp_path / "chats.jsonl", chats(60))
    with ChatServer(seconds=0.01) as one, ChatServer(seconds=0.01) as other:
        run(data, tmp_path / "new.jsonl", one, other, concurrency=6)
    assert one.most_at_once <= 4 and other.most_at_once <= 4
    assert one.most_at_once + other.most_at_once >= 3
    assert abs(len(one.requests) - len(other.requests)) < 30


def test_rows_are_not_begun_far_ahead_of_an_unfinished_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "ROWS_AHEAD", 2)
    rows = chats(40)
    data, out = save(tmp_path / "chats.jsonl", rows), tmp_path / "new.jsonl"
    with ChatServer(lambda content, _tries: "slow" if content == "row 0 turn 0" else None) as server:
        run(data, out, server, concurrency=4)
    first = [int(request["messages"][-1]["content"].split()[1]) for request in server.requests]
    before = server.times[0] + 0.7
    begun = {row for row, when in zip(first, server.times, strict=True) if when < before}
    assert max(begun) <= 8 and out.read_text() == expected(rows)


def test_requests_hold_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    tools = [{"type": "function", "function": {"name": "f"}}]
    data = save(tmp_path / "chats.jsonl", [{**row, "tools": tools} for row in chats(6)])
    with ChatServer(lambda content, _tries: "reasoning" if content == "row 2 turn 0" else None) as server:
        run(data, tmp_path / "greedy.jsonl", server, max_new_tokens=7, chat_template_kwargs={"a": True})
    assert server.keys == {None}
    for request in server.requests:
        assert request["path"] == "/v1/chat/completions" and request["model"] == "tiny" and request["max_tokens"] == 7
        assert request["temperature"] == 0 and "seed" not in request and request["tools"] == tools
        assert request["chat_template_kwargs"] == {"a": True}
        assert not any(message["content"] == "the corpus's own words" for message in request["messages"])
    later = next(r for r in server.requests if r["messages"][-1]["content"] == "row 2 turn 1")
    assert {later["messages"][1][name] for name in ("reasoning_content", "reasoning")} == {"because"}
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    seeds = []
    for concurrency in (1, 5):
        with ChatServer() as server:
            out = tmp_path / f"{concurrency}.jsonl"
            run(data, out, server, temperature=0.7, top_p=0.9, seed=3, concurrency=concurrency)
        assert server.keys == {"Bearer secret"}
        assert all(request["top_p"] == 0.9 and request["temperature"] == 0.7 for request in server.requests)
        seeds.append({json.dumps(request["messages"]): request["seed"] for request in server.requests})
    assert seeds[0] == seeds[1] and len(set(seeds[0].values())) == 12
    assert "secret" not in (tmp_path / "1.jsonl.provenance").read_text()


def test_no_torch_is_loaded_for_servers(tmp_path: Path) -> None:
    data, out = save(tmp_path / "chats.jsonl", chats(5)), tmp_path / "new.jsonl"
    with ChatServer() as server:
        asked = ["regenerate", str(data), "--server", server.url, "--target", "a/b", "--out", str(out)]
        (said,) = without_torch(asked)
    assert "5 conversations, 9 answers" in said and f"dflash extract {out} --target a/b" in said
    assert out.read_text() == expected(chats(5))


def command(data: Path, out: Path, server: ChatServer) -> list[str]:
    program = [sys.executable, "-m", "dflash_offline.pipeline.app", "regenerate", str(data), "--out", str(out)]
    return [
        *program,
        "--server",
        server.url,
        "--model",
        "m",
        "--concurrency",
        "6",
        "--backoff-s",
        "0.01",
        "--rest-s",
        "0.02",
    ]


def test_kills_at_random_instants_leave_what_one_more_run_completes(tmp_path: Path) -> None:
    rows, kills = chats(120), 4
    data, out = save(tmp_path / "chats.jsonl", rows), tmp_path / "new.jsonl"
    with ChatServer(by_chance(5, "429", "500", "cut", "nonsense"), seconds=0.01) as server:
        given = {**QUICK, "data": str(data), "out": str(out), "servers": [server.url], "concurrency": 6, "rests": 50}
        program = [sys.executable, str(Path(__file__).with_name("killed_regeneration.py")), str(kills)]
        killed = subprocess.run([*program, json.dumps(given)], capture_output=True, text=True)
    assert killed.returncode == 0, killed.stderr
    assert out.read_text() == expected(rows)
    # What was on its way when a kill came is asked again, and no more.
    assert server.faults["none"] - server.probes <= (240 + kills * 6) * (1 + int(killed.stdout))


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGTERM, signal.SIGHUP))],
)
def test_a_signal_keeps_the_answers_and_says_how_to_go_on(number: signal.Signals, tmp_path: Path) -> None:
    rows = chats(60)
    data, out = save(tmp_path / "chats.jsonl", rows), tmp_path / "new.jsonl"
    with ChatServer(seconds=0.05) as server:
        process = subprocess.Popen(command(data, out, server), stderr=subprocess.PIPE, text=True)
        while len(server.requests) < 20:
            time.sleep(0.005)
        process.send_signal(number)
        _, stderr = process.communicate()
        assert process.returncode == 128 + number, stderr
        assert "The answers so far are kept; repeat the command" in stderr
        assert "Traceback" not in stderr
        before = len(server.requests)
        subprocess.run(command(data, out, server), check=True, capture_output=True)
    assert out.read_text() == expected(rows) and len(server.requests) - before <= 120 - 14


class AtLine:
    """Sends this process a signal before the line of Python, counted from 0, that it then runs in the main thread."""

    def __init__(self, line: float, number: int) -> None:
        self.num_lines, self._line, self._number = 0, line, number

    def __call__(self, _frame: object, event: str, _value: object) -> "AtLine":
        if event == "line":
            self.num_lines += 1
            if self.num_lines == self._line:
                os.kill(os.getpid(), self._number)
        return self


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_any_instant_of_the_requests_is_a_stop_and_never_another_error(number: int, tmp_path: Path) -> None:
    rows = chats(5)
    data = save(tmp_path / "chats.jsonl", rows)

    def run_until(line: float, out: Path) -> int:
        at = AtLine(line, number)
        with ChatServer(by_chance(5, "429", "cut")) as server, stops_raised():
            sys.settrace(at)
            try:
                run(data, out, server, concurrency=3)
            finally:
                sys.settrace(None)
        return at.num_lines

    num_lines = run_until(-1, tmp_path / "whole.jsonl")
    for index in range(4):
        out = tmp_path / f"{index}.jsonl"
        line = random.Random(f"{number} {index}").randrange(num_lines // 8, num_lines // 2)
        with pytest.raises(KeyboardInterrupt) as stopped:
            run_until(line, out)
        assert signal_of(stopped.value) == number
        with ChatServer() as server:
            run(data, out, server)
        assert out.read_text() == expected(rows)


def edited_while_answered(data: Path, edit: Callable[[], object]) -> ChatServer:
    """Return a slow server that has the data edited before its eighth answer."""
    num_asked = 0

    def fault(_content: str, _tries: int) -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 8:
            edit()

    return ChatServer(fault, seconds=0.01)


@pytest.mark.parametrize("last_edited", [39, 2], ids=["all rows", "rows that were answered"])
def test_data_edited_while_it_is_answered_is_refused_and_its_content_goes_on_once_it_is_back(
    tmp_path: Path, last_edited: int
) -> None:
    rows = chats(40)
    data, out = save(tmp_path / "chats.jsonl", rows), tmp_path / "new.jsonl"
    other = json.loads(json.dumps(rows).replace("turn", "TURN"))[: last_edited + 1] + rows[last_edited + 1 :]
    with (
        edited_while_answered(data, lambda: save(data, other)) as server,
        pytest.raises(BadInputError, match=r"(?s)chats\.jsonl changed while being read.*new\.jsonl\.partial"),
    ):
        run(data, out, server, concurrency=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "new.jsonl.partial"]
    with ChatServer() as server:
        with pytest.raises(MismatchError, match="data"):
            run(data, out, server)
        save(data, rows)
        done = run(data, out, server)
    assert out.read_text() == expected(rows) and 0 < done.num_answers_now < done.num_answers


def test_rows_added_while_the_last_one_is_answered_are_refused_by_the_command(tmp_path: Path) -> None:
    data, out = save(tmp_path / "chats.jsonl", chats(5)), tmp_path / "new.jsonl"
    with edited_while_answered(data, lambda: save(data, chats(7))) as server:
        result = dflash(*command(data, out, server)[3:])
    refused(result, "chats.jsonl changed while being read", "put its content back")
    assert not out.exists() and not Path(f"{out}.provenance").exists()


def test_data_edited_while_the_rows_are_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = save(tmp_path / "chats.jsonl", chats(4)), tmp_path / "new.jsonl"
    write = stage.write_synced

    def edit_after_writing(path: Path, content: Iterable[bytes]) -> None:
        write(path, content)
        save(data, chats(5))

    monkeypatch.setattr(stage, "write_synced", edit_after_writing)
    with ChatServer() as server, pytest.raises(BadInputError, match="changed while being read"):
        run(data, out, server)
    assert not out.exists() and not Path(f"{out}.provenance").exists()
