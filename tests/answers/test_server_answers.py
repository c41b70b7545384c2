"""What servers are told so that the target's own answers come, and what is made of these."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from running import dflash, refused

from dflash_offline.schemas.errors import DflashError, MismatchError
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.regenerate import Regenerated, regenerate

Respond = Callable[[str, dict[str, Any]], tuple[int, Any]]
NEUTRAL = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "old"}]}


@contextmanager
def serving(respond: Respond) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve what a function of path and request returns; gives the URL and the requests with their headers."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, "headers": dict(self.headers), **request})
            status, document = respond(self.path, requests[-1])
            body = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{http.server_address[1]}", requests
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def said(content: str | None = "yes", finish: str = "stop", **more: Any) -> dict[str, Any]:
    tokens = {name: more.pop(name) for name in ("token_ids",) if name in more}
    prompt = {name: more.pop(name) for name in ("prompt_token_ids",) if name in more}
    message = {"role": "assistant", "content": content, **more}
    return {"choices": [{"message": message, "finish_reason": finish, **tokens}], **prompt}


def run(folder: Path, url: str, rows: list[dict[str, Any]] | None = None, **more: Any) -> Regenerated:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows or [ROW]))
    quick: dict[str, Any] = {"backoff_s": 0.005, "rest_s": 0.02, "rests": 1, "server_tries": 2, "model": "m"}
    return regenerate(RegenerateConfig(data=(data,), out=folder / "own.jsonl", servers=(url,), **{**quick, **more}))


def messages(folder: Path) -> list[list[dict[str, Any]]]:
    return [json.loads(line)["messages"] for line in (folder / "own.jsonl").read_text().splitlines()]


def test_a_server_is_told_to_add_nothing_to_the_targets_own_probabilities(tmp_path: Path) -> None:
    with serving(lambda _path, _request: (200, said())) as (host, requests):
        run(tmp_path, f"http://{host}", temperature=0.5, top_p=0.9)
    assert {name: requests[0][name] for name in NEUTRAL} == {**NEUTRAL, "top_p": 0.9}


def test_a_server_is_told_what_tokens_may_be_drawn(tmp_path: Path) -> None:
    with serving(lambda _path, _request: (200, said())) as (host, requests):
        run(tmp_path, f"http://{host}", temperature=0.7, top_p=0.8, top_k=20, min_p=0.05)
        assert {name: requests[0][name] for name in NEUTRAL} == {**NEUTRAL, "top_p": 0.8, "top_k": 20, "min_p": 0.05}
        provenance = json.loads((tmp_path / "own.jsonl.provenance").read_text())
        assert (provenance["identity"]["top_k"], provenance["identity"]["min_p"]) == (20, 0.05)
        for other in ({"top_k": 19, "min_p": 0.05}, {"top_k": 20}):
            with pytest.raises(MismatchError, match=r"top_k|min_p"):
                run(tmp_path, f"http://{host}", temperature=0.7, top_p=0.8, **other)
    with pytest.raises(DflashError, match=r"top_k is of tokens that are drawn.*\n.*min_p is of tokens"):
        run(tmp_path, "http://127.0.0.1:1", top_k=20, min_p=0.05)


@pytest.mark.parametrize(
    ("known", "error", "missing"),
    [
        (
            {"top_p", "presence_penalty", "frequency_penalty"},
            "Unknown argument: {}",
            "min_p, repetition_penalty, top_k",
        ),
        (set(), "extra fields are not permitted", ", ".join(sorted(NEUTRAL))),
        ({*NEUTRAL, "top_k>=0"}, "Unknown argument: {}", ""),
    ],
)
def test_a_server_that_does_not_take_a_value_is_asked_without_it_and_named(
    tmp_path: Path, known: set[str], error: str, missing: str
) -> None:
    taken = {"model", "messages", "max_tokens", "temperature", *known}

    def respond(_path: str, request: dict[str, Any]) -> tuple[int, Any]:
        bad = [name for name in request if name not in {"path", "headers", *taken}]
        bad += ["top_k"] if "top_k>=0" in known and request.get("top_k", 0) < 0 else []
        return (400, {"error": {"message": error.format(bad[0])}}) if bad else (200, said())

    with serving(respond) as (host, requests):
        done = run(tmp_path, f"http://{host}", [ROW] * 5, concurrency=1)
        assert done.num_rows == 5
        assert all(respond("", request)[0] == 200 for request in requests[-5:])  # it is not asked in vain again
    provenance = json.loads((tmp_path / "own.jsonl.provenance").read_text())
    told = [note for note in done.notes if "does not take" in note]
    assert provenance["counts"]["notes"] == done.notes
    assert told == ([f"answers of a server that does not take {missing}: its own values hold"] if missing else [])
    assert all(done.notes[note] == 5 for note in told)


def test_a_row_that_is_refused_is_not_taken_for_a_field_that_is(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "long" * (i % 2) + "a"}]} for i in range(6)]

    def respond(_path: str, request: dict[str, Any]) -> tuple[int, Any]:
        too_long = "long" in request["messages"][0]["content"]
        return (400, {"error": "top_k tokens are too many"}) if too_long else (200, said())

    with serving(respond) as (host, requests):
        done = run(tmp_path, f"http://{host}", rows, concurrency=1)
    assert done.left_out == {"refused by the server": 3} and len(requests) == 6
    assert all("top_k" in request for request in requests)


# A server whose template writes a thought before the content, and whose prompt opens it: one token a character.
PROMPT = "hi<think>\n"


def as_tokens(path: str, request: dict[str, Any], words: str, **more: Any) -> tuple[int, Any]:
    if path == "/tokenize":
        answer = request["messages"][-1]
        thought = f"<think>\n{answer['reasoning']}\n</think>\n\n" if answer.get("reasoning") else ""
        if not thought and "<think>" not in answer["content"]:
            thought = "<think></think>"
        text = f"hi{thought}{answer['content']}"
        return 200, {"tokens": [ord(character) for character in text] + [0, 10]}
    ids = [ord(character) for character in words] + [0]
    return 200, said(**{"content": words, **more}, token_ids=ids, prompt_token_ids=[*map(ord, PROMPT)])


@pytest.mark.parametrize(
    ("words", "given", "kept"),
    [
        ("hm</think>yes", {}, {"content": "<think>\nhm</think>yes"}),
        ("hm\n</think>\n\nyes", {}, {"content": "<think>\nhm\n</think>\n\nyes"}),
        (
            "hm\n</think>\n\nyes",
            {"content": "yes", "reasoning": "hm"},
            {"content": "yes", "reasoning_content": "hm"},
        ),
    ],
)
def test_a_servers_answer_is_kept_as_its_template_writes_it_back(
    tmp_path: Path, words: str, given: dict[str, str], kept: dict[str, str]
) -> None:
    with serving(lambda path, request: as_tokens(path, request, words, **given)) as (host, requests):
        done = run(tmp_path, f"http://{host}/v1")
    assert messages(tmp_path) == [[ROW["messages"][0], {"role": "assistant", **kept}]] and not done.notes
    assert {request["path"] for request in requests} == {"/v1/chat/completions", "/tokenize"}


def test_a_servers_answer_that_its_template_writes_otherwise_is_left_out_or_kept_and_counted(tmp_path: Path) -> None:
    with serving(lambda path, request: as_tokens(path, request, "hm</think>yes", content="yes", reasoning="hm ")) as (
        host,
        _,
    ):
        line = ["regenerate", tmp_path / "rows.jsonl", "--server", f"http://{host}", "--model", "m"]
        (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
        result = dflash(*line, "--out", tmp_path / "own.jsonl")
        refused(result, "1 rows: template writes the answer otherwise", "--keep-rewritten")
        kept = dflash(*line, "--out", tmp_path / "kept.jsonl", "--keep-rewritten")
    assert kept.exit_code == 0 and "1 answers were not compared" in kept.stdout, kept.output


def test_a_server_that_gives_no_tokens_or_cannot_say_what_it_renders_is_said_to_be_unchecked(tmp_path: Path) -> None:
    def respond(path: str, request: dict[str, Any]) -> tuple[int, Any]:
        return (404, {}) if path == "/tokenize" else as_tokens(path, request, "yes")

    with serving(respond) as (host, requests):
        done = run(tmp_path, f"http://{host}", [ROW] * 3, concurrency=1)
    assert done.notes == {"answers were not compared with the tokens that were generated": 3}
    assert [request["path"] for request in requests].count("/tokenize") == 1


def test_a_servers_call_goes_on_with_the_recorded_result_if_it_is_the_recorded_one(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    user, result = ROW["messages"][0], {"role": "tool", "content": "3", "tool_call_id": "c1"}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                user,
                {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": {"x": x}}}]},
                result,
                {"role": "assistant", "content": "old"},
            ],
            "tools": tools,
        }
        for x in (1, 2)
    ]

    def respond(_path: str, request: dict[str, Any]) -> tuple[int, Any]:
        if request["messages"][-1]["role"] == "tool":
            return 200, said("It is 3.")
        function = {"name": "f", "arguments": '{"x": 1}'}
        return 200, said(None, "tool_calls", tool_calls=[{"id": "new", "type": "function", "function": function}])

    with serving(respond) as (host, requests):
        done = run(tmp_path, f"http://{host}", rows)
    asked = {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **call}]}
    assert messages(tmp_path) == [
        [user, asked, result, {"role": "assistant", "content": "It is 3."}],
        [user, {**asked, "tool_calls": [call]}],
    ]
    assert done.notes["answers beyond such a call, not asked for"] == 1
    (sent,) = [request["messages"][1] for request in requests if len(request["messages"]) > 1]
    assert sent["tool_calls"][0]["function"]["arguments"] == '{"x": 1}' and sent["tool_calls"][0]["id"] == "c1"


KEY = "sk-0123456789abcdef"
ECHOES: dict[str, tuple[int, Any]] = {
    "error": (400, {"error": {"message": f"no such key: {KEY}"}}),
    "long error": (400, {"error": {"message": "a" * 290 + KEY}}),
    "text": (500, f"<html>Bearer {KEY}</html>".encode()),
    "wrong": (401, {"error": f"Bearer {KEY}"}),
    "finish": (200, said(finish=f"{'a' * 70}{KEY}")),
    "answer": (200, said(f"Your key is {KEY}.")),
    "reasoning": (200, said(reasoning=KEY)),
    "call": (200, said(tool_calls=[{"function": {"name": KEY, "arguments": "{}"}}])),
    "bad call": (200, said(tool_calls=[{"function": {"name": "f", "arguments": KEY}}])),
    "kind": (200, {"choices": {KEY: 1}}),
}


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("where", ["key", "url"])
def test_a_secret_that_a_server_repeats_is_seen_and_stored_nowhere(
    tmp_path: Path, echo: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY if where == "key" else "EMPTY")
    (tmp_path / "rows.jsonl").write_text((json.dumps(ROW) + "\n") * 2)
    with serving(lambda _path, request: ECHOES[echo] if request["messages"] else (200, said())) as (host, _):
        url = f"http://user:{KEY}@{host}" if where == "url" else f"http://{host}"
        quick = ["--backoff-s", 0.01, "--rest-s", 0.01, "--rests", 1, "--server-tries", 1]
        line = ["regenerate", tmp_path / "rows.jsonl", "--server", url, "--model", "m", "--out", tmp_path / "own.jsonl"]
        result = dflash(*line, *quick)
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert result.exit_code == 1
    for text in (result.output, *written):
        assert KEY not in text and KEY[:8] not in text


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-secrét", "sk secret", "\x7fsecret", " "])
def test_a_key_that_no_request_can_carry_is_refused_and_not_shown(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    line = ["regenerate", tmp_path / "rows.jsonl", "--server", "http://127.0.0.1:9", "--model", "m"]
    result = dflash(*line, "--out", tmp_path / "own.jsonl")
    refused(result, "OPENAI_API_KEY holds a blank, a line break")
    assert "secr" not in result.output


def test_a_url_is_stored_and_shown_without_name_password_and_query(tmp_path: Path) -> None:
    with serving(lambda _path, _request: (200, said("EMPTY words"))) as (host, requests):
        run(tmp_path, f"http://me:pass%20word@{host}/v1?token=querysecret")
    assert requests[0]["path"] == "/v1/chat/completions?token=querysecret"
    assert requests[0]["headers"]["Authorization"].startswith("Basic ")
    provenance = (tmp_path / "own.jsonl.provenance").read_text()
    assert f"http://{host}/v1" in provenance and "word" not in provenance and "secret" not in provenance
    flags = ["--server", "ftp://me:password@x", "--model", "m", "--out", tmp_path / "b.jsonl"]
    result = dflash("regenerate", tmp_path / "rows.jsonl", *flags)
    refused(result, "server is 'ftp://x'")
    assert "password" not in result.output
