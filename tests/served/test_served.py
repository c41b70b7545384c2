"""`dflash eval --server` against a server on loopback that counts its own rounds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from live_server import K, LiveServer, answer_to
from safetensors.torch import save_file
from tiny_decoding import random_draft

from dflash_offline.pipeline.commands.evaluate import print_report
from dflash_offline.pipeline.pages.eval_page import write_eval_page
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.evaluation import EvalResult, Service
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.stages.draft.weights import draft_state_dict
from dflash_offline.stages.eval_served import evaluate_served

QUESTIONS = [f"question {i}" for i in range(6)]
ROUNDS = [[len(tokens) for tokens in answer_to(text)[1:]] for text in QUESTIONS]
NUM_ROUNDS = sum(map(len, ROUNDS))
TOKENS = sum(1 + sum(rounds) for rounds in ROUNDS)
ACCEPTED = sum(n - 1 for rounds in ROUNDS for n in rounds)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("served")
    draft = random_draft()
    (folder / "draft").mkdir()
    (folder / "draft/config.json").write_text(json.dumps(draft.config.to_json()))
    save_file(draft_state_dict(draft, draft.config, torch.float32), folder / "draft/model.safetensors")
    rows = [{"messages": [{"role": "user", "content": text}], "kind": "ab"[i % 2]} for i, text in enumerate(QUESTIONS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"draft": folder / "draft", "prompts": folder / "prompts.jsonl", "max_new_tokens": 64, "timeout_s": 20.0}


def measured(server: LiveServer, settings: dict[str, Any], **changes: Any) -> tuple[EvalResult, Service]:
    result = evaluate_served(EvalConfig(**(settings | {"server": server.url} | changes)))
    assert result.service is not None
    return result, result.service


@pytest.mark.parametrize("tells_rounds", [False, True])
def test_every_figure_is_what_the_server_counted(settings: dict[str, Any], tells_rounds: bool) -> None:
    with LiveServer(tells_rounds=tells_rounds) as server:
        result, service = measured(server, settings, concurrency=(1, 3))
    assert (service.kind, service.model, service.num_speculative_tokens) == ("vLLM", "the-model", K)
    assert [one.concurrency for one in service.passes] == [1, 3]
    assert server.most_at_once == 3
    for one in service.passes:
        assert one.counted is not None
        assert (one.prompts, one.tokens) == (6, TOKENS)
        assert (one.counted.rounds, one.counted.drafted) == (NUM_ROUNDS, K * NUM_ROUNDS)
        assert one.counted.accepted == sum(one.counted.accepted_by_slot or ()) == ACCEPTED
        assert not one.counted.is_disturbed
        assert one.tokens_per_s == pytest.approx(TOKENS / one.seconds)
        assert one.first_token_s and one.per_token_s and 0 < one.per_token_s.median < 1
    assert service.notes == ()
    produced = [n for rounds in ROUNDS for n in rounds]
    assert result.acceptance.pooled == pytest.approx(sum(produced) / len(produced))
    assert result.rounds_by_tokens == tuple(produced.count(n) for n in range(1, K + 2))
    assert result.accepted_by_slot == tuple(sum(n > slot for n in produced) for slot in range(1, K + 1))
    assert result.acceptance_by_kind.keys() == ({"a", "b"} if tells_rounds else set())


def test_requests_set_the_servers_own_sampling_aside(settings: dict[str, Any]) -> None:
    with LiveServer() as server:
        measured(server, settings, chat_template_kwargs={"enable_thinking": False})
    for request in server.requests:
        assert request["temperature"] == 0 and request["repetition_penalty"] == 1 and request["top_p"] == 1
        assert request["chat_template_kwargs"] == {"enable_thinking": False} and request["max_tokens"] == 64
    assert len({request["cache_salt"] for request in server.requests}) == 2, "the warm-up's, and the pass's"


def test_answers_are_compared_with_a_plain_servers(settings: dict[str, Any]) -> None:
    with LiveServer(wrong="question 4") as server, LiveServer(fault="no draft") as plain:
        result, service = measured(server, settings, plain_server=plain.url, concurrency=(1, 2))
    assert service.compared_with == "the plain server"
    for one in service.passes:
        assert one.identical == 5 and one.plain_tokens_per_s
        assert [d.position for d in one.differences] == [sum(ROUNDS[4])]
        assert one.differences[0].prompt.endswith("prompts.jsonl:5")
    assert result.lossless is None, "without a target nothing says whether rounding chose"
    with LiveServer() as server, LiveServer(fault="no draft") as plain:
        assert measured(server, settings, plain_server=plain.url)[0].lossless is True


def test_other_traffic_is_said(settings: dict[str, Any]) -> None:
    with LiveServer(fault="others") as server:
        _, service = measured(server, settings)
    assert service.passes[0].counted is not None
    assert (service.passes[0].counted.other_requests, service.passes[0].counted.other_tokens) == (2, 50)
    assert "2 requests and 50 tokens of others" in " ".join(service.notes)


def test_a_server_that_refuses_unknown_fields_is_measured_and_compared_as_text(settings: dict[str, Any]) -> None:
    with LiveServer(fault="strict") as server, LiveServer(fault="no draft", wrong="question 1") as plain:
        _, service = measured(server, settings, plain_server=plain.url)
    assert "refuses the fields" in " ".join(service.notes)
    assert service.passes[0].identical == 5
    assert service.passes[0].differences[0].plain_token is None


def test_sglang_tells_an_average_since_its_start(settings: dict[str, Any]) -> None:
    with LiveServer("sglang") as server:
        result, service = measured(server, settings)
    counted = service.passes[0].counted
    assert (service.kind, service.num_speculative_tokens) == ("SGLang", K)
    assert counted is not None and counted.since_start and counted.rounds is None
    assert result.acceptance.pooled == counted.acceptance_length
    assert counted.acceptance_length == 1 + server.counts["accepted"] / server.counts["drafts"]
    assert "since it was started" in " ".join(service.notes)


def test_a_server_without_counters_has_no_acceptance(settings: dict[str, Any]) -> None:
    with LiveServer("other") as server:
        result, service = measured(server, settings)
    assert service.passes[0].counted is None and result.acceptance.pooled is None
    assert "not known" in " ".join(service.notes)
    with LiveServer(fault="no draft") as server:
        assert "without --speculative-config" in " ".join(measured(server, settings)[1].notes)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("error", "out of memory"),
        ("cut", "without saying how many tokens"),
        ("nonsense", "no chat completion"),
        ("huge", "more than"),
        ("restart", "started again"),
    ],
)
def test_what_cannot_be_measured_is_refused(fault: str, says: str, settings: dict[str, Any]) -> None:
    with LiveServer(fault=fault) as server, pytest.raises(DflashError, match=says):
        measured(server, settings)


def test_a_server_that_is_not_there_is_named_without_its_password(settings: dict[str, Any]) -> None:
    with pytest.raises(DflashError) as raised:
        evaluate_served(EvalConfig(**settings, server="http://me:hidden-word@127.0.0.1:1/v1"))
    assert "127.0.0.1:1" in str(raised.value) and "hidden-word" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"server": "localhost:8000"}, "expected a URL"),
        ({"server": "http://a", "plain_server": "b"}, "plain_server is"),
        ({"server": "http://a", "concurrency": (0,)}, "concurrency is 0"),
        ({"server": "http://a", "concurrency": (2, 2)}, "twice"),
        ({"plain_server": "http://a"}, "--server"),
        ({"server": "http://a", "prompt_lookup": True}, "--target"),
    ],
)
def test_settings_of_servers_are_checked(changes: dict[str, Any], says: str, settings: dict[str, Any]) -> None:
    with pytest.raises(DflashError, match=says):
        EvalConfig(**(settings | changes))


def test_the_report_and_the_page_show_what_was_served(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LiveServer() as server, LiveServer(fault="no draft") as plain:
        result, service = measured(server, settings, plain_server=plain.url, concurrency=(1, 4))
    print_report(result)
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.split()[:1] == ["4"] and "of" in line)
    assert row[-3:] == ["6", "of", "6"]
    assert f"{service.passes[1].tokens_per_s:.1f}" in row
    assert f"{1 + ACCEPTED / NUM_ROUNDS:.2f}" in row
    assert all(len(line) <= 80 for line in lines if "prompts.jsonl" not in line), max(lines, key=len)
    write_eval_page(result, tmp_path / "eval.html")
    page = (tmp_path / "eval.html").read_text()
    assert "As it is served" in page and f"{service.passes[0].tokens_per_s:.1f}" in page
    document = json.loads(json.dumps(result.to_json()))
    assert document["service"]["passes"][1]["counted"]["rounds"] == NUM_ROUNDS
