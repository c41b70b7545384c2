"""What a target says is kept as the chat template writes it back, token for token, or left out with its reason."""

import json
from pathlib import Path
from typing import Any

import pytest
from chain_target import save_chain
from running import dflash, refused
from transformers import AutoTokenizer

from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.answers.readings import AnswerReader
from dflash_offline.stages.conversations.content import read_messages
from dflash_offline.stages.conversations.loss_mask import ConversationEncoder, supervised_runs
from dflash_offline.stages.regenerate import Regenerated, regenerate
from dflash_offline.stages.target.files import open_target

END = "<|im_end|>"
Rows = list[dict[str, Any]]


def template(answer: str, prompt: str = "<|im_start|>assistant\n") -> str:
    """Return a chat template that writes an answer, and asks for one, in the given way."""
    return (
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}" + answer + "{%- else -%}"
        "<|im_start|>{{ m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '" + prompt.replace("\n", "\\n") + "' }}{%- endif -%}"
    )


def tagged(words: str) -> str:
    return "<|im_start|>assistant{{ '\\n' }}" + words + "<|im_end|>"


def run(target: Path, rows: Rows, folder: Path, **more: Any) -> Regenerated:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"data": (data,), "out": folder / "own.jsonl", "target": str(target), "max_new_tokens": 40, "device": "cpu"}
    return regenerate(RegenerateConfig(**{**given, **more}))


def answers(folder: Path) -> Rows:
    rows = [json.loads(line) for line in (folder / "own.jsonl").read_text().splitlines()]
    return [message for row in rows for message in row["messages"] if message["role"] == "assistant"]


def rejects(folder: Path, place: str = "own.jsonl.partial/rejects") -> Rows:
    return [json.loads(line) for line in (folder / place).read_text().splitlines()]


def trained(target: Path, folder: Path, prompt: str) -> tuple[str, list[list[str]]]:
    """Return what leads to the supervised tokens of the new file's first row, and the tokens of each answer."""
    files = open_target(str(target))
    row = json.loads((folder / "own.jsonl").read_text().splitlines()[0])
    config = ExtractConfig(data=(folder,), out=folder / "c", target=str(target))
    sample = ConversationEncoder(files, config).encode(read_messages(row))
    runs = supervised_runs(sample.loss_mask)
    first = sample.input_ids[: runs[0, 0]].tolist()
    tokens = [files.tokenizer.convert_ids_to_tokens(sample.input_ids[a:b].tolist()) for a, b in runs]
    return files.tokenizer.decode(first), tokens


