"""Conversations whose template rewrites the history: a sample an answer, each what a server would see and generate."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import QWEN3_LIKE
from running import dflash
from tiny_plan import plan
from tiny_target import save_target
from transformers import AutoTokenizer

from dflash_offline.stages.conversations.plan import Plan

# What precedes </think> is left out of every answer but the last, as one that prompts with <think> would be served.
R1_LIKE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{% else %}U:{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A:<think>{% endif %}"
)
# Results of tools stand in the text as long as no other question follows.
FORGETS_RESULTS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role != 'tool' or loop.index0 > ns.last %}<|im_start|>"
    "{{ m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Only the last question is shown, with what follows; an answer is tagged.
LAST_TAGGED = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages[ns.last:] %}"
    "{{ m.role[0] }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
# The last answer ends in another token than those before it, as channels do.
LAST_ENDS_OTHERWISE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{{ '<|im_end|>' if m.role == 'assistant' and loop.last else '<|pad|>' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = {"type": "function", "function": {"name": "depth", "arguments": {"of": "lake"}}}
THREE = [user("one?"), answer("first it is", reasoning_content="hm"), user("two?"), answer("then that"), user("three?")]
THREE += [answer("at last this", reasoning_content="so")]
THOUGHT = [user("one?"), answer("<think>aha</think>first it is"), user("two?"), answer("<think>so</think>then that")]
TOOLS = [user("deep?"), answer("let me see", tool_calls=[CALL]), {"role": "tool", "content": "12 m"}]
TOOLS += [answer("12 m it is"), user("sure?"), answer("quite sure of it")]
QWEN3 = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
CALLED = '<|im_start|>user\ndeep?<|im_end|>\n<|im_start|>assistant\n[[let me see{"name": "depth", "arguments": {"of": '
CALLED += '"lake"}}<|im_end|>]]\n'
CASES: dict[str, tuple[str, list[dict[str, Any]], list[tuple[int, str]]]] = {
    "thoughts of past turns": (
        QWEN3_LIKE,
        THREE,
        [
            (1, QWEN3.format("one?") + "[[<think>\nhm\n</think>\n\nfirst it is<|im_end|>]]\n"),
            (
                2,
                QWEN3.format("one?")
                + "first it is<|im_end|>\n"
                + QWEN3.format("two?")
                + "[[<think>\n\n</think>\n\nthen that<|im_end|>]]\n",
            ),
            (
                3,
                QWEN3.format("one?")
                + "first it is<|im_end|>\n"
                + QWEN3.format("two?")
                + "then that<|im_end|>\n"
                + QWEN3.format("three?")
                + "[[<think>\nso\n</think>\n\nat last this<|im_end|>]]\n",
            ),
        ],
    ),
    "a prompt that opens the thought": (
        R1_LIKE,
        THOUGHT,
        [
            (1, "U:one?A:<think>[[aha</think>first it is<|im_end|>]]"),
            (2, "U:one?A:first it is<|im_end|>U:two?A:<think>[[so</think>then that<|im_end|>]]"),
        ],
    ),
    "results of past tools": (
        FORGETS_RESULTS,
        TOOLS,
        [  # the first two answers are served with the same history
            (2, CALLED + "<|im_start|>tool\n12 m<|im_end|>\n<|im_start|>assistant\n[[12 m it is<|im_end|>]]\n"),
            (
                3,
                CALLED.replace("[[", "").replace("]]", "")
                + "<|im_start|>assistant\n12 m it is<|im_end|>\n"
                + QWEN3.format("sure?")
                + "[[quite sure of it<|im_end|>]]\n",
            ),
        ],
    ),
    "all but the last question, with tags": (
        LAST_TAGGED,
        THREE,
        [
            (1, "u:one?a:[[first it is<|im_end|>]]"),
            (2, "u:two?a:[[then that<|im_end|>]]"),
            (3, "u:three?a:[[at last this<|im_end|>]]"),
        ],
    ),
    "another end": (
        LAST_ENDS_OTHERWISE,
        THOUGHT,
        [
            (1, "u:one?<|pad|>a:[[<think>aha</think>first it is<|im_end|>]]"),
            (
                2,
                "u:one?<|pad|>a:<think>aha</think>first it is<|pad|>u:two?<|pad|>"
                "a:[[<think>so</think>then that<|im_end|>]]",
            ),
        ],
    ),
}
"""What a template forgets: the template, a conversation, and its samples by answer, supervised text in brackets."""


def marked(made: Plan, folder: Path) -> list[tuple[int, str]]:
    """Return the answer and the text of every sample, its supervised tokens in brackets."""
    tokenizer, table, texts = AutoTokenizer.from_pretrained(folder / "target"), made.samples, []
    for sample in range(len(table)):
        text, inside = "", False
        for token, is_supervised in zip(*(part.tolist() for part in table.tokens.of(sample)), strict=True):
            text += ("[[" if is_supervised else "]]") * (is_supervised != inside) + tokenizer.decode([token])
            inside = is_supervised
        texts.append((int(table.answer[sample]), text + "]]" * inside))
    return texts


@pytest.mark.parametrize("forgets", CASES)
def test_every_answer_has_the_history_that_a_server_would_be_given(tmp_path: Path, forgets: str) -> None:
    template, messages, expected = CASES[forgets]
    made = plan(tmp_path, [{"messages": messages}], template, block_size=2)
    assert marked(made, tmp_path) == expected
    last = plan(tmp_path, [{"messages": messages}], template, block_size=2, mask="last-turn")
    ((_, text),) = marked(last, tmp_path)
    assert text == expected[-1][1]


def test_what_it_costs_is_said_and_recorded_and_one_turn_stays_one_sample(tmp_path: Path) -> None:
    once, twice = {"messages": THREE[:2]}, {"messages": THREE[:4]}
    made = plan(tmp_path, [once, {"messages": THREE}, twice], QWEN3_LIKE)
    table, counts = made.samples, made.counts()
    assert table.row.tolist() == [1, 2, 2, 2, 3, 3] and table.answer.tolist() == [0, 1, 2, 3, 1, 2]
    assert {table.origin(sample) for sample in range(6)} > {"rows.jsonl:1", "rows.jsonl:2, answer 3"}
    lengths = table.num_tokens.tolist()
    more = sum(lengths[1:]) - max(lengths[1:4]) - max(lengths[4:])
    assert counts["split"] == {"conversations": 2, "samples": 5, "more_tokens": more} and not counts["rejects"]
    ((_, told),) = [fact for fact in made.facts() if "split" in fact[1]]
    assert "2 conversations" in told and "into 5 samples" in told and f"{more:,} tokens more" in told
    assert "--mask last-turn" in told


def test_an_answer_that_cannot_be_served_so_is_counted_alone(tmp_path: Path) -> None:
    starts = [answer("welcome to it"), *THREE]  # no prompt leads to it
    no_thought = [user("one?"), answer("first it is"), *THOUGHT[2:]]  # <think> is not how it begins
    refuses_two = QWEN3_LIKE + "{% if messages | length == 3 %}{{ raise_exception('two asked') }}{% endif %}"
    short = [user("one?"), answer("a"), *THOUGHT[2:]]
    long = [user("one? " * 9), answer("first"), user("two?"), answer("then that it is")]
    for name, (template, messages, reason, detail, kept, settings) in {
        "first": (QWEN3_LIKE, starts, "begins with an assistant turn", "without a prompt", [2, 3, 4], {}),
        "no thought": (R1_LIKE, no_thought, "answer does not follow its prompt", "leads to messages[1]", [2], {}),
        "refused": (refuses_two, THREE, "template refuses the turns up to an answer", "two asked", [1, 3], {}),
        "short": (LAST_ENDS_OTHERWISE, short, "supervised part too near the end", "tokens", [2], {"block_size": 5}),
        "long": (QWEN3_LIKE, long, "no supervised token", "40 tokens", [1], {"max_length": 40, "block_size": 2}),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        made = plan(folder, [{"messages": messages}], template, **settings)
        assert made.samples.answer.tolist() == kept, name
        (reject,) = made.rejects
        assert reject.reason == reason and detail in reject.detail and reject.row == 1, name
        assert {*kept, reject.answer} == {*range(1, len(kept) + 2)}
        counts = made.counts()
        assert counts["answers_left_out"] == {reason: 1} and not counts["rejects"], name
        assert any(f"left out: 1 answers: {reason} (" in text for _, text in made.facts())


def test_a_row_none_of_whose_answers_can_be_served_is_one_row_left_out(tmp_path: Path) -> None:
    unthinking = [user("one?"), answer("first it is"), user("two?"), answer("then that")]
    made = plan(tmp_path, [{"messages": unthinking}, {"messages": THOUGHT}], R1_LIKE)
    assert made.counts()["rejects"] == {"answer does not follow its prompt": 1} and len(made.samples) == 2
    assert [(one.row, one.answer) for one in made.rejects] == [(1, 0)]


def test_the_texts_of_one_row_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dflash_offline.stages.conversations.rendering.MOST_CHARACTERS", 200)
    turns = [turn for i in range(9) for turn in (user(f"what is {i}?"), answer(f"<think>so</think>it is {i}"))]
    made = plan(tmp_path, [{"messages": turns}], R1_LIKE)
    kept = made.samples.answer.tolist()
    assert kept == [*range(1, len(kept) + 1)] and 1 < len(kept) < 9
    assert made.counts()["answers_left_out"] == {"far too long": 9 - len(kept)}


def test_what_an_older_version_planned_is_planned_again_as_it_was(tmp_path: Path) -> None:
    rows = [{"messages": THREE}, {"messages": THREE[:2]}]
    made = plan(tmp_path, rows, QWEN3_LIKE, as_served=False)
    assert made.samples.row.tolist() == [2] and made.counts()["rejects"] == {"template rewrites history": 1}
    assert "new --out" in next(text for _, text in made.facts() if "rewrites" in text)


def test_inspect_shows_each_sample_of_a_row_and_the_plan_of_it_all(tmp_path: Path) -> None:
    target, rows = save_target(tmp_path / "target", template=QWEN3_LIKE), tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [answer("welcome to it"), *THREE]}) + "\n")
    arguments = (rows, "--target", target, "--block-size", 4)
    views = json.loads(dflash("inspect", *arguments, "--sample", 0, "--json").stdout)
    assert [view["answer"] for view in views] == [1, 2, 3, 4] and views[0]["left_out"] and views[0]["advice"]
    said = dflash("inspect", *arguments, "--sample", 0).stdout
    assert said.count("LEFT OUT") == 1 and said.count("after its history as served") == 4
    out = ("--layers", "1,2", "--device", "cpu", "--out", tmp_path / "cache")
    planned = dflash("extract", *arguments, *out, "--plan").stdout
    assert "1 conversations whose history" in dflash("extract", *arguments, *out, "--quiet").stdout
    found = dflash("inspect", tmp_path / "cache").stdout
    for text in ("1 conversations whose history", "1 answers: begins with an assistant turn"):
        assert text in planned
    assert "1 conversations into 3 samples" in found and "1 answers: begins with" in found
    assert "rows.jsonl:1, answer 4" in dflash("inspect", tmp_path / "cache", "--sample", 0).stdout
