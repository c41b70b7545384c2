"""An evaluation of a draft by real decoding of tiny models, every figure counted again from the rounds it kept."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_decoding import HIDDEN, MASK, VOCAB, OracleDraft, fitted_draft, random_draft, tiny_target
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dflash_offline.pipeline.commands.evaluate import print_report
from dflash_offline.pipeline.pages.eval_page import write_eval_page
from dflash_offline.schemas.errors import BadInputError, DflashError, MismatchError
from dflash_offline.schemas.evaluation import EvalResult
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.stages.conversations.prompts import encode_prompt, read_prompts
from dflash_offline.stages.draft.decode import plain_decode
from dflash_offline.stages.draft.losslessness import compare_answers
from dflash_offline.stages.draft.pairing import check_draft_fits
from dflash_offline.stages.draft.weights import draft_state_dict
from dflash_offline.stages.evaluate import evaluate, evaluate_folder, stop_ids

LIMIT = 20
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant {{ mood }}{% endif %}"
)


def word_tokenizer() -> Any:
    """Return a tokenizer of w0 ... w91, the roles, and a last token for everything else."""
    words = [f"w{i}" for i in range(VOCAB - 4)] + ["user", "assistant", "system", "?"]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def ask(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


PROMPTS = [
    {**ask("w1 w2 w3 w4"), "kind": "short"},
    {**ask("w5 w6", "w7", "w8 w9"), "kind": "long"},
    {"prompt": "w10 w11 w12 w13 w14"},
    {**ask("w1 w2 w3 w4", "w20 w21"), "kind": "short"},
]


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_target("qwen3")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


@pytest.fixture(scope="module")
def draft(target: PreTrainedModel, tokenizer: Any) -> nn.Module:
    return fitted_draft(target, [tokenizer("user w1 w2 w3 w4 assistant")["input_ids"]], steps=200)


def settings(path: Path, **changes: Any) -> EvalConfig:
    given: dict[str, Any] = {"draft": Path("draft"), "target": "target", "prompts": path, "max_new_tokens": LIMIT}
    return EvalConfig(**(given | changes))


@pytest.fixture(scope="module")
def result(target: Any, tokenizer: Any, draft: Any, tmp_path_factory: pytest.TempPathFactory) -> EvalResult:
    path = write_lines(tmp_path_factory.mktemp("eval") / "prompts.jsonl", PROMPTS)
    config = settings(path, prompt_lookup=True, keep_rounds=True)
    return evaluate(config, target=target, tokenizer=tokenizer, draft=draft)


class Recorder:
    """Writes down what it is told of the progress."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def say(self, text: str) -> None:
        self.events.append(text)

    def start(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        self.events.append(f"start {total} {unit}")

    def advance(self, amount: int, **figures: str) -> None:
        self.events.append("advance")

    def finish(self) -> None:
        self.events.append("finish")


def encoded(tokenizer: Any, path: Path) -> list[list[int]]:
    return [encode_prompt(prompt, tokenizer, {}) for prompt in read_prompts(path)]


def slow_answer(target: Any, ids: list[int]) -> list[int]:
    """Return the target's greedy answer, the whole text read again for every token."""
    text = list(ids)
    with torch.inference_mode():
        for _ in range(LIMIT):
            text.append(int(target(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(ids) :]


def test_the_kept_rounds_make_up_the_targets_own_answers(result: EvalResult, target: Any, tokenizer: Any) -> None:
    assert result.decoded is not None
    assert [list(one.prompt_ids) for one in result.decoded] == encoded(tokenizer, result.config.prompts)
    for one in result.decoded:
        assert list(one.answer) == slow_answer(target, list(one.prompt_ids)) and one.identical
        at = 1
        for drafted, accepted, produced in zip(one.drafted, one.accepted, one.produced, strict=True):
            assert drafted[:accepted] == one.answer[at : at + accepted]
            own = at + accepted
            assert produced == accepted + (own < LIMIT), "the target adds a token unless the answer is complete"
            assert own == LIMIT or accepted == len(drafted) or drafted[accepted] != one.answer[own]
            assert len(drafted) == min(7, LIMIT - at)
            at += produced
        assert at == LIMIT


def test_the_figures_are_those_of_the_kept_rounds_counted_one_by_one(result: EvalResult, target: Any) -> None:
    assert result.decoded is not None
    lengths, drafted, accepted, means, short = [0] * 8, [0] * 7, [0] * 7, [], 0
    nll = 0.0
    for one in result.decoded:
        means.append((LIMIT - 1) / len(one.produced))
        short += len(one.produced) * (one.kind == "short")
        for tokens, right, block in zip(one.produced, one.accepted, one.drafted, strict=True):
            lengths[tokens - 1] += 1
            for slot in range(len(block)):
                drafted[slot] += 1
                accepted[slot] += slot < right
        with torch.inference_mode():
            logits = target(torch.tensor([[*one.prompt_ids, *one.answer]])).logits[0, len(one.prompt_ids) - 1 : -1]
        nll += float(nn.functional.cross_entropy(logits, torch.tensor(one.answer), reduction="sum"))
    rounds = sum(lengths)
    assert sum(lengths[2:]) and sum(lengths[:2]), "the fitted draft is to be right sometimes and wrong sometimes"
    assert (result.acceptance.prompts, result.acceptance.rounds) == (4, rounds)
    assert result.acceptance.tokens == 4 * (LIMIT - 1)
    assert result.acceptance.pooled == pytest.approx(4 * (LIMIT - 1) / rounds)
    assert result.acceptance.mean == pytest.approx(sum(means) / 4)
    assert list(result.acceptance_by_kind) == ["long", "short"]
    assert (result.acceptance_by_kind["short"].prompts, result.acceptance_by_kind["short"].rounds) == (2, short)
    assert result.rounds_by_tokens == tuple(lengths)
    assert (result.drafted_by_slot, result.accepted_by_slot) == (tuple(drafted), tuple(accepted))
    assert (result.drafted_tokens, result.accepted_tokens) == (sum(drafted), sum(accepted))
    assert result.tokens_per_call == pytest.approx(4 * LIMIT / (4 + rounds))
    assert result.nll == pytest.approx(nll / (4 * LIMIT), rel=1e-5)
    assert (result.identical, result.differences, result.lossless) == (4, (), True)
    assert result.speedup == pytest.approx(result.speculative_tokens_per_s / result.plain_tokens_per_s)
    assert (result.device, result.dtype) == ("cpu", "float32")


def test_the_result_becomes_json(result: EvalResult) -> None:
    document = json.loads(json.dumps(result.to_json()))
    assert document["config"]["prompts"] == str(result.config.prompts)
    assert document["rounds_by_tokens"] == list(result.rounds_by_tokens)
    assert document["acceptance"]["pooled"] == result.acceptance.pooled


def test_the_report_fits_eighty_columns(result: EvalResult, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(result)
    text = capsys.readouterr().out
    body = text.split("\n", 2)[2]
    assert max(map(len, body.splitlines())) <= 80
    assert "\x1b" not in text
    assert re.search(rf"all prompts +{result.acceptance.pooled:.2f} +{result.acceptance.mean:.2f} +4 ", text)
    assert "identical answers: 4 of 4" in text and "NOT" not in text


def test_the_two_ways_take_turns_after_one_prompt_that_is_not_counted(
    target: Any, tokenizer: Any, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "p", PROMPTS)
    lengths: list[int] = []
    handle = target.model.embed_tokens.register_forward_pre_hook(lambda _, ids: lengths.append(ids[0].shape[1]))
    config = settings(path, limit=3, max_new_tokens=2)
    found = evaluate(config, target=target, tokenizer=tokenizer, draft=random_draft())
    handle.remove()
    short, long, text = map(len, encoded(tokenizer, path)[:3])
    # Of two tokens the first comes with the prompt; the target alone then reads one, with a draft a block of two.
    warm_up = [short, 1, short, 2]
    assert lengths[-16:] == [*warm_up, short, 1, short, 2, long, 2, long, 1, text, 1, text, 2]
    assert found.acceptance.prompts == 3


@pytest.fixture
def saved(target: Any, tokenizer: Any, draft: Any, tmp_path: Path) -> EvalConfig:
    """Settings that name target and draft by their folders."""
    for part in (target, tokenizer):
        part.save_pretrained(tmp_path / "target")
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text(json.dumps(draft.config.to_json()))
    save_file(draft_state_dict(draft, draft.config), tmp_path / "draft" / "model.safetensors")
    path = write_lines(tmp_path / "p", PROMPTS)
    return settings(path, draft=tmp_path / "draft", target=str(tmp_path / "target"), device="cpu")


def test_target_and_draft_are_loaded_from_their_folders(
    saved: EvalConfig, target: Any, tokenizer: Any, draft: Any
) -> None:
    shown = Recorder()
    found = evaluate_folder(saved, shown)
    in_memory = evaluate(saved, target=target, tokenizer=tokenizer, draft=draft)
    assert found.rounds_by_tokens == in_memory.rounds_by_tokens
    assert found.nll == pytest.approx(in_memory.nll, rel=1e-5)
    assert shown.events == ["start 4 prompts", "advance", "advance", "advance", "advance", "finish"]


def test_a_bad_prompt_file_is_named_before_the_weights_are_read(saved: EvalConfig, tmp_path: Path) -> None:
    weights = Path(str(saved.target)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(BadInputError, match="1 bad row"):
        evaluate_folder(replace(saved, prompts=write_lines(tmp_path / "bad", ["{"])))
    with pytest.raises(Exception, match=r"(?i)safetensors|weights|incomplete"):
        evaluate_folder(saved)


def test_answers_of_one_token_have_no_speed_and_no_acceptance(
    target: Any, tokenizer: Any, draft: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(write_lines(tmp_path / "p", PROMPTS), max_new_tokens=1)
    found = evaluate(config, target=target, tokenizer=tokenizer, draft=draft)
    assert (found.plain_tokens_per_s, found.speedup, found.acceptance.pooled) == (None, None, None)
    assert found.tokens_per_call == 1.0
    print_report(found)
    assert "all prompts             -" in capsys.readouterr().out


def test_a_target_that_answers_otherwise_in_a_block_is_not_lossless(
    target: Any, tokenizer: Any, draft: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "p.jsonl", PROMPTS[:1])
    ids = encoded(tokenizer, path)[0]
    answer = slow_answer(target, ids)
    wrong = next(token for token in range(MASK) if token not in answer)

    def faulty(head: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits + 100.0 * (torch.arange(VOCAB) == wrong) if logits.shape[1] > 1 else logits

    handle = target.get_output_embeddings().register_forward_hook(faulty)
    try:
        found = evaluate(settings(path), target=target, tokenizer=tokenizer, draft=draft)
    finally:
        handle.remove()
    (difference,) = found.differences
    assert (found.lossless, found.identical, difference.prompt) == (False, 0, f"{path}:1")
    assert (difference.position, difference.plain_token, difference.speculative_token) == (1, answer[1], wrong)
    with torch.inference_mode():
        logits = target(torch.tensor([ids + answer[:1]])).logits[0, -1]
    assert difference.gap == pytest.approx(float(logits.max() - logits[wrong]), rel=1e-4)
    assert difference.tolerance is not None and difference.gap > difference.tolerance and not difference.tie
    print_report(found)
    assert f"{path}:1, token 1: NOT A TIE" in capsys.readouterr().out


def test_a_tie_to_rounding_is_lossless(tokenizer: Any, draft: Any, tmp_path: Path) -> None:
    target = tiny_target("qwen3")
    path = write_lines(tmp_path / "p.jsonl", PROMPTS[:1])
    answer = slow_answer(target, encoded(tokenizer, path)[0])
    twin = next(token for token in range(MASK) if token not in answer)
    head = target.get_output_embeddings()
    head.weight[twin] = head.weight[answer[1]]

    def rounded(head: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        other = logits.clone()
        to = torch.full_like(logits[..., twin], math.inf if logits.shape[1] > 1 else -math.inf)
        other[..., twin] = torch.nextafter(logits[..., answer[1]], to)
        return other

    head.register_forward_hook(rounded)
    found = evaluate(settings(path), target=target, tokenizer=tokenizer, draft=draft)
    (difference,) = found.differences
    assert (difference.position, difference.plain_token, difference.speculative_token) == (1, answer[1], twin)
    assert difference.tie and found.lossless and found.identical == 0


def test_an_answer_that_ends_early_is_no_tie(target: Any) -> None:
    answer = slow_answer(target, [1, 2, 3])
    cut = compare_answers(target, "p:1", [1, 2, 3], answer, answer[:-2])
    assert cut is not None and (cut.position, cut.plain_token) == (LIMIT - 2, answer[-2])
    assert (cut.speculative_token, cut.gap, cut.tolerance, cut.tie) == (None, None, None, False)
    assert compare_answers(target, "p:1", [1, 2, 3], answer, answer) is None


def test_a_draft_for_another_target_is_refused_with_every_difference(target: Any, draft: Any) -> None:
    wrong = vars(draft.config) | {"hidden_size": 32, "num_target_layers": 9, "vocab_size": 200, "mask_token_id": 150}
    with pytest.raises(MismatchError) as caught:
        check_draft_fits(type(draft.config)(**wrong), target)
    rows = [line.split() for line in str(caught.value).splitlines()[1:-1]]
    assert rows == [
        ["hidden_size", "draft:", "32", "target:", str(HIDDEN)],
        ["vocab_size", "draft:", "200", "target:", "96"],
        ["num_target_layers", "draft:", "9", "target:", "6"],
        ["mask_token_id", "draft:", "150", "target:", "0", "to", "95"],
    ]
    check_draft_fits(draft.config, target)


def test_stop_tokens_come_from_the_target_then_from_the_tokenizer(target: Any, tokenizer: Any) -> None:
    class Named:
        eos_token_id = 4

    own = target.generation_config
    assert stop_ids(target, tokenizer) == frozenset()
    assert stop_ids(target, Named()) == {4}
    try:
        own.eos_token_id = 7
        assert stop_ids(target, Named()) == {7}
        own.eos_token_id = [7, 0]
        assert stop_ids(target, Named()) == {0, 7}
    finally:
        own.eos_token_id = None


def test_a_stop_token_ends_the_answers(target: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p", [PROMPTS[2]])
    ids = encoded(tokenizer, path)[0]
    whole = plain_decode(target, ids, LIMIT, ()).tokens
    end = next(i for i in range(5, LIMIT) if whole[i] not in whole[:i])
    target.generation_config.eos_token_id = whole[end]
    try:
        draft = OracleDraft(target, ids + whole)
        found = evaluate(settings(path), target=target, tokenizer=tokenizer, draft=draft)
    finally:
        target.generation_config.eos_token_id = None
    assert found.acceptance.tokens == end and found.lossless


def test_a_prompt_longer_than_the_target_is_refused(target: Any, tokenizer: Any, draft: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [PROMPTS[0], {"prompt": "w1 " * 500}])
    with pytest.raises(BadInputError, match=r"p\.jsonl:2 is 500 tokens long; with 20 more .* 512 positions"):
        evaluate(settings(path), target=target, tokenizer=tokenizer, draft=draft)


def test_the_number_of_threads_is_put_back(target: Any, tokenizer: Any, draft: Any, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    config = settings(write_lines(tmp_path / "p", PROMPTS[:1]), threads=before + 1, max_new_tokens=2)
    assert evaluate(config, target=target, tokenizer=tokenizer, draft=draft).threads == before + 1
    assert torch.get_num_threads() == before


def test_conversations_are_rendered_up_to_the_answer(tokenizer: Any, tmp_path: Path) -> None:
    system = {"role": "system", "content": "w30"}
    lines = [*PROMPTS, {"messages": [system, *ask("w1", "w2")["messages"]]}, "", {"prompt": "w3 zzz"}]
    prompts = read_prompts(write_lines(tmp_path / "p.jsonl", lines))
    texts = [tokenizer.decode(encode_prompt(prompt, tokenizer, {})) for prompt in prompts]
    assert texts == [
        "user w1 w2 w3 w4 assistant",
        "user w5 w6 assistant w7 user w8 w9 assistant",
        "w10 w11 w12 w13 w14",
        "user w1 w2 w3 w4 assistant",
        "system w30 user w1 assistant",
        "w3 ?",
    ]
    assert [prompt.kind for prompt in prompts[:4]] == ["short", "long", None, "short"]
    assert prompts[5].place == f"{tmp_path}/p.jsonl:7"
    assert tokenizer.decode(encode_prompt(prompts[0], tokenizer, {"mood": "w40"})) == "user w1 w2 w3 w4 assistant w40"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "p.jsonl:2 is not JSON"),
        ("[1]", "p.jsonl:2 is a JSON list; expected an object"),
        ('{"text": "w1"}', "p.jsonl:2 needs either 'messages' or 'prompt', and not both (its keys: text)"),
        ('{"prompt": "w1", "messages": []}', "and not both (its keys: messages, prompt)"),
        ('{"prompt": 3}', "p.jsonl:2 has a prompt of type int; expected text"),
        ('{"prompt": ""}', "p.jsonl:2 has an empty prompt"),
        ('{"prompt": "\\ud800"}', "p.jsonl:2 has a prompt with an unpaired surrogate at character 0"),
        ('{"prompt": "w1", "kind": 3}', "p.jsonl:2 has a kind of type int; expected text"),
        ('{"messages": "w1"}', "p.jsonl:2 has no list 'messages'"),
        ('{"messages": [{"role": "user"}]}', "p.jsonl:2 has messages[0].content of type NoneType; expected text"),
        ('{"messages": [{"role": "robot", "content": "w1"}]}', "p.jsonl:2 has messages[0].role 'robot'"),
        (json.dumps({"messages": [{"role": "assistant", "content": "w1"}]}), "p.jsonl:2 has only assistant turns"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write_lines(tmp_path / "p.jsonl", [PROMPTS[0], line])
    with pytest.raises(BadInputError) as caught:
        read_prompts(path)
    assert message in str(caught.value)
    assert '"prompt"' in str(caught.value).splitlines()[-1]
    assert len(read_prompts(path, limit=1)) == 1


def test_all_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", ["{", PROMPTS[0], '{"prompt": 3}'])
    with pytest.raises(BadInputError, match=r"(?s)^2 bad rows:.*p\.jsonl:1 .*p\.jsonl:3 "):
        read_prompts(path)


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"nowhere\.jsonl cannot be read: No such file"):
        read_prompts(tmp_path / "nowhere.jsonl")
    with pytest.raises(BadInputError, match=r"empty\.jsonl holds no prompt"):
        read_prompts(write_lines(tmp_path / "empty.jsonl", ["", "  "]))


def test_a_prompt_the_template_or_the_tokenizer_refuses_is_named(tokenizer: Any, tmp_path: Path) -> None:
    tool = {"messages": [{"role": "tool", "content": "w1"}]}
    refused, nothing = read_prompts(write_lines(tmp_path / "p.jsonl", [tool, {"prompt": "  "}]))
    with pytest.raises(BadInputError, match=r"p\.jsonl:1 cannot be rendered .* no tools here"):
        encode_prompt(refused, tokenizer, {})
    with pytest.raises(BadInputError, match=r"p\.jsonl:2 becomes no token at all"):
        encode_prompt(nothing, tokenizer, {})


def test_unusable_settings_are_reported_together() -> None:
    with pytest.raises(DflashError, match=r"(?s)limit is 0.*max_new_tokens is -1.*dtype is 'int8'"):
        settings(Path("p"), limit=0, max_new_tokens=-1, dtype="int8")


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0, 1e-6])
def test_a_temperature_that_logits_cannot_be_divided_by_is_refused(temperature: float) -> None:
    with pytest.raises(DflashError, match=r"temperature is .*; expected 0 \(greedy\), or 1e-05 or more"):
        settings(Path("p"), temperature=temperature)


def test_where_tokens_are_drawn_both_ways_of_drafting_are_measured_and_named(
    target: Any, tokenizer: Any, draft: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "p", PROMPTS)
    config = settings(path, temperature=0.8, keep_rounds=True)
    found = evaluate(config, target=target, tokenizer=tokenizer, draft=draft)
    greedy, drawn = found.proposals
    assert (greedy.name, drawn.name) == ("greedy", "drawn")
    assert (greedy.acceptance, greedy.acceptance_by_kind) == (found.acceptance, found.acceptance_by_kind)
    assert greedy.acceptance.rounds != drawn.acceptance.rounds, "two ways, two sets of rounds"
    assert drawn.acceptance.tokens == greedy.acceptance.tokens == 4 * (LIMIT - 1)
    assert drawn.speedup == pytest.approx(drawn.tokens_per_s / found.plain_tokens_per_s)
    # The rounds that are kept are the greedy ones: each block is the draft's best for the text before it.
    assert found.decoded is not None
    (one, *_), head = found.decoded, target.get_output_embeddings()
    with torch.inference_mode():
        states = target(torch.tensor([one.prompt_ids]), output_hidden_states=True).hidden_states
        block = torch.tensor([[one.answer[0], *[MASK] * 7]])
        hidden = draft(
            position_ids=torch.arange(len(one.prompt_ids) + 8)[None],
            noise_embedding=target.get_input_embeddings()(block),
            target_hidden=torch.cat([states[i + 1] for i in draft.config.target_layer_ids], dim=-1),
        )
        assert head(hidden)[0, 1:].argmax(dim=-1).tolist() == list(one.drafted[0])
    print_report(found)
    lines = capsys.readouterr().out.splitlines()
    for words, figures in (("taken greedily, as vLLM does", greedy), ("drawn from the draft", drawn)):
        (line,) = [line for line in lines if words in line]
        assert f"{figures.acceptance.pooled:.2f}" in line and f"{figures.tokens_per_s:.1f}" in line
    assert max(map(len, lines[2:])) <= 80
    page = tmp_path / "page.html"
    write_eval_page(found, page, lambda ids: " ".join(map(str, ids)))
    assert "taken greedily, as vLLM does" in page.read_text() and "drawn from the draft" in page.read_text()
    assert evaluate(settings(path), target=target, tokenizer=tokenizer, draft=draft).proposals == ()
