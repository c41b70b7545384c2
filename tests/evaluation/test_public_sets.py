"""Public sets of prompts by name: from a hub that stands in for the real one, and from copies of the same columns."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from running import dflash
from tiny_decoding import random_draft, tiny_target

from dflash_offline.schemas.errors import BadInputError
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.stages.conversations.prompts import read_prompts
from dflash_offline.stages.draft.decode import plain_decode
from dflash_offline.stages.evaluate import evaluate

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": f"How many is {i}?", "answer": f"#### {i}"} for i in range(5)],
    "math500": [
        {"problem": "Find $x$.", "solution": "s", "answer": "1", "subject": "Algebra", "level": 1, "unique_id": "u"}
    ],
    "humaneval": [
        {"task_id": "H/0", "prompt": "def f(x):\n", "canonical_solution": "", "test": "", "entry_point": "f"}
    ],
    "mbpp": [
        {
            "source_file": "a",
            "task_id": 2,
            "prompt": "Write f.",
            "code": "",
            "test_imports": [],
            "test_list": ["assert"],
        }
    ],
    "mt-bench": [
        {"prompt": ["w1 w2", "w3 w4"], "prompt_id": 81, "category": "writing", "reference": []},
        {"prompt": ["w5"], "prompt_id": 82, "category": "math", "reference": []},
    ],
    "alpaca": [
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "t"},
        {"instruction": "Sing.", "input": "", "output": "la", "text": "t"},
    ],
}
ASKED = {
    "gsm8k": [f"How many is {i}?\n{BOXED}" for i in range(5)],
    "math500": [f"Find $x$.\n{BOXED}"],
    "humaneval": [
        "Write a solution to the following problem and make sure that it passes the tests:\n```python\ndef f(x):\n\n```"
    ],
    "mbpp": ["Write f."],
    "mt-bench": ["w1 w2", "w5"],
    "alpaca": ["Add.\n\nInput:\n1 and 2", "Sing."],
}
"""Worked out by hand from the reference benchmark's forms."""
FILES = {
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "humaneval": ("openai/openai_humaneval", None, "test"),
    "mbpp": ("google-research-datasets/mbpp", "sanitized", "test"),
    "mt-bench": ("HuggingFaceH4/mt_bench_prompts", None, "train"),
    "alpaca": ("tatsu-lab/alpaca", None, "train"),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The `datasets` library with a hub behind it; what it was asked for."""
    asked: list[dict[str, Any]] = []

    def load_dataset(dataset: str, config: str | None = None, *, split: str, revision: str) -> list[dict[str, Any]]:
        asked.append({"dataset": dataset, "config": config, "split": split, "revision": revision})
        (name,) = [name for name, place in FILES.items() if place == (dataset, config, split)]
        return ROWS[name]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    return asked


def contents(path: str, limit: int | None = None, seed: int = 0) -> list[str]:
    return [str((one.messages or [])[-1]["content"]) for one in read_prompts(Path(path), limit, seed)]


@pytest.mark.parametrize("name", ROWS)
def test_a_set_is_asked_as_the_reference_asks_it(name: str, hub: list[dict[str, Any]], tmp_path: Path) -> None:
    assert contents(name) == ASKED[name]
    ((asked),) = hub
    assert (asked["dataset"], asked["config"], asked["split"]) == FILES[name] and len(asked["revision"]) == 40
    parquet.write_table(pa.Table.from_pylist(ROWS[name]), tmp_path / "copy.parquet")
    (tmp_path / "copy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    for file in ("copy.parquet", "copy.jsonl"):
        assert contents(f"{name}:{tmp_path / file}") == ASKED[name]
    assert len(hub) == 1, "a copy needs no hub"
    prompts = read_prompts(Path(name))
    kinds = {"math500": ["Algebra"], "mt-bench": ["writing", "math"]}
    assert [one.kind for one in prompts] == kinds.get(name, [None] * len(prompts))
    assert [one.then for one in prompts] == ([("w3 w4",), ()] if name == "mt-bench" else [()] * len(prompts))


@pytest.mark.usefixtures("hub")
def test_the_seed_draws_the_first_prompts() -> None:
    some = contents("gsm8k", 3)
    assert some == contents("gsm8k", 3) and len(set(some)) == 3
    assert contents("gsm8k", 2) == some[:2]
    assert any(contents("gsm8k", 3, seed) != some for seed in range(1, 4))
    assert contents("gsm8k", 5) == contents("gsm8k", 9) == ASKED["gsm8k"], "all of them stay in order"


def test_a_file_of_a_sets_name_is_a_file(hub: list[dict[str, Any]]) -> None:
    Path("gsm8k").write_text('{"prompt": "mine"}\n')
    assert [one.text for one in read_prompts(Path("gsm8k"))] == ["mine"]
    assert not hub


@pytest.mark.parametrize("library", [None, "broken"])
def test_without_the_hub_it_says_what_to_fetch_and_how_to_use_it(
    library: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", library and SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInputError) as caught:
        read_prompts(Path("gsm8k"))
    said = str(caught.value)
    assert ("pip install 'dflash-offline[hub]'" if library is None else "no network") in said
    assert "hf download openai/gsm8k main/test-00000-of-00001.parquet --repo-type dataset --revision 740312a" in said
    name, _, file = said.split("--prompts ")[1].partition(":")
    copy = tmp_path / file
    copy.parent.mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(ROWS["gsm8k"]), copy)
    assert contents(f"{name}:{copy}") == ASKED["gsm8k"], "the copy that the message names is read"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gsm-8k", r"no public set of prompts; expected a file, or one of gsm8k, .*\. Did you mean gsm8k\?"),
        ("prompts.jsonl", "prompts.jsonl cannot be read"),
        ("mbpp:copy.jsonl", r"copy.jsonl:1 has no prompt \(its columns: question, answer\); expected a row of google"),
        ("gsm8k:nowhere.jsonl", "nowhere.jsonl cannot be read"),
        ("mt-bench:empty.jsonl", "empty.jsonl:1 holds no text to ask"),
    ],
)
def test_what_is_no_set_and_no_copy_of_one_is_refused(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("copy.jsonl").write_text(json.dumps(ROWS["gsm8k"][0]) + "\n")
    Path("empty.jsonl").write_text('{"prompt": []}\n')
    with pytest.raises(BadInputError, match=said):
        read_prompts(Path(name))


class Words:
    """A tokenizer and chat template of the words w0, w1, ...; every token it writes is a word."""

    eos_token_id, name_or_path = None, "words"

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> str:
        return " w90 ".join(one["content"] for one in messages) + " w91"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(f"w{i}" for i in ids)


@pytest.mark.usefixtures("hub")
def test_a_second_turn_follows_the_targets_answer_to_the_first() -> None:
    target, words = tiny_target("qwen3"), Words()
    config = EvalConfig(draft=Path("d"), target="t", prompts=Path("mt-bench"), max_new_tokens=5, keep_rounds=True)
    found = evaluate(config, target=target, tokenizer=words, draft=random_draft())
    first = [1, 2, 91]
    answer = plain_decode(target, first, 5, ()).tokens
    assert found.decoded is not None
    assert [list(one.prompt_ids) for one in found.decoded] == [first, [1, 2, 90, *answer, 90, 3, 4, 91], [5, 91]]
    assert [one.prompt for one in found.decoded] == ["mt-bench:1", "mt-bench:1, turn 2", "mt-bench:2"]
    assert {kind: one.prompts for kind, one in found.acceptance_by_kind.items()} == {"writing": 2, "math": 1}
    assert found.prompt_set is not None and found.prompt_set["revision"] == "e3a795c5e9a82ee40611c416b8a7786c73198991"
    assert found.prompts_shown == "mt-bench, HuggingFaceH4/mt_bench_prompts at e3a795c5e9a8"


def test_the_command_reads_a_copy_and_records_its_bytes(target: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["gsm8k"]))
    shown = dflash(
        *("eval", run, "--target", target, "--prompts", f"gsm8k:{tmp_path / 'copy.jsonl'}", "--num-prompts", 2),
        *("--max-new-tokens", 2, "--json", "--quiet", "--device", "cpu"),
    )
    found = json.loads(shown.stdout)
    assert found["acceptance"]["prompts"] == 2 and found["prompt_set"]["name"] == "gsm8k"
    assert len(found["prompt_set"]["sha256"]) == 64 and "revision" not in found["prompt_set"]
