import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_decoding import HIDDEN, MASK, VOCAB, OracleDraft, fitted_draft, random_draft, tiny_target
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dflash_offline.pipeline.commands.evaluate import print_report
from dflash_offline.schemas.errors import BadInputError, DflashError, MismatchError
from dflash_offline.schemas.evaluation import EvalResult
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.stages import evaluate as evaluation
from dflash_offline.stages.conversations.prompts import encode_prompt, read_prompts
from dflash_offline.stages.draft.decode import (
    SpeculativeDecoding,
    plain_decode,
    prompt_lookup_decode,
    speculative_decode,
)
from dflash_offline.stages.draft.model import draft_state_dict
from dflash_offline.stages.evaluate import check_draft_fits, evaluate, evaluate_folder, stop_ids

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
    config = settings(path, prompt_lookup=True)
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


def test_the_figures_follow_from_the_decodings(result: EvalResult, target: Any, tokenizer: Any, draft: Any) -> None:
    prompts = encoded(tokenizer, result.config.prompts)
    plain = [plain_decode(target, ids, LIMIT, ()) for ids in prompts]
    rounds = [speculative_decode(target, draft, ids, LIMIT, ()) for ids in prompts]
    lookups = [prompt_lookup_decode(target, ids, LIMIT, (), 7) for ids in prompts]
    lengths = [n for r in rounds for n in r.produced]
    assert max(lengths) > 2, "the fitted draft is to be right sometimes"
    means = [sum(r.produced) / len(r.produced) for r in rounds]
    assert result.acceptance.pooled == pytest.approx(sum(lengths) / len(lengths))
    assert result.acceptance.mean == pytest.approx(sum(means) / 4)
    assert result.rounds_by_tokens == tuple(lengths.count(n) for n in range(1, 9))
    assert result.acceptance_by_kind["short"].rounds == len(rounds[0].produced) + len(rounds[3].produced)
    assert list(result.acceptance_by_kind) == ["long", "short"]
    assert result.nll == pytest.approx(-sum(sum(p.log_probs) for p in plain) / (4 * LIMIT), rel=1e-5)
    assert (result.drafted_tokens, result.accepted_tokens) == (
        sum(r.drafted for r in rounds),
        sum(r.accepted for r in rounds),
    )
    assert result.tokens_per_call == pytest.approx(4 * LIMIT / (4 + len(lengths)))
    assert result.prompt_lookup_tokens_per_call == pytest.approx(4 * LIMIT / sum(o.target_calls for o in lookups))
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
    target: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("plain_decode", "speculative_decode"):
        original = getattr(evaluation, name)

        def spy(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls.append(name.split("_")[0])
            return original(*args, **kwargs)

        monkeypatch.setattr(evaluation, name, spy)
    config = settings(write_lines(tmp_path / "p", PROMPTS), limit=3, max_new_tokens=2)
    found = evaluate(config, target=target, tokenizer=tokenizer, draft=random_draft())
    a, b = "plain", "speculative"
    assert calls == [a, b, a, b, b, a, a, b]
    assert found.acceptance.prompts == 3


def test_target_and_draft_are_loaded_from_their_folders(
    target: Any, tokenizer: Any, draft: Any, tmp_path: Path
) -> None:
    for part in (target, tokenizer):
        part.save_pretrained(tmp_path / "target")
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text(json.dumps(draft.config.to_json()))
    save_file(draft_state_dict(draft, draft.config), tmp_path / "draft" / "model.safetensors")
    path = write_lines(tmp_path / "p", PROMPTS)
    config = settings(path, draft=tmp_path / "draft", target=str(tmp_path / "target"), device="cpu")
    shown = Recorder()
    found = evaluate_folder(config, shown)
    in_memory = evaluate(config, target=target, tokenizer=tokenizer, draft=draft)
    assert found.rounds_by_tokens == in_memory.rounds_by_tokens
    assert found.nll == pytest.approx(in_memory.nll, rel=1e-5)
    assert shown.events == ["start 4 prompts", "advance", "advance", "advance", "advance", "finish"]


def test_a_bad_prompt_file_is_named_before_the_weights_are_read(
    target: Any, tokenizer: Any, draft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "open_target", lambda *args, **kwargs: SimpleNamespace(config=target.config))
    monkeypatch.setattr(evaluation, "load_draft", lambda *args: draft)
    monkeypatch.setattr(evaluation, "load_model", lambda *args, **kwargs: pytest.fail("read the weights"))
    with pytest.raises(BadInputError, match="1 bad row"):
        evaluate_folder(settings(write_lines(tmp_path / "p", ["{"])))


def test_answers_of_one_token_have_no_speed_and_no_acceptance(
    target: Any, tokenizer: Any, draft: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(write_lines(tmp_path / "p", PROMPTS), max_new_tokens=1)
    found = evaluate(config, target=target, tokenizer=tokenizer, draft=draft)
    assert (found.plain_tokens_per_s, found.speedup, found.acceptance.pooled) == (None, None, None)
    assert found.tokens_per_call == 1.0
    print_report(found)
    assert "all prompts             -" in capsys.readouterr().out


def test_a_wrong_token_is_not_lossless(
    target: Any, tokenizer: Any, draft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def faulty(
        target: Any, draft: Any, ids: list[int], limit: int, stops: frozenset[int], chooser: None, **kwargs: Any
    ) -> SpeculativeDecoding:
        right = speculative_decode(target, draft, ids, limit, stops)
        tokens = list(right.tokens)
        if len(ids) == 5 and ids[0] == 10:
            tokens[6] = (tokens[6] + 1) % MASK
        elif len(ids) == 6:
            tokens = tokens[:-2]
        return SpeculativeDecoding(**(vars(right) | {"tokens": tokens}))

    monkeypatch.setattr(evaluation, "speculative_decode", faulty)
    path = write_lines(tmp_path / "p.jsonl", PROMPTS)
    found = evaluate(settings(path, limit=3), target=target, tokenizer=tokenizer, draft=draft)
    assert not found.lossless and found.identical == 3 - len(found.differences)
    changed = next(d for d in found.differences if d.prompt == f"{path}:3")
    assert (changed.position, changed.tie) == (6, False)
    assert changed.gap is not None and changed.tolerance is not None and changed.gap > changed.tolerance
    cut = next(d for d in found.differences if d.prompt == f"{path}:1")
    assert (cut.position, cut.speculative_token, cut.gap, cut.tie) == (LIMIT - 2, None, None, False)
    print_report(found)
    assert f"{path}:3, token 6: NOT A TIE" in capsys.readouterr().out


def test_a_tie_to_rounding_is_lossless(
    tokenizer: Any, draft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny_target("qwen3")
    path = write_lines(tmp_path / "p.jsonl", PROMPTS)
    ids = encoded(tokenizer, path)[0]
    answer = plain_decode(target, ids, LIMIT, ()).tokens
    twin = next(token for token in range(MASK) if token not in answer)
    head = target.get_output_embeddings().weight
    head[twin] = head[answer[0]]

    def other_twin(
        target: Any, draft: Any, ids: list[int], limit: int, stops: frozenset[int], chooser: None, **kwargs: Any
    ) -> SpeculativeDecoding:
        right = speculative_decode(target, draft, ids, limit, stops)
        swap = {answer[0]: twin, twin: answer[0]}
        return SpeculativeDecoding(**(vars(right) | {"tokens": [swap.get(t, t) for t in right.tokens]}))

    monkeypatch.setattr(evaluation, "speculative_decode", other_twin)
    found = evaluate(settings(path, limit=1), target=target, tokenizer=tokenizer, draft=draft)
    assert [d.position for d in found.differences] == [0]
    assert found.differences[0].tie and found.lossless


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