ASKED = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "old"}]}]
THINK = ["<think>", "</think>"]
OPENED = "<|im_start|>assistant\n<think>\n"
CHANNELS = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>"]
HARMONY = {
    "start_anchor": "<|im_start|>",
    "defaults": {"role": "assistant"},
    "fields": {
        "reasoning_content": {"open_pattern": r"<\|channel\|>a<\|message\|>", "close": "<|end|>"},
        "content": {"open_pattern": r"<\|channel\|>f<\|message\|>", "close": "<|im_end|>"},
    },
}
ANY_CHANNEL = tagged(
    "{%- if m.thinking -%}<|channel|>a<|message|>{{ m.thinking }}<|end|><|start|>{%- endif -%}"
    "<|channel|>f<|message|>{{ m.content }}"
)
KINDS: dict[str, dict[str, Any]] = {
    "a thought that the prompt opens, kept in the content": {
        "template": template(
            tagged("{{ '' if '<think>' in m.content else '<think></think>' }}{{ m.content }}"),
            OPENED,
        ),
        "said": ["\n", "p", "o", "</think>", "R", "Y", END],
        "plain": THINK,
        "answer": {"content": "<think>\npo</think>RY"},
    },
    "a thought that the prompt opens, kept apart": {
        "template": template(
            tagged("<think>{{ '\\n' + (m.reasoning_content or '') + '|' }}</think>{{ m.content | trim }}"), OPENED
        ),
        "said": ["\n", "p", "o", "|", "</think>", "R", "Y", END],
        "plain": THINK,
        "answer": {"content": "RY", "reasoning_content": "po"},
    },
    "a thought whose closing tag the template splits at": {
        "template": template(
            tagged("<think>{{ '\\n' + m.content.split('</think>')[0] + '</think>' + m.content.split('</think>')[1] }}"),
            OPENED,
        ),
        "said": ["\n", "p", "o", "</think>", "R", "Y", END],
        "plain": THINK,
        "answer": {"content": "po</think>RY"},
    },
    "channels that the template writes around the words": {
        "template": template(tagged("<|channel|>f<|message|>{{ m.content }}")),
        "said": ["\n", "<|channel|>", "f", "<|message|>", "R", "Y", END],
        "special": CHANNELS,
        "answer": {"content": "RY"},
    },
    "channels that a response template reads": {
        "template": template(tagged("{{ m.thinking and '' }}<|channel|>f<|message|>{{ m.content }}")),
        "said": ["\n", "<|channel|>", "f", "<|message|>", "R", "Y", END],
        "special": CHANNELS,
        "response_template": HARMONY,
        "answer": {"content": "RY"},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_trains_on_the_very_tokens_that_were_said(tmp_path: Path, kind: str) -> None:
    case = KINDS[kind]
    extra = {name: case[name] for name in ("special", "plain", "response_template") if name in case}
    target = save_chain(tmp_path / "t", case["template"], case["said"], **extra)
    done = run(target, ASKED, tmp_path)
    assert answers(tmp_path) == [{"role": "assistant", **case["answer"]}] and not done.notes
    said = [AutoTokenizer.from_pretrained(target).tokenize(text)[0] for text in case["said"]]
    before, runs = trained(target, tmp_path, case["template"])
    assert runs == [said[1:]] and before.endswith(case["said"][0])


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALLS = (
    "{{ m.content }}{%- for c in m.tool_calls or [] -%}{{ '\\n' if m.content else '' }}<tool_call>"
    "{{ '\\n' + (c.function | tojson) + '\\n' }}</tool_call>{%- endfor -%}"
)
CALLED = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
READ: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "two channels by the template": (
        template(ANY_CHANNEL),
        {},
        "<|channel|>a<|message|>Hm, hi<|end|><|start|><|channel|>f<|message|>one",
        {"content": "one", "reasoning": "Hm, hi"},
    ),
    "two channels by the response template": (
        template(ANY_CHANNEL),
        {"response_template": HARMONY},
        "<|channel|>a<|message|>Hm, hi<|end|><|start|><|channel|>f<|message|>one",
        {"content": "one", "reasoning": "Hm, hi"},
    ),
    "a call in tags": (
        template(tagged(CALLS)),
        {"tools": TOOLS},
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
        {"calls": [CALLED]},
    ),
    "words and two calls in tags": (
        template(tagged(CALLS)),
        {"tools": TOOLS},
        "one"
        '\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
        '\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
        {"content": "one", "calls": [CALLED, CALLED]},
    ),
    "a call that is no JSON": (
        template(tagged(CALLS)),
        {"tools": TOOLS},
        "<tool_call>\n{f(1)}\n</tool_call>",
        {"content": "<tool_call>\n{f(1)}\n</tool_call>"},
    ),
    "blanks that the template trims": (
        template(tagged("{{ m.content | trim }}")),
        {},
        "one \n",
        {"fault": "template writes the answer otherwise"},
    ),
    "a channel that the template does not write": (
        template(tagged("<|channel|>f<|message|>{{ m.content }}")),
        {},
        "<|channel|>other<|message|>one",
        {"fault": "special token in answer"},
    ),
    "a call of which the response template makes nothing": (
        template(tagged("<|channel|>f<|message|>{{ m.content }}")),
        {"response_template": {**HARMONY, "fields": {"content": {"content": "json"}}}},
        "<|channel|>f<|message|>one",
        {"content": "one"},
    ),
    "blanks alone": (template(tagged("{{ m.content }}")), {}, " \n", {"fault": "empty answer"}),
}


@pytest.mark.parametrize("name", READ)
def test_tokens_are_read_as_the_template_writes_them_back(tmp_path: Path, name: str) -> None:
    text, given, said, expected = READ[name]
    target = save_chain(
        tmp_path / "t", text, ["\n", END], special=CHANNELS, response_template=given.get("response_template")
    )
    reader = AnswerReader(open_target(str(target)), {}, keep_rewritten=False)
    asked = reader.ask([{"role": "user", "content": "hi"}], given.get("tools"), [])
    answer = reader.read(asked, AutoTokenizer.from_pretrained(target).encode(said + END), 0)
    assert {name: getattr(answer, name) for name in expected} == expected
    assert answer.compared == (not answer.fault)


def test_words_that_were_said_in_other_tokens_than_their_text_has_are_told_from_other_words(tmp_path: Path) -> None:
    target = save_chain(tmp_path / "t", template(tagged("{{ m.content }}")), ["\n", END])
    tokenizer, files = AutoTokenizer.from_pretrained(target), open_target(str(target))
    letters = [tokenizer.encode(letter)[0] for letter in "three"]
    assert letters != tokenizer.encode("three")
    for keep in (False, True):
        reader = AnswerReader(files, {}, keep_rewritten=keep)
        asked = reader.ask([{"role": "user", "content": "hi"}], None, [])
        answer = reader.read(asked, [*letters, tokenizer.eos_token_id], 0)
        expected = ("three", "") if keep else ("", "answer's text has other tokens")
        assert (answer.content, answer.fault, answer.compared) == (*expected, False)
        assert keep or answer.detail.startswith("turn 0: ['h', 'r', 'e'] is encoded ['hree'")


def test_a_tools_result_is_kept_behind_the_very_call_that_it_belongs_to(tmp_path: Path) -> None:
    called = '{"name": "f", "arguments": {"x": 1}}'
    said = ["\n", "<tool_call>\n", called, "\n</tool_call>", END]
    target = save_chain(tmp_path / "t", template(tagged(CALLS)), said, plain=said[1:4])
    user, result = {"role": "user", "content": "hi"}, {"role": "tool", "content": "3", "tool_call_id": "c1"}

    def old(arguments: Any, **more: Any) -> dict[str, Any]:
        return {
            "role": "assistant",
            "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": arguments}}],
        } | more

    end = {"role": "assistant", "content": "It is 3."}
    rows = [
        {"messages": [user, old('{"x": 1}'), result, end], "tools": TOOLS},
        {"messages": [user, old({"x": 2}), result, end, user, end], "tools": TOOLS},
        {"messages": [user, end, user, end], "tools": TOOLS},
        {"messages": [user, end, result, end], "tools": TOOLS},
        {"messages": [user, old("{"), result, end], "tools": TOOLS},
    ]
    done = run(target, rows, tmp_path)
    call = {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    kept = {**call, "tool_calls": [{"id": "c1", **CALLED}]}
    written = [json.loads(line)["messages"] for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert written == [[user, kept, result, call], *[[user, call]] * 4]
    assert done.notes == {
        "rows end at a call whose result the data does not have": 4,
        "answers beyond such a call, not asked for": 5,
    }
    extracted = dflash(
        "extract", tmp_path / "own.jsonl", "--target", target, "--out", tmp_path / "c", "--block-size", 2
    )
    assert extracted.exit_code == 0 and "5 samples" in extracted.stdout, extracted.output


def test_first_answers_that_are_all_rejected_stop_the_command_with_what_would_keep_them(tmp_path: Path) -> None:
    said = ["\n", "<|channel|>", "g", "<|message|>", "R", END]
    target = save_chain(
        tmp_path / "t", template(tagged("<|channel|>f<|message|>{{ m.content }}")), said, special=CHANNELS
    )
    (tmp_path / "rows.jsonl").write_text((json.dumps(ASKED[0]) + "\n") * 40)
    line = ["regenerate", tmp_path / "rows.jsonl", "--target", target, "--out", tmp_path / "own.jsonl"]
    line += ["--batch-rows", 4, "--device", "cpu"]
    refused(
        dflash(*line),
        "The first 8 answers were all left out: special token in answer",
        "<|channel|>",
        "response_template",
        "--server",
        "--stop-after-rejected 0",
    )
    assert not (tmp_path / "own.jsonl.partial").exists()
    refused(dflash(*line, "--stop-after-rejected", 0), "40 rows: special token in answer (", "--server")
    assert len(rejects(tmp_path)) == 40
