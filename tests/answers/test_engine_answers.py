"""Answers from an engine in this process: those of transformers, the same whatever interrupts them."""

import json
from pathlib import Path
from typing import Any

import pytest
from pretended_generator import pretend_to_answer
from running import dflash
from tiny_target import conversations, save_target

from dflash_offline.schemas.errors import DflashError, MismatchError
from dflash_offline.schemas.settings.option import options
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.regenerate import Regenerated, regenerate

pytestmark = pytest.mark.usefixtures("installed")
MOST, ENDS = 24, [2, *range(60, 100)]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target at whose answers a dozen tokens end, so that most answers do."""
    folder = save_target(tmp_path_factory.mktemp("talker"), num_layers=4)
    settings = {"eos_token_id": ENDS, "repetition_penalty": 1.7, "do_sample": True, "top_k": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in conversations(16)))
    return path


def run(talker: Path, data: Path, out: Path, **more: Any) -> Regenerated:
    settings = {"max_new_tokens": MOST, "device": "cpu", "keep_rewritten": True, "stop_after_rejected": 0}
    return regenerate(RegenerateConfig(data=(data,), out=out, target=str(talker), **{**settings, **more}))


def test_an_engine_gives_transformers_own_greedy_answers(
    talker: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = pretend_to_answer(monkeypatch)
    run(talker, chats, tmp_path / "own.jsonl")
    done = run(talker, chats, tmp_path / "new.jsonl", engine="vllm", engine_args={"max_num_seqs": 5})
    assert (tmp_path / "new.jsonl").read_bytes() == (tmp_path / "own.jsonl").read_bytes()
    rejects = [(tmp_path / f"{name}.jsonl.rejects").read_text() for name in ("own", "new")]
    assert rejects[0] == rejects[1] and done.num_answers > 8 and done.left_out
    provenance = json.loads((tmp_path / "new.jsonl.provenance").read_text())
    assert provenance["identity"]["engine"]["version"] == "0.32.0"
    assert [(engine.was_shut, engine.most_at_once) for engine in engines] == [(True, 5)]
    assert run(talker, chats, tmp_path / "new.jsonl", engine="vllm", engine_args={"max_num_seqs": 5}).num_rows
    assert len(engines) == 1, "where nothing is open no engine starts"


def test_an_engine_is_told_to_add_nothing_to_the_targets_own_probabilities(
    talker: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = pretend_to_answer(monkeypatch)
    run(talker, chats, tmp_path / "new.jsonl", engine="vllm", limit=6)
    run(talker, chats, tmp_path / "drawn.jsonl", engine="vllm", limit=6, temperature=0.5, top_p=0.9, seed=3)
    neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    neutral |= {"max_tokens": MOST, "stop_token_ids": ENDS, "detokenize": False}
    greedy, drawn = (engine.parameters for engine in engines)
    assert list(greedy.values()) == [{**neutral, "top_p": 1.0, "temperature": 0.0}] * len(greedy) and len(greedy) > 6
    seeds = {name: fields.pop("seed") for name, fields in drawn.items()}
    assert list(drawn.values()) == [{**neutral, "top_p": 0.9, "temperature": 0.5}] * len(drawn)
    assert len({*seeds.values()}) == len(seeds), "each answer has draws of its own"
    pretend_to_answer(monkeypatch)
    run(talker, chats, tmp_path / "again.jsonl", engine="vllm", limit=6, temperature=0.5, top_p=0.9, seed=3)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "drawn.jsonl").read_bytes()


def test_an_engine_that_dies_keeps_its_answers_and_the_next_goes_on(
    talker: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_to_answer(monkeypatch)
    run(talker, chats, tmp_path / "whole.jsonl", engine="vllm")
    first = pretend_to_answer(monkeypatch, dies_after=8)
    with pytest.raises(DflashError, match=r"engine stopped: RuntimeError: worker 0 died. The answers so far are kept"):
        run(talker, chats, tmp_path / "new.jsonl", engine="vllm")
    second = pretend_to_answer(monkeypatch)
    done = run(talker, chats, tmp_path / "new.jsonl", engine="vllm")
    assert (tmp_path / "new.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert first[0].was_shut and done.num_answers_now < second[0].num_ended + 5
    assert len(first[0].parameters.keys() & second[0].parameters.keys()) <= len(first[0].parameters) - 7


def other_ids(output: Any) -> None:
    output.prompt_token_ids.append(0)


def aborted(output: Any) -> None:
    output.outputs[0].finish_reason = "abort"


@pytest.mark.parametrize(
    ("change", "said"), [(other_ids, "other token ids than it was given"), (aborted, "ended an answer by 'abort'")]
)
def test_an_engine_that_does_not_do_as_told_is_refused(
    change: Any, said: str, talker: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = pretend_to_answer(monkeypatch, change=change)
    with pytest.raises(DflashError, match=said):
        run(talker, chats, tmp_path / "new.jsonl", engine="vllm")
    assert engines[0].was_shut and not (tmp_path / "new.jsonl").exists()


OF_ENGINE: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "gpu_memory_utilization": 0.5,
    "quantization": "fp8",
    "kv_cache_dtype": "fp8",
    "engine_args": {"seed": 1},
}
"""Another value of each setting of the engine."""


@pytest.mark.parametrize("name", OF_ENGINE)
def test_only_a_free_setting_of_the_engine_may_be_another_when_the_command_is_repeated(
    name: str, talker: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert OF_ENGINE.keys() | {"engine"} == {
        name for name, option in options(RegenerateConfig).items() if option.group == "Engine"
    }
    out = tmp_path / "new.jsonl"
    pretend_to_answer(monkeypatch)
    run(talker, chats, out, engine="vllm", limit=3)
    if options(RegenerateConfig)[name].role == "free":
        assert run(talker, chats, out, engine="vllm", limit=3, **{name: OF_ENGINE[name]}).num_answers_now == 0
        with pytest.raises(MismatchError, match=r"engine\.name"):
            run(talker, chats, out, limit=3)
    else:
        field = {"engine_args": "args"}.get(name, name)
        with pytest.raises(MismatchError, match=rf"engine\.{field}"):
            run(talker, chats, out, engine="vllm", limit=3, **{name: OF_ENGINE[name]})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantization": "fp8", "engine": "transformers"}, "quantization is a setting of vllm"),
        ({"batch_rows": 3}, "batch_rows is a setting of transformers; vllm takes max_num_seqs in engine_args"),
        ({"attn_implementation": "eager"}, "attn_implementation is a setting of transformers; vllm chooses its own"),
        ({"servers": ("http://a",)}, "engine is vllm, and servers are given"),
        ({"temperature": 0.001}, "vllm draws at 0.01 or more"),
        ({"engine_args": {"model": "x"}}, "engine_args holds model, which is the setting target"),
        ({"device": "cuda:1"}, "vllm takes the first GPUs"),
    ],
)
def test_settings_that_do_not_go_with_an_engine_are_refused(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(DflashError, match=said):
        RegenerateConfig(data=(tmp_path,), out=tmp_path / "a.jsonl", target="t", **{"engine": "vllm", **settings})


def test_a_shorter_room_of_the_engine_leaves_out_what_does_not_fit(
    talker: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(config: Any, folder: Path, device: Any, dtype: Any, positions: int) -> Any:
        assert positions == 60
        raise DflashError("started")

    monkeypatch.setattr("dflash_offline.stages.answers.engine.start_generator", start)
    with pytest.raises(DflashError, match="started"):
        run(talker, chats, tmp_path / "new.jsonl", engine="vllm", engine_args={"max_model_len": 60})


def test_what_is_not_installed_is_said_before_any_work(
    talker: Path, chats: Path, installed: Path, tmp_path: Path
) -> None:
    (installed / "METADATA").unlink()
    installed.rmdir()
    refused = dflash("regenerate", chats, "--target", talker, "--out", tmp_path / "new.jsonl", "--engine", "vllm")
    assert refused.exit_code == 1 and "vLLM, which is not installed here" in " ".join(refused.output.split())
