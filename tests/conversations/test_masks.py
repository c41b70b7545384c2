"""What is supervised, decoded back to text: under every mask rule, with templates of the shapes that models ship."""

from pathlib import Path
from typing import Any

import pytest
from chat_templates import ONE, SHAPES, TWO, encoder
from tiny_target import SPECIAL, WITHOUT_TAGS
from transformers import AutoTokenizer

from dflash_offline.stages.conversations.content import Chat, Text, Tokens, read_messages
from dflash_offline.stages.conversations.loss_mask import ConversationEncoder, Tokenized
from dflash_offline.stages.conversations.rendering import UnmaskableError

SYSTEM = [{"role": "system", "content": "the blue"}]


def thought(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the conversation with reasoning in its last answer."""
    return [*messages[:-1], messages[-1] | {"reasoning_content": "nine likes"}]


def supervised(made: ConversationEncoder, content: Any) -> str:
    """Return the supervised tokens of a content, or of a list of messages, as text."""
    sample = made.encode(read_messages({"messages": content}) if isinstance(content, list) else content)
    return str(made.tokenizer.decode(sample.input_ids[sample.loss_mask].tolist()))


@pytest.mark.parametrize(
    ("shape", "messages", "assistant", "last_turn"),
    [
        ("tags", TWO, "a red dog<|im_end|>the bird sees<|im_end|>", "the bird sees<|im_end|>"),
        ("none", TWO, "a red dog<|im_end|>the bird sees<|im_end|>", "the bird sees<|im_end|>"),
        ("qwen3", thought(ONE), *["<think>\nnine likes\n</think>\n\na red dog<|im_end|>"] * 2),
        ("llama", SYSTEM + TWO, "a red dog<|eot|>the bird sees<|eot|>", "the bird sees<|eot|>"),
        ("llama", TWO, "a red dog<|eot|>the bird sees<|eot|>", "the bird sees<|eot|>"),
        ("gemma", SYSTEM + TWO, "a red dog<end_of_turn>the bird sees<end_of_turn>", "the bird sees<end_of_turn>"),
        ("gpt-oss", ONE, *["<|channel|>final<|message|>a red dog<|return|>"] * 2),  # serving produces the channel too
        ("mistral", TWO, " a red dog</s> the bird sees</s>", " the bird sees</s>"),  # and this blank
        ("mistral", SYSTEM + ONE, *[" a red dog</s>"] * 2),
        ("deepseek", SYSTEM + TWO, "a red dog<｜end｜>the bird sees<｜end｜>", "the bird sees<｜end｜>"),
    ],
)
def test_supervised_are_the_assistants_words_and_the_end_of_turn(
    tmp_path: Path, shape: str, messages: list[dict[str, str]], assistant: str, last_turn: str
) -> None:
    assert supervised(encoder(tmp_path / "a", shape), messages) == assistant
    assert supervised(encoder(tmp_path / "b", shape, mask="last-turn"), messages) == last_turn
    everything = encoder(tmp_path / "c", shape, mask="all")
    plain = AutoTokenizer.from_pretrained(tmp_path / "c").apply_chat_template(messages, tokenize=False)
    assert supervised(everything, messages) == plain


@pytest.mark.parametrize("end", ["é", "the 日本", "🐕 ", "dog\n"])
def test_an_answer_that_ends_in_several_tokens_of_a_character_is_supervised_whole(tmp_path: Path, end: str) -> None:
    messages = [*ONE[:1], {"role": "assistant", "content": end}, *TWO[2:]]
    assert supervised(encoder(tmp_path, "words"), messages) == f"{end}<|im_end|>the bird sees<|im_end|>"


@pytest.mark.parametrize(
    ("shape", "messages", "kwargs"),
    [
        ("deepseek", ONE, {"thinking": True}),  # its history never holds the <think> that serving begins with
        ("qwen3", thought(ONE), {"enable_thinking": False}),
    ],
)
def test_an_answer_that_the_prompt_does_not_lead_to_is_refused(
    tmp_path: Path, shape: str, messages: list[dict[str, str]], kwargs: dict[str, Any]
) -> None:
    for mask in ("assistant", "last-turn"):
        with pytest.raises(UnmaskableError, match="answer does not follow its prompt"):
            supervised(encoder(tmp_path / mask, shape, kwargs, mask=mask), messages)


def test_a_thinking_switch_moves_what_is_supervised(tmp_path: Path) -> None:
    assert supervised(encoder(tmp_path / "a", "qwen3"), ONE) == "<think>\n\n</think>\n\na red dog<|im_end|>"
    assert supervised(encoder(tmp_path / "b", "qwen3", {"enable_thinking": False}), ONE) == "a red dog<|im_end|>"


@pytest.mark.parametrize(
    ("shape", "messages", "expected"),
    [
        ("qwen3", thought(ONE), "a red dog<|im_end|>"),
        ("qwen3", ONE, "a red dog<|im_end|>"),
        ("gpt-oss", thought(ONE), "<|channel|>final<|message|>a red dog<|return|>"),
        ("tags", [ONE[0], {"role": "assistant", "content": "<think>nine</think>\na red"}], "a red<|im_end|>"),
        ("none", [ONE[0], {"role": "assistant", "content": "nine</think> a red"}], "a red<|im_end|>"),
        ("none", [ONE[0], {"role": "assistant", "content": "a red<think>nine"}], "a red"),
    ],
)
def test_reasoning_can_be_left_out(tmp_path: Path, shape: str, messages: list[dict[str, str]], expected: str) -> None:
    without = encoder(tmp_path, shape, no_reasoning=True)
    assert supervised(without, messages).lstrip(" ") == expected
    assert without.mask_rule.endswith(", without reasoning")


def test_a_tool_call_is_supervised_and_its_result_is_not(tmp_path: Path) -> None:
    template = WITHOUT_TAGS.replace(
        "{% else %}",
        "{% for c in m.tool_calls or [] %}<tool>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool>"
        "{% endfor %}<|im_end|>{{ '\n' }}{% else %}",
    ).replace("{{ m.content }}<|im_end|>{{ '\n' }}{% for", "{{ m.content }}{% for")
    SHAPES["tools"] = ("{{ tools | tojson if tools else '' }}" + template, SPECIAL, "<|im_end|>")
    call = {"type": "function", "function": {"name": "count", "arguments": '{"cats": 2}'}}
    messages = [
        ONE[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "two"},
        ONE[1],
    ]
    made = encoder(tmp_path, "tools")
    chat = read_messages({"messages": messages, "tools": [{"type": "function", "function": {"name": "count"}}]})
    assert supervised(made, chat) == '<tool>count {"cats": 2}</tool><|im_end|>a red dog<|im_end|>'
    assert '"name": "count"' in made.tokenizer.decode(made.encode(chat).input_ids.tolist())
    everywhere = encoder(tmp_path / "b", "tools", {"tools": [{"name": "other"}]})
    for tools, name in ((chat.tools, "count"), (None, "other")):
        text = everywhere.tokenizer.decode(everywhere.encode(Chat(chat.messages, tools)).input_ids.tolist())
        assert f'"name": "{name}"' in text


@pytest.mark.parametrize("shape", ["tags", "none"])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_special_token_in_a_message_rejects_the_row_or_is_kept_as_served(
    tmp_path: Path, shape: str, role: str
) -> None:
    messages = [message | {"content": "a <|im_start|> b"} if message["role"] == role else message for message in ONE]
    with pytest.raises(UnmaskableError) as caught:
        supervised(encoder(tmp_path / "a", shape), messages)
    assert caught.value.args[0] == "special token in content"
    assert caught.value.args[1] == f"messages[{role == 'assistant':d}].content spells '<|im_start|>'"
    kept = supervised(encoder(tmp_path / "b", shape, keep_special_tokens=True), messages)
    assert kept == ("a red dog<|im_end|>" if role == "user" else "a <|im_start|> b<|im_end|>")


def test_special_tokens_are_found_in_tools_calls_and_plain_texts(tmp_path: Path) -> None:
    made = encoder(tmp_path, "none")
    call = {"function": {"name": "count", "arguments": {"x": ["<|mask|>"]}}}
    calling = [ONE[0], {"role": "assistant", "content": "a", "tool_calls": [call]}]
    for content, place in (
        (read_messages({"messages": calling}), "messages[1].tool_calls[0].function.arguments.x[0] spells"),
        (Chat([*ONE], [{"name": "<|mask|>"}]), "tools[0].name spells"),
        (Text("the <|mask|>"), "text spells"),
    ):
        with pytest.raises(UnmaskableError) as caught:
            made.encode(content)
        assert caught.value.args[1].startswith(place)


def test_reasoning_tags_are_no_injection_even_where_they_are_special(tmp_path: Path) -> None:
    SHAPES["special think"] = (WITHOUT_TAGS, (*SPECIAL, "<think>", "</think>"), "<|im_end|>")
    messages = [ONE[0], {"role": "assistant", "content": "<think>nine</think>a red"}]
    assert supervised(encoder(tmp_path, "special think"), messages) == "<think>nine</think>a red<|im_end|>"


@pytest.mark.parametrize(("mask", "tokens"), [("assistant", "0110110"), ("last-turn", "0000110"), ("all", "1111111")])
def test_tokens_keep_their_mask_and_a_text_is_supervised_whole(tmp_path: Path, mask: str, tokens: str) -> None:
    made = encoder(tmp_path, "none", mask=mask)
    given = made.encode(Tokens([5, 6, 7, 8, 9, 10, 11], [0, 1, 1, 0, 1, 1, 0]))
    assert "".join(str(int(one)) for one in given.loss_mask) == tokens
    assert supervised(made, Text("the cat sees\n")) == "the cat sees\n"


def test_an_answer_without_a_question_is_left_out_alone_and_only_where_it_must_be_told(tmp_path: Path) -> None:
    backwards = Chat([ONE[1], *TWO])
    made = encoder(tmp_path / "a", "none")
    [[(first, error), (third, rest)]] = made.encode_all([backwards])
    assert (first, third) == (1, 3) and isinstance(error, UnmaskableError) and isinstance(rest, Tokenized)
    assert error.args[0] == "begins with an assistant turn"
    text, words = (made.tokenizer.decode(ids.tolist()) for ids in (rest.input_ids, rest.input_ids[rest.loss_mask]))
    assert text.count("a red dog") == 2 and words == "a red dog<|im_end|>the bird sees<|im_end|>"
    assert supervised(encoder(tmp_path / "b", "none", mask="last-turn"), backwards) == "the bird sees<|im_end|>"
    with pytest.raises(UnmaskableError, match="begins with an assistant turn"):
        supervised(made, [ONE[1], ONE[0]])
