"""What `dflash eval --html` keeps of the rounds and shows of them: every token where it belongs."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_decoding import VOCAB, OracleDraft, random_prompts, tiny_target
from tiny_target import save_tokenizer
from transformers import PreTrainedModel

from dflash_offline.pipeline.pages import eval_page
from dflash_offline.pipeline.pages.eval_page import write_eval_page
from dflash_offline.pipeline.token_text import token_texts, visible
from dflash_offline.schemas.evaluation import DecodedPrompt, EvalResult
from dflash_offline.schemas.results.rounds import Acceptance
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.stages.draft.decode import plain_decode, speculative_decode

BLOCK, LIMIT = 8, 40


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_target("qwen3")


def test_kept_blocks_are_what_the_draft_proposed_token_by_token(target: PreTrainedModel) -> None:
    prompt = random_prompts(1)[0]
    answer = plain_decode(target, prompt, LIMIT, ()).tokens
    text, spoiled = prompt + answer, frozenset({14, 15, 22, 30, 31, 32, 45})
    draft = OracleDraft(target, text, BLOCK, spoiled)
    done = speculative_decode(target, draft, prompt, LIMIT, (), keep_blocks=True)
    assert done.tokens == answer and done.blocks is not None
    anchor = len(prompt)
    for block, produced in zip(done.blocks, done.produced, strict=True):
        places = range(anchor + 1, anchor + 1 + len(block))
        assert block == [(text[p] + (p in spoiled)) % VOCAB for p in places]
        anchor += produced
    assert [len(block) for block in done.blocks] == done.proposed
    plain = speculative_decode(target, draft, prompt, LIMIT, ())
    assert plain.blocks is None and plain.produced == done.produced


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


TEXTS = [
    "the red cat sees one dog",
    "naïve – “кот” 猫 🐈‍⬛ e\u0301",
    "a\n\n  b\t\x00\u202eabc",
    "\ufffd\ufffd x",
    "",
    "🐈" * 9,
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_texts_of_tokens_make_up_the_text_of_all(tokenizer: Any, text: str) -> None:
    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(ids, decode)
    assert len(texts) == len(ids) and "".join(texts) == text
    for cut in range(len(ids)):
        if not decode(ids[:cut]).endswith("\ufffd"):
            assert "".join(token_texts(ids[cut:], decode, ids[:cut])) == text[len(decode(ids[:cut])) :]


def test_token_texts_of_any_ids_are_those_of_a_straightforward_decoder(tokenizer: Any) -> None:
    """Bytes that make no character stay broken; nothing is lost and nothing comes twice."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(4, 260, (12,), generator=draw).tolist()
        whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        texts = token_texts(ids, lambda part: tokenizer.decode(part, clean_up_tokenization_spaces=False))
        assert "".join(texts).replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_characters_that_hide_or_reorder_are_written_out() -> None:
    assert (
        visible("a\u202eb\u200b\x00\ud800\U000e0001\u00a0é猫 \t")
        == "a\\u202eb\\u200b\\x00\\ud800\\U000e0001\\xa0é猫 \t"
    )
    assert visible("one\ntwo") == "one↵\ntwo"


def decoded(**changes: Any) -> DecodedPrompt:
    """Three rounds of blocks of four: two of three accepted, none, and one after which the answer is full."""
    fields: dict[str, Any] = {
        "prompt": "folder/prompts.jsonl:1",
        "kind": "letters",
        "prompt_ids": (1, 2),
        "answer": (10, 11, 12, 13, 14, 15),
        "drafted": ((11, 12, 99), (88, 77, 66), (15,)),
        "accepted": (2, 0, 1),
        "produced": (3, 1, 1),
        "identical": True,
    }
    return DecodedPrompt(**(fields | changes))


def result(*prompts: DecodedPrompt, **changes: Any) -> EvalResult:
    config = EvalConfig(draft=Path("draft"), target="target", prompts=Path("prompts.jsonl"), keep_rounds=True)
    acceptance = Acceptance(prompts=1, rounds=3, tokens=5, pooled=5 / 3, mean=5 / 3)
    fields: dict[str, Any] = {
        "config": config,
        "trained": None,
        "offline": False,
        "held_out": None,
        "block_size": 4,
        "acceptance": acceptance,
        "acceptance_by_kind": {"letters": acceptance},
        "rounds_by_tokens": (2, 0, 1, 0),
        "drafted_by_slot": (3, 2, 2),
        "accepted_by_slot": (2, 1, 0),
        "drafted_tokens": 7,
        "accepted_tokens": 3,
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "versions": {},
        "lossless": True,
        "decoded": prompts,
    }
    return EvalResult(**(fields | changes))


def decode(ids: list[int]) -> str:
    return "".join(f"<{i}>" for i in ids)


def data_of(page: Path) -> Any:
    found = re.search(r'<script type="application/json" id="prompts">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(found[1]) if found else None


def test_the_page_tells_accepted_rejected_and_the_targets_own_apart(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_eval_page(result(decoded()), page, decode)
    [prompt] = data_of(page)
    assert (prompt["first"], prompt["tokens"], prompt["place"]) == ("<10>", 6, "prompts.jsonl:1")
    assert [(r["texts"], r["accepted"], r["own"]) for r in prompt["rounds"]] == [
        (["<11>", "<12>", "<99>"], 2, "<13>"),
        (["<88>", "<77>", "<66>"], 0, "<14>"),
        (["<15>"], 1, None),
    ]
    assert prompt["acceptance"] == pytest.approx(5 / 3) and prompt["accepted_share"] == pytest.approx(3 / 7)
    text = page.read_text()
    for first_rejected, own in ((99, 13), (88, 14)):
        assert re.search(rf"“&lt;{first_rejected}&gt;” \({first_rejected}\)</td><td>“&lt;{own}&gt;”", text)
    assert "“&lt;77&gt;”" not in text, "what comes after a rejected token was never looked at"


def test_a_page_holds_as_many_prompts_as_fit_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, prompts = tmp_path / "page.html", [decoded(prompt=f"p:{i}") for i in range(40)]
    write_eval_page(result(*prompts), page, decode)
    assert len(data_of(page)) == 40 and "40 prompts." in page.read_text()
    monkeypatch.setattr(eval_page, "MOST_BYTES", 3000)
    write_eval_page(result(*prompts), page, decode)
    assert 0 < len(data_of(page)) < 10
    assert (
        f"The first {len(data_of(page))} of 40 prompts; the others would make the page too large." in page.read_text()
    )


def test_a_walk_without_a_target_has_a_page_of_figures_alone(tmp_path: Path) -> None:
    config = EvalConfig(draft=Path("draft"), cache=Path("cache"))
    page = tmp_path / "page.html"
    write_eval_page(result(config=config, offline=True, decoded=None), page)
    assert data_of(page) is None and "walked without a target" in page.read_text()


def test_an_answer_that_the_draft_changed_heads_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_eval_page(replace(result(decoded()), lossless=False), page, decode)
    assert "NOT LOSSLESS" in page.read_text().split("<h2>Where")[0]


def test_rounds_are_in_the_json_only_when_they_are_kept() -> None:
    assert result(decoded()).to_json()["decoded"][0]["drafted"] == [[11, 12, 99], [88, 77, 66], [15]]
    assert SimpleNamespace(**result(decoded=None).to_json()).decoded is None
