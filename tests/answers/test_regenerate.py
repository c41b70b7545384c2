"""Answers by the target itself: its own, in the rows' order, the same whatever interrupts them."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_regeneration import kill_and_complete
from processes import FORKING, held_by_another_process
from running import dflash, refused
from tiny_target import conversations, save_target
from transformers import AutoModelForCausalLM, AutoTokenizer

from dflash_offline.pipeline.demo import PROMPTS, TARGET
from dflash_offline.schemas.errors import BadInputError, DflashError, MismatchError
from dflash_offline.schemas.locks import LOCK
from dflash_offline.schemas.settings.option import options
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages import regenerate as stage
from dflash_offline.stages.answers.local import LocalAnswerer, OwnDraws
from dflash_offline.stages.draft.sampling import SamplingRule
from dflash_offline.stages.regenerate import Regenerated, regenerate

Rows = list[dict[str, Any]]
MOST = 24


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target at whose answers a dozen tokens end, so that most answers do."""
    folder = save_target(tmp_path_factory.mktemp("talker"), num_layers=4)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"eos_token_id": [2, *range(60, 100)], "repetition_penalty": 1.7, "do_sample": True, "top_k": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty conversations of one or two turns."""
    return save(tmp_path_factory.mktemp("chats") / "chats.jsonl", conversations(30))


def save(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(talker: Path, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    # What a random target says is seldom what its own tokenizer would make of the text.
    batches = {"batch_rows": 4, "max_new_tokens": MOST, "device": "cpu", "keep_rewritten": True}
    batches["stop_after_rejected"] = 0
    return {"data": (data,), "out": out, "target": str(talker), **batches, **more}


def run(talker: Path, data: Path, out: Path, **more: Any) -> Regenerated:
    return regenerate(RegenerateConfig(**settings(talker, data, out, **more)))


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(talker: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "new.jsonl"
    run(talker, chats, out)
    return out


@torch.inference_mode()
def slow_answer(model: Any, tokenizer: Any, messages: Rows, ends: set[int]) -> tuple[str, str]:
    """Return the greedy answer to one conversation, a whole forward for each token, and why it is none."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    while len(new) < MOST:
        token = int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            content = tokenizer.decode(new)
            special = any(word in content for word in tokenizer.all_special_tokens)
            return content, "special token in answer" if special else "" if content.strip() else "empty answer"
        new.append(token)
    return "", "truncated answer"


def test_every_turn_is_the_targets_own_greedy_answer_to_its_own_earlier_ones(
    talker: Path, chats: Path, whole: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(talker, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(talker)
    expected, reasons = [], Counter[str]()
    for index, row in enumerate(conversations(30)):
        messages: Rows = []
        for message in row["messages"]:
            if message["role"] == "user":
                messages.append(message)
                continue
            content, reason = slow_answer(model, tokenizer, messages, {2, *range(60, 100)})
            if reason:
                reasons[reason] += 1
                break
            messages.append({"role": "assistant", "content": content})
        else:
            expected.append({"messages": messages, "source": f"chats.jsonl:{index + 1}"})
    assert read(whole) == expected and len(expected) > 10
    assert any(len(row["messages"]) == 4 for row in expected)
    provenance = json.loads(Path(f"{whole}.provenance").read_text())
    assert provenance["counts"]["left_out"] == dict(reasons) and len(reasons) == 3
    assert Counter(one["reason"] for one in read(Path(f"{whole}.rejects"))) == reasons


def test_kills_at_random_instants_leave_what_one_more_run_completes(
    talker: Path, chats: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new.jsonl"
    killing = FORKING.Process(target=kill_and_complete, args=(3, RegenerateConfig(**settings(talker, chats, out))))
    killing.start()
    killing.join()
    assert killing.exitcode == 0
    assert out.read_bytes() == whole.read_bytes()
    assert Path(f"{out}.rejects").read_bytes() == Path(f"{whole}.rejects").read_bytes()


@pytest.mark.slow
def test_kills_of_the_embedded_target_leave_what_one_more_run_completes(tmp_path: Path) -> None:
    given = {"data": str(PROMPTS), "target": str(TARGET), "max_new_tokens": 256, "device": "cpu", "limit": 120}
    out, whole = tmp_path / "new.jsonl", tmp_path / "whole.jsonl"
    given |= {"batch_rows": 8}
    program = [sys.executable, str(Path(__file__).with_name("killed_regeneration.py"))]
    killed = subprocess.run([*program, "8", json.dumps(given | {"out": str(out)})], capture_output=True, text=True)
    assert killed.returncode == 0, killed.stderr
    regenerate(RegenerateConfig(**{**given, "data": (PROMPTS,), "out": whole}))
    assert out.read_bytes() == whole.read_bytes() and len(read(whole)) == 120


def test_a_journal_cut_or_damaged_anywhere_leads_to_the_same_file(
    talker: Path, chats: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run is stopped before it writes the file; its journal is then cut and damaged at random places."""
    out, chance = tmp_path / "new.jsonl", random.Random(1)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(stage, "_write_rows", stop)
        run(talker, chats, out)
    kept = (tmp_path / "new.jsonl.partial/answers").read_bytes()
    for trial in range(4):
        content = kept[: chance.randrange(len(kept) + 1)]
        if trial % 2:
            place = chance.randrange(len(content))
            content = content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
        partial = tmp_path / f"{trial}.jsonl.partial"
        partial.mkdir()
        (partial / "identity").write_bytes((tmp_path / "new.jsonl.partial/identity").read_bytes())
        (partial / "answers").write_bytes(content)
        done = run(talker, chats, tmp_path / f"{trial}.jsonl")
        assert (tmp_path / f"{trial}.jsonl").read_bytes() == whole.read_bytes()
        assert done.num_answers_now < 40


def test_the_same_command_again_changes_nothing(
    talker: Path, chats: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new.jsonl"
    first = run(talker, chats, out)
    monkeypatch.setattr(LocalAnswerer, "answer", None)
    again = run(talker, chats, out)
    assert again.num_answers_now == 0 and again.left_out == first.left_out and again.num_rows == first.num_rows
    assert out.read_bytes() == whole.read_bytes()
    out.write_text(out.read_text() + "{}\n")
    with pytest.raises(DflashError, match="has changed since"):
        run(talker, chats, out)


def test_other_settings_are_refused_field_by_field(talker: Path, chats: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"(?s)limit .*max_new_tokens") as refusal:
        run(talker, chats, whole, max_new_tokens=MOST + 1, limit=3)
    assert "temperature" not in str(refusal.value) and "target" not in str(refusal.value)
    partial = tmp_path / "new.jsonl.partial"
    partial.mkdir()
    provenance = json.loads(Path(f"{whole}.provenance").read_text())
    Path(f"{whole}.provenance").rename(tmp_path / "aside")
    with pytest.raises(DflashError, match="was not made by"):
        run(talker, chats, whole)
    (tmp_path / "aside").rename(f"{whole}.provenance")
    assert provenance["identity"]["target"]["end_ids"] == [2, *range(60, 100)]


CHANGED: dict[str, Any] = {
    "input_format": "messages",
    "limit": 3,
    "skip_bad_rows": True,
    "dtype": "bfloat16",
    "attn_implementation": "eager",
    "device_map": "auto",
    "batch_rows": 5,
    "max_new_tokens": MOST + 1,
    "keep_rewritten": False,
    "stop_after_rejected": 3,
    "temperature": 0.5,
    "chat_template_kwargs": {"a": 1},
    "trust_remote_code": True,
    "concurrency": 3,
    "timeout_s": 9.0,
    "row_tries": 3,
    "backoff_s": 3.0,
    "server_tries": 3,
    "rest_s": 3.0,
    "rests": 3,
}
"""Another value of each setting."""
NAMED = {"data", "out", "target", "revision", "device", "servers", "model"}
"""Settings that name what is compared by its content, or where it is or runs."""
DRAWN = {"top_p", "top_k", "min_p", "seed"}
"""Settings of what is drawn, which nothing is at temperature 0."""


def test_every_setting_is_tried_on_what_was_made_with_another() -> None:
    groups = {name: option.group for name, option in options(RegenerateConfig).items()}
    elsewhere = {name for name, group in groups.items() if group in ("Engine", "Ray")}
    # The engine's are tried by test_engine_answers.py, those of workers on Ray by tests/cluster/test_pool.py.
    assert groups.keys() - elsewhere == CHANGED.keys() | NAMED | DRAWN
    assert {options(RegenerateConfig)[name].role for name, group in groups.items() if group == "Ray"} == {"free"}
    assert {options(RegenerateConfig)[name].role for name in DRAWN} == {"identity"}


@pytest.mark.parametrize("name", CHANGED)
def test_only_a_free_setting_may_be_another_when_the_command_is_repeated(
    talker: Path, chats: Path, whole: Path, name: str
) -> None:
    if options(RegenerateConfig)[name].role == "free":
        assert run(talker, chats, whole, **{name: CHANGED[name]}).num_answers_now == 0
    else:
        with pytest.raises(MismatchError, match=name):
            run(talker, chats, whole, **{name: CHANGED[name]})


def test_a_folder_that_another_command_works_on_is_left_alone(talker: Path, chats: Path, tmp_path: Path) -> None:
    partial = tmp_path / "new.jsonl.partial"
    partial.mkdir()
    (partial / LOCK).touch()
    with held_by_another_process(partial / LOCK), pytest.raises(DflashError, match="by another command"):
        run(talker, chats, tmp_path / "new.jsonl")


def test_drawn_answers_depend_on_the_seed_and_the_row_alone(talker: Path, chats: Path, tmp_path: Path) -> None:
    def drawn(name: str, **more: Any) -> Rows:
        run(talker, chats, tmp_path / name, temperature=0.8, top_p=0.95, **more)
        return read(tmp_path / name)

    first = drawn("a.jsonl", seed=1, batch_rows=3)
    assert drawn("b.jsonl", seed=1, batch_rows=7) == first  # other rows beside each row
    assert drawn("c.jsonl", seed=1, batch_rows=3, limit=20) == [
        row for row in first if int(row["source"].split(":")[1]) <= 20
    ]
    assert drawn("d.jsonl", seed=2, batch_rows=3) != first


def test_own_draws_are_distributed_as_the_rule_says() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5]).repeat(4000, 1)
    rule = SamplingRule(temperature=0.7, top_p=0.9, top_k=3, min_p=0.1)
    kept = OwnDraws(rule, list(range(4000)))(torch.zeros(4000, 1, dtype=torch.long), logits)
    assert (kept.isfinite().sum(dim=-1) == 1).all()
    shares = torch.bincount(kept.argmax(dim=-1), minlength=5) / 4000
    wanted = rule.probabilities(logits[0])
    assert torch.allclose(shares, wanted, atol=0.03) and not shares[wanted == 0].any()


def test_rows_that_cannot_be_answered_anew_are_counted_and_named(talker: Path, tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "two cats"}, {"role": "assistant", "content": "x"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows: Rows = [
        {"messages": [user, assistant], "kind": "pets", "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": [user, call, {"role": "tool", "content": "3"}, assistant]},
        {"text": "one bird"},
        {"input_ids": [1, 2], "loss_mask": [0, 1]},
        {"conversations": [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "a dog"}]},
        {"conversations": [{"from": "human", "value": "a dog"}, {"from": "gpt", "value": "hello"}]},
        {"prompt": "one", "response": "two", "system": "three"},
        {"messages": [user]},
        {"messages": [user, assistant, assistant, user]},
        {"messages": [{"role": "user", "content": "a " * 1200}, assistant]},
        {"messages": [{"role": "system", "content": "s"}, assistant]},
    ]
    data, out = save(tmp_path / "chats.jsonl", rows), tmp_path / "new.jsonl"
    done = run(talker, data, out, max_new_tokens=400)
    why = {
        3: "plain text",
        4: "tokens without text",
        5: "no user turn before the first answer",
        10: "prompt too long",
        11: "no user turn before the first answer",
    }
    named = {one["row"]: one["reason"] for one in read(Path(f"{out}.rejects"))}
    answered = {int(row["source"].split(":")[1]): row for row in read(out)}
    assert {row: reason for row, reason in named.items() if row in why} == why
    assert set(named) | set(answered) == set(range(1, 12)) and done.num_rows == len(answered) >= 3
    for row in (7, 8, 9):  # what stands before each answer is kept; a turn that nobody answered is answered
        if row in answered:
            roles = [message["role"] for message in answered[row]["messages"]]
            system = ["system"] if row == 7 else []
            assert roles == [*system, *["user", "assistant"] * (1 + (row == 9))]
    if 2 in answered:  # the target makes no such call, so that its result is nobody's
        assert [message["role"] for message in answered[2]["messages"]] == ["user", "assistant"]
    assert answered[1]["kind"] == "pets" and answered[1]["tools"] == rows[0]["tools"]


def test_bad_rows_stop_before_anything_is_asked_unless_they_are_skipped(talker: Path, tmp_path: Path) -> None:
    good = [json.dumps(row) for row in conversations(5)]
    bad = ["nonsense", '{"a": 1}', '{"messages": [{"role": "user", "content": "a", "name": "\\ud800"}]}']
    data, out = tmp_path / "chats.jsonl", tmp_path / "new.jsonl"
    data.write_text("\n".join([*good[:2], *bad, *good[2:]]))
    with pytest.raises(BadInputError, match=r"(?s)3 bad rows:.*jsonl:3 is not JSON.*:4 has none.*:5 .*surrogate"):
        run(talker, data, out)
    done = run(talker, data, out, skip_bad_rows=True)
    assert done.left_out["bad row"] == 3
    assert [one["row"] for one in read(done.rejects) if one["reason"] == "bad row"] == [3, 4, 5]


def test_what_is_made_is_extracted_row_by_row(talker: Path, chats: Path, tmp_path: Path) -> None:
    new, cache = tmp_path / "new.jsonl", tmp_path / "cache"
    flags = ["--batch-rows", 4, "--max-new-tokens", MOST, "--device", "cpu", "--keep-rewritten"]
    made = dflash("regenerate", chats, "--target", talker, "--out", new, *flags)
    assert made.exit_code == 0, made.output
    assert f"dflash extract {new} --target {talker}" in made.stdout and "left out" in made.stdout
    told = json.loads(dflash("regenerate", chats, "--target", talker, "--out", new, *flags, "--json").stdout)
    assert told["num_rows"] == len(read(new)) and told["rejects"] == f"{new}.rejects"
    extracted = dflash("extract", new, "--target", talker, "--out", cache, "--block-size", 2, "--json")
    assert extracted.exit_code == 0, extracted.output
    assert json.loads(extracted.stdout)["samples"] == told["num_rows"]


def test_settings_that_cannot_be_used_are_named_all_at_once(talker: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.jsonl"
    refused(dflash("regenerate", chats, "--out", out), "Nothing is given that could answer")
    refused(dflash("regenerate", chats, "--out", out, "--server", "http://a"), "has no name")
    refused(dflash("regenerate", chats, "--out", out, "--target", "a", "--model", "b"), "no server is given")
    flags = ["--server", "ftp://x", "--server", "http://[", "--temperature", -1, "--batch-rows", 0, "--timeout-s", 0]
    said = ["'ftp://x'", "'http://['", "temperature is -1", "batch_rows is 0", "timeout_s is 0", "ends in .jsonl"]
    refused(dflash("regenerate", chats, "--target", "t", "--out", tmp_path / "new", *flags), *said)
    refused(dflash("regenerate", chats, "--target", talker, "--out", chats), "itself among the data")
    (tmp_path / "mine.jsonl").write_text("mine")
    refused(dflash("regenerate", chats, "--target", talker, "--out", tmp_path / "mine.jsonl"), "was not made by")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl"]


def test_a_target_without_any_answer_says_why_and_leaves_no_file(talker: Path, tmp_path: Path) -> None:
    data = save(tmp_path / "chats.jsonl", [{"text": "one"}, {"text": "two"}])
    with pytest.raises(BadInputError, match=r"(?s)No row of .* 2 rows: plain text"):
        run(talker, data, tmp_path / "new.jsonl")
    assert not (tmp_path / "new.jsonl").exists()
