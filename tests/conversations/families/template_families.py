# ruff: noqa: E501
"""Chat templates of the shapes that the families of chat models ship, and what a model of each would have generated."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A shape of chat template, the tokens that it is made of, and what its model says."""

    template: str
    special: tuple[str, ...]
    ends: tuple[str, ...]
    """The tokens at which serving ends an answer."""
    said: Callable[[Message], str]
    """Returns what the model generates for an answer, up to and with the token that ends it."""
    refuses: dict[str, str] = field(default_factory=dict)
    """By row shape, why the family's rows of it are left out."""
    ends_in_next: bool = False
    """Whether an answer ends in the token that begins the next turn, so that the last one has no end."""


def _arguments(call: Message) -> Any:
    given = call["function"]["arguments"]
    return json.loads(given) if isinstance(given, str) else given


def _as_json(message: Message, write: Callable[[str, str], str]) -> list[str]:
    calls = message.get("tool_calls") or []
    return [write(call["function"]["name"], json.dumps(_arguments(call))) for call in calls]


def content_of(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def reasoning_of(message: Message) -> str:
    return str(message.get("reasoning_content", ""))


def words_then(end: str, before: str = "") -> Callable[[Message], str]:
    """Return the words alone, as of a family that knows neither calls nor reasoning."""
    return lambda message: before + content_of(message) + end


ALTERNATES = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
)
NO_ROLES = dict.fromkeys(("tool call", "parallel calls", "empty parts", "developer"), "bad row")
REFUSED_CALLS = dict.fromkeys(("tool call", "parallel calls", "empty parts"), "bad row")
EMPTY_CALLS = dict.fromkeys(("tool call", "empty parts"), "template writes nothing of an answer")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = "<|im_end|>"


def hermes(message: Message) -> str:
    calls = _as_json(
        message, lambda name, arguments: f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    )
    return "\n".join([*filter(None, [content_of(message)]), *calls]) + END


def qwen3(message: Message) -> str:
    return f"<think>\n{reasoning_of(message)}\n</think>\n\n" + hermes(message)


def qwen3_coder(message: Message) -> str:
    said = content_of(message)
    for call in message.get("tool_calls") or []:
        said += "\n<tool_call>\n<function=" + call["function"]["name"] + ">\n"
        for key, value in _arguments(call).items():
            said += f"<parameter={key}>\n{value}\n</parameter>\n"
        said += "</function>\n</tool_call>"
    return said + END


def llama3(message: Message) -> str:
    if message.get("tool_calls"):
        return (
            _as_json(message, lambda name, arguments: f'{{"name": "{name}", "parameters": {arguments}}}')[0]
            + "<|eot_id|>"
        )
    return content_of(message) + "<|eot_id|>"


def mistral(message: Message) -> str:
    calls = _as_json(message, lambda name, arguments: f'{{"name": "{name}", "arguments": {arguments}}}')
    return ("[TOOL_CALLS] [" + ", ".join(calls) + "]" if calls else " " + content_of(message)) + "</s>"


def tekken(message: Message) -> str:
    calls = _as_json(message, lambda name, arguments: f"[TOOL_CALLS]{name}[ARGS]{arguments}")
    return content_of(message) + "".join(calls) + "</s>"


def deepseek_v3(message: Message) -> str:
    calls = _as_json(
        message,
        lambda name, arguments: (
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"
        ),
    )
    listed = "<｜tool▁calls▁begin｜>" + "\n".join(calls) + "<｜tool▁calls▁end｜>" if calls else ""
    return content_of(message) + listed + "<｜end▁of▁sentence｜>"


def deepseek_v31(message: Message) -> str:
    calls = _as_json(
        message, lambda name, arguments: f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"
    )
    listed = "<｜tool▁calls▁begin｜>" + "".join(calls) + "<｜tool▁calls▁end｜>" if calls else ""
    return content_of(message) + listed + "<｜end▁of▁sentence｜>"


def kimi(message: Message) -> str:
    calls = [
        f"<|tool_call_begin|>{call['id']}<|tool_call_argument_begin|>{json.dumps(_arguments(call))}<|tool_call_end|>"
        for call in message.get("tool_calls") or []
    ]
    listed = "<|tool_calls_section_begin|>" + "".join(calls) + "<|tool_calls_section_end|>" if calls else ""
    return content_of(message) + listed + END


def glm(message: Message) -> str:
    said = "\n<think>" + reasoning_of(message) + "</think>\n" + content_of(message)
    for call in message.get("tool_calls") or []:
        said += "\n<tool_call>" + call["function"]["name"] + "\n"
        for key, value in _arguments(call).items():
            said += f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"
        said += "</tool_call>"
    return said


def harmony(message: Message) -> str:
    said = (
        f"<|channel|>analysis<|message|>{reasoning_of(message)}<|end|><|start|>assistant"
        if reasoning_of(message)
        else ""
    )
    if calls := message.get("tool_calls"):
        name, arguments = calls[0]["function"]["name"], json.dumps(_arguments(calls[0]))
        return said + f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"
    return said + f"<|channel|>final<|message|>{content_of(message)}<|return|>"


def granite(message: Message) -> str:
    calls = _as_json(message, lambda name, arguments: f'{{"arguments": {arguments}, "name": "{name}"}}')
    return content_of(message) + ("<|tool_call|>[" + ", ".join(calls) + "]" if calls else "") + "<|end_of_text|>"


def minimax(message: Message) -> str:
    said = "<think>\n" + reasoning_of(message) + "\n</think>\n\n" + content_of(message)
    if calls := message.get("tool_calls"):
        said += "\n<minimax:tool_call>"
        for call in calls:
            said += f'\n<invoke name="{call["function"]["name"]}">'
            said += (
                "".join(f'\n<parameter name="{k}">{v}</parameter>' for k, v in _arguments(call).items()) + "\n</invoke>"
            )
        said += "\n</minimax:tool_call>"
    return said + "[e~["


def command_r(message: Message) -> str:
    calls = _as_json(message, lambda name, arguments: f'{{"tool_name": "{name}", "parameters": {arguments}}}')
    if calls:
        return (
            "<|START_THINKING|>"
            + content_of(message)
            + "<|END_THINKING|><|START_ACTION|>["
            + ", ".join(calls)
            + "]<|END_ACTION|><|END_OF_TURN_TOKEN|>"
        )
    return "<|START_RESPONSE|>" + content_of(message) + "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"


def pythonic(message: Message) -> str:
    calls = [
        call["function"]["name"] + "(" + ", ".join(f"{k}={json.dumps(v)}" for k, v in _arguments(call).items()) + ")"
        for call in message.get("tool_calls") or []
    ]
    return (
        content_of(message) + ("<|tool_call_start|>[" + ", ".join(calls) + "]<|tool_call_end|>" if calls else "") + END
    )


_TOOLS_JSON = "{% if tools %}<|im_start|>system{{ '\n' }}{% for t in tools %}{{ t | tojson }}{{ '\n' }}{% endfor %}<|im_end|>{{ '\n' }}{% endif %}"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
_PLAIN_TURN = "<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{{ '\n' }}"
_HERMES_ANSWER = (
    "{{ m.content }}{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    '<tool_call>{{ \'\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}{% endif %}"
    "{{ '}\n' }}</tool_call>{% endfor %}<|im_end|>{{ '\n' }}"
)
_TOOL_AS_USER = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>{{ '\n' }}{% endif %}"
)
_LAST_QUESTION = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)

FAMILIES: dict[str, Family] = {
    # ChatML and its relatives
    "chatml": Family(
        "{% for m in messages %}" + _PLAIN_TURN + "{% endfor %}" + _PROMPT, CHATML, (END,), words_then(END), EMPTY_CALLS
    ),
    "chatml with a default system turn": Family(
        "{% if messages[0].role != 'system' %}<|im_start|>system{{ '\nBe kind.' }}<|im_end|>{{ '\n' }}{% endif %}"
        "{% for m in messages %}" + _PLAIN_TURN + "{% endfor %}" + _PROMPT,
        CHATML,
        (END,),
        words_then(END),
        EMPTY_CALLS,
    ),
    "chatml with tags": Family(
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        + _PROMPT,
        CHATML,
        (END,),
        words_then(END),
        EMPTY_CALLS,
    ),
    "hermes": Family(
        _TOOLS_JSON
        + "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant{{ '\n' }}"
        + _HERMES_ANSWER
        + "{% elif m.role == 'tool' %}"
        + _TOOL_AS_USER
        + "{% else %}"
        + _PLAIN_TURN
        + "{% endif %}{% endfor %}"
        + _PROMPT,
        CHATML,
        (END,),
        hermes,
    ),
    "qwen3": Family(
        _LAST_QUESTION
        + _TOOLS_JSON
        + "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant{{ '\n' }}"
        "{% if loop.index0 > ns.last %}<think>{{ '\n' + (m.reasoning_content or '') | trim('\n') + '\n' }}</think>{{ '\n\n' }}{% endif %}"
        + _HERMES_ANSWER
        + "{% elif m.role == 'tool' %}"
        + _TOOL_AS_USER
        + "{% else %}"
        + _PLAIN_TURN
        + "{% endif %}{% endfor %}"
        + _PROMPT,
        (*CHATML, "<think>", "</think>"),
        (END,),
        qwen3,
    ),
    "qwen3 that opens a thought": Family(
        _LAST_QUESTION
        + _TOOLS_JSON
        + "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant{{ '\n' }}"
        "{% if loop.index0 > ns.last %}<think>{{ '\n' + (m.reasoning_content or '') | trim('\n') + '\n' }}</think>{{ '\n\n' }}{% endif %}"
        + _HERMES_ANSWER
        + "{% elif m.role == 'tool' %}"
        + _TOOL_AS_USER
        + "{% else %}"
        + _PLAIN_TURN
        + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}<think>{{ '\n' }}{% endif %}",
        (*CHATML, "<think>", "</think>"),
        (END,),
        lambda message: qwen3(message).removeprefix("<think>\n"),
    ),
    "qwen3 coder": Family(
        "{% if tools %}<|im_start|>system{{ '\n' }}{% for t in tools %}<function>{{ '\n' }}<name>{{ t.function.name }}</name>"
        "<description>{{ t.function.description | trim }}</description>{% for k in t.function.parameters.properties %}"
        "<parameter>{{ k }}</parameter>{% endfor %}</function>{% endfor %}<|im_end|>{{ '\n' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant{{ '\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n<function=' + c.function.name + '>\n' }}"
        "{% for k, v in c.function.arguments.items() %}{{ '<parameter=' + k + '>\n' + v + '\n</parameter>\n' }}{% endfor %}"
        "{{ '</function>\n</tool_call>' }}{% endfor %}<|im_end|>{{ '\n' }}{% elif m.role == 'tool' %}"
        + _TOOL_AS_USER
        + "{% else %}"
        + _PLAIN_TURN
        + "{% endif %}{% endfor %}"
        + _PROMPT,
        CHATML,
        (END,),
        qwen3_coder,
    ),
    "internlm": Family(
        "<s>{% for m in messages %}" + _PLAIN_TURN + "{% endfor %}" + _PROMPT,
        ("<unk>", "<s>", *CHATML),
        (END,),
        words_then(END),
        EMPTY_CALLS,
    ),
    "lfm": Family(
        "<|startoftext|>{% if tools %}<|im_start|>system{{ '\n' }}List of tools: [{% for t in tools %}{{ t | tojson }}, {% endfor %}]"
        "<|im_end|>{{ '\n' }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}"
        "{% if m.tool_calls %}<|tool_call_start|>[{% for c in m.tool_calls %}{{ c.function.name }}("
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}{% if not loop.last %}, {% endif %}{% endfor %})"
        "{% if not loop.last %}, {% endif %}{% endfor %}]<|tool_call_end|>{% endif %}<|im_end|>{{ '\n' }}{% endfor %}"
        + _PROMPT,
        ("<|pad|>", "<|startoftext|>", *CHATML, "<|tool_call_start|>", "<|tool_call_end|>"),
        (END,),
        pythonic,
    ),
    # headers
    "llama 3": Family(
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\n\n' + m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}",
        ("<|pad|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|eot_id|>",),
        words_then("<|eot_id|>"),
        EMPTY_CALLS,
    ),
    "llama 3.1": Family(
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}"
        "{% else %}{% set system = '' %}{% endif %}<|begin_of_text|><|start_header_id|>system<|end_header_id|>{{ '\n\n' }}"
        "{% if tools %}Environment: ipython{{ '\n' }}{% endif %}{{ 'Cutting Knowledge\n' + system }}<|eot_id|>"
        "{% if tools %}{% set first = messages[0].content | trim %}{% set messages = messages[1:] %}<|start_header_id|>user<|end_header_id|>"
        "{{ '\n\n' }}{% for t in tools %}{{ t | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{{ first }}<|eot_id|>{% endif %}"
        "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
        "{{ raise_exception('only single tool-calls') }}{% endif %}<|start_header_id|>assistant<|end_header_id|>"
        '{{ \'\n\n{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}{{ m.tool_calls[0].function.arguments | tojson }}}'
        "<|eot_id|>{% elif m.role in ('tool', 'ipython') %}<|start_header_id|>ipython<|end_header_id|>{{ '\n\n' }}"
        "{{ m.content | tojson }}<|eot_id|>{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\n\n' + m.content | trim }}<|eot_id|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}",
        ("<|pad|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|eot_id|>",),
        llama3,
        {"parallel calls": "bad row"},
    ),
    "phi 3": Family(
        "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}<|{{ m.role }}|>{{ '\n' + m.content }}<|end|>{{ '\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}",
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        ("<|end|>",),
        words_then("<|end|>"),
        EMPTY_CALLS,
    ),
    "phi 4": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        (*CHATML, "<|im_sep|>"),
        (END,),
        words_then(END),
        EMPTY_CALLS,
    ),
    "granite": Family(
        "{% for t in tools or [] %}{% if loop.first %}<|start_of_role|>tools<|end_of_role|>{% endif %}{{ t | tojson(indent=4) }}"
        "{% if loop.last %}<|end_of_text|>{{ '\n' }}{% endif %}{% endfor %}{% for m in messages %}"
        "<|start_of_role|>{{ 'tool_response' if m.role == 'tool' else m.role }}<|end_of_role|>{{ m.content }}"
        "{% if m.tool_calls %}<|tool_call|>[{% for c in m.tool_calls %}{{ {'arguments': c.function.arguments, 'name': c.function.name} | tojson }}"
        "{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}<|end_of_text|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        ("<|pad|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"),
        ("<|end_of_text|>",),
        granite,
    ),
    "command r": Family(
        "<BOS_TOKEN>{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
        "{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|>{% if m.tool_calls %}<|START_THINKING|>{{ m.content }}<|END_THINKING|>"
        "<|START_ACTION|>[{% for c in m.tool_calls %}{{ {'tool_name': c.function.name, 'parameters': c.function.arguments} | tojson }}"
        "{% if not loop.last %}, {% endif %}{% endfor %}]<|END_ACTION|>{% else %}<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% endif %}"
        "{% elif m.role == 'user' %}<|USER_TOKEN|>{{ m.content }}{% elif m.role == 'tool' %}<|SYSTEM_TOKEN|><|START_TOOL_RESULT|>"
        "{{ m.content | tojson }}<|END_TOOL_RESULT|>{% else %}<|SYSTEM_TOKEN|>{{ m.content }}{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        (
            "<PAD>",
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|START_THINKING|>",
            "<|END_THINKING|>",
            "<|START_ACTION|>",
            "<|END_ACTION|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
        ),
        ("<|END_OF_TURN_TOKEN|>",),
        command_r,
    ),
    # [INST]
    "llama 2": Family(
        "{% if messages[0].role in ('system', 'developer') %}{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}" + ALTERNATES + "{% if m.role == 'user' %}<s>[INST] {% if loop.first and system %}"
        "{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}{{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}",
        ("<unk>", "<s>", "</s>"),
        ("</s>",),
        lambda m: f" {content_of(m)} </s>",
        REFUSED_CALLS,
    ),
    "mistral 7b": Family(
        "<s>{% for m in messages %}" + ALTERNATES + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}",
        ("<unk>", "<s>", "</s>"),
        ("</s>",),
        words_then("</s>"),
        {**NO_ROLES, "system": "bad row"},
    ),
    "mistral v3": Family(
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% set turns = messages[1:] if system else messages %}"
        + _LAST_QUESTION.replace("messages %}{% if", "turns %}{% if")
        + "<s>{% for m in turns %}{% if m.role == 'user' %}{% if tools and loop.index0 == ns.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
        "[INST] {% if system and loop.index0 == ns.last %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
        '{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{{ \'{"name": "\' + c.function.name + \'", "arguments": \' }}'
        "{{ c.function.arguments | tojson }}}{% if not loop.last %}, {% endif %}{% endfor %}]</s>{% elif m.role == 'tool' %}"
        "[TOOL_RESULTS] {\"content\": {{ m.content | tojson }}}[/TOOL_RESULTS]{% elif m.role == 'assistant' %} {{ m.content }}</s>"
        "{% else %}{{ raise_exception('Only user, assistant and tool roles') }}{% endif %}{% endfor %}",
        (
            "<unk>",
            "<s>",
            "</s>",
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ),
        ("</s>",),
        mistral,
        {"developer": "bad row"},
    ),
    "mistral small": Family(
        "<s>{% if messages[0].role == 'system' %}[SYSTEM_PROMPT]{{ messages[0].content }}[/SYSTEM_PROMPT]{% set messages = messages[1:] %}{% endif %}"
        "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST]{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]"
        "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}{% endfor %}</s>"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% else %}{{ raise_exception('Unknown role') }}{% endif %}{% endfor %}",
        (
            "<unk>",
            "<s>",
            "</s>",
            "[INST]",
            "[/INST]",
            "[SYSTEM_PROMPT]",
            "[/SYSTEM_PROMPT]",
            "[TOOL_CALLS]",
            "[ARGS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
        ),
        ("</s>",),
        tekken,
        {"developer": "bad row"},
    ),
    # Gemma
    "gemma": Family(
        "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        + ALTERNATES
        + "<start_of_turn>{{ ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}<end_of_turn>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}",
        ("<pad>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        ("<end_of_turn>",),
        words_then("<end_of_turn>"),
        {**NO_ROLES, "system": "bad row"},
    ),
    "gemma 3": Family(
        "<bos>{% set first = '' %}{% if messages[0].role in ('system', 'developer') %}{% set first = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
        + ALTERNATES
        + "<start_of_turn>{{ ('model' if m.role == 'assistant' else m.role) + '\n' }}{% if loop.first %}{{ first }}{% endif %}"
        "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}{{ p.text | trim }}{% endfor %}{% endif %}<end_of_turn>{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}",
        ("<pad>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        ("<end_of_turn>",),
        words_then("<end_of_turn>"),
        REFUSED_CALLS,
    ),
    # DeepSeek
    "deepseek v3": Family(
        "<｜begin▁of▁sentence｜>{% for m in messages %}{% if m.role in ('system', 'developer') %}{{ m.content }}{% endif %}{% endfor %}"
        "{% for t in tools or [] %}{{ '\n' }}{{ t | tojson }}{% endfor %}{% for m in messages %}"
        "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}"
        "<｜Assistant｜>{{ m.content }}{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}"
        "{% if not loop.first %}{{ '\n' }}{% endif %}<｜tool▁call▁begin｜>{{ c.type }}<｜tool▁sep｜>"
        "{{ c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>{% endif %}"
        "<｜end▁of▁sentence｜>{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
        (
            "<pad>",
            "<｜begin▁of▁sentence｜>",
            "<｜end▁of▁sentence｜>",
            "<｜User｜>",
            "<｜Assistant｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁output▁begin｜>",
            "<｜tool▁output▁end｜>",
        ),
        ("<｜end▁of▁sentence｜>",),
        deepseek_v3,
    ),
    "deepseek r1": Family(
        "<｜begin▁of▁sentence｜>{% for m in messages %}{% if m.role in ('system', 'developer') %}{{ m.content }}{% elif m.role == 'user' %}"
        "<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>{{ '\n' }}{% endif %}",
        ("<pad>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        ("<｜end▁of▁sentence｜>",),
        words_then("<｜end▁of▁sentence｜>"),
        dict.fromkeys(
            (
                "plain",
                "system",
                "several turns",
                "reasoning",
                "tool call",
                "parallel calls",
                "developer",
                "empty parts",
                "lists of parts",
                "trailing user",
                "names",
            ),
            "answer does not follow its prompt",
        ),
    ),
    "deepseek v3.1": Family(
        "<｜begin▁of▁sentence｜>{% for m in messages %}{% if m.role in ('system', 'developer') %}{{ m.content }}{% endif %}{% endfor %}"
        "{% for t in tools or [] %}{{ '\n' }}{{ t | tojson }}{% endfor %}{% set last = namespace(role='') %}{% for m in messages %}{% if m.role == 'user' %}"
        "<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}{% if last.role != 'tool' %}<｜Assistant｜></think>{% endif %}{{ m.content }}"
        "{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}<｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>"
        "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}<｜tool▁call▁end｜>{% endfor %}"
        "<｜tool▁calls▁end｜>{% endif %}<｜end▁of▁sentence｜>{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
        "{% endif %}{% set last.role = m.role %}{% endfor %}{% if add_generation_prompt and last.role != 'tool' %}<｜Assistant｜></think>{% endif %}",
        (
            "<pad>",
            "<｜begin▁of▁sentence｜>",
            "<｜end▁of▁sentence｜>",
            "<｜User｜>",
            "<｜Assistant｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁output▁begin｜>",
            "<｜tool▁output▁end｜>",
            "</think>",
        ),
        ("<｜end▁of▁sentence｜>",),
        deepseek_v31,
    ),
    # others with tools or reasoning
    "kimi k2": Family(
        "{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}{% for m in messages %}"
        "{% if m.role == 'user' %}<|im_user|>user<|im_middle|>{{ m.content }}{% elif m.role == 'assistant' %}<|im_assistant|>assistant<|im_middle|>"
        "{{ m.content }}{% if m.tool_calls %}<|tool_calls_section_begin|>{% for c in m.tool_calls %}<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>"
        "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}{% endif %}<|tool_call_end|>{% endfor %}"
        "<|tool_calls_section_end|>{% endif %}{% elif m.role == 'tool' %}<|im_system|>tool<|im_middle|>{{ '## Return of ' + m.tool_call_id + '\n' + m.content }}"
        "{% else %}<|im_system|>{{ m.role }}<|im_middle|>{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}",
        (
            "[PAD]",
            "<|im_system|>",
            "<|im_user|>",
            "<|im_assistant|>",
            "<|im_middle|>",
            END,
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
        ),
        (END,),
        kimi,
    ),
    "glm 4.5": Family(
        _LAST_QUESTION
        + "[gMASK]<sop>{% if tools %}<|system|>{{ '\n' }}{% for t in tools %}{{ t | tojson }}{{ '\n' }}{% endfor %}{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ '\n' + m.content }}{% elif m.role == 'assistant' %}<|assistant|>{{ '\n' }}<think>"
        "{% if loop.index0 > ns.last %}{{ m.reasoning_content or '' }}{% endif %}</think>{{ '\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ '\n' }}<tool_call>{{ c.function.name + '\n' }}{% for k, v in c.function.arguments.items() %}"
        "<arg_key>{{ k }}</arg_key>{{ '\n' }}<arg_value>{{ v }}</arg_value>{{ '\n' }}{% endfor %}</tool_call>{% endfor %}"
        "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<|observation|>{% endif %}{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
        "{% else %}<|system|>{{ '\n' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        (
            "<|endoftext|>",
            "[gMASK]",
            "<sop>",
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<|observation|>",
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
        ),
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        glm,
        ends_in_next=True,
    ),
    "gpt-oss": Family(
        "<|start|>system<|message|>Knowledge cutoff<|end|>{% if messages[0].role in ('system', 'developer') or tools %}<|start|>developer<|message|>"
        "{% if messages[0].role in ('system', 'developer') %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}"
        "{% for t in tools or [] %}{{ '\n// ' + t.function.description + '\ntype ' + t.function.name + ' = (_: ' }}{{ t.function.parameters | tojson }}{% endfor %}<|end|>{% endif %}"
        + _LAST_QUESTION
        + "{% for m in messages %}{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
        "{% elif m.role == 'tool' %}<|start|>functions to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>"
        "{% elif m.role == 'assistant' %}{% if m.thinking and loop.index0 > ns.last %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
        "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call a message') }}{% endif %}{% if m.content %}<|start|>assistant<|channel|>analysis<|message|>{{ m.content }}<|end|>{% endif %}<|start|>assistant<|channel|>commentary to=functions.{{ m.tool_calls[0].function.name }} <|constrain|>json<|message|>"
        "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% elif loop.last and not add_generation_prompt %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ("<|pad|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"),
        ("<|return|>", "<|call|>"),
        harmony,
        {"parallel calls": "bad row"},
    ),
    "minimax m2": Family(
        _LAST_QUESTION
        + "]~!b[{% if tools %}]~b]system{{ '\n' }}{% for t in tools %}<tool>{{ t.function | tojson }}</tool>{% endfor %}[e~[{{ '\n' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}]~b]ai{{ '\n' }}{% if loop.index0 > ns.last %}<think>{{ '\n' + (m.reasoning_content or '') + '\n' }}</think>{{ '\n\n' }}{% endif %}"
        "{{ m.content }}{% if m.tool_calls %}{{ '\n' }}<minimax:tool_call>{% for c in m.tool_calls %}{{ '\n<invoke name=\"' + c.function.name + '\">' }}"
        "{% for k, v in c.function.arguments.items() %}{{ '\n<parameter name=\"' + k + '\">' + v + '</parameter>' }}{% endfor %}{{ '\n</invoke>' }}{% endfor %}{{ '\n' }}</minimax:tool_call>{% endif %}[e~[{{ '\n' }}"
        "{% elif m.role == 'tool' %}]~b]tool{{ '\n' }}<response>{{ m.content }}</response>[e~[{{ '\n' }}{% else %}]~b]{{ m.role + '\n' + m.content }}[e~[{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}]~b]ai{{ '\n' }}{% endif %}",
        ("<pad>", "]~!b[", "]~b]", "[e~["),
        ("[e~[",),
        minimax,
    ),
    # plain words around the turns
    "vicuna": Family(
        "A chat.{% for m in messages %}{% if m.role == 'assistant' %} ASSISTANT: {{ m.content }}</s>{% elif m.role == 'user' %} USER: {{ m.content }}"
        "{% elif m.role == 'system' %} {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}",
        ("<unk>", "<s>", "</s>"),
        ("</s>",),
        words_then("</s>", " "),
        EMPTY_CALLS,
    ),
    "zephyr": Family(
        "{% for m in messages %}<|{{ m.role }}|>{{ '\n' + m.content }}</s>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}",
        ("<unk>", "<s>", "</s>"),
        ("</s>",),
        words_then("</s>"),
        EMPTY_CALLS,
    ),
    "alpaca": Family(
        "{% for m in messages %}{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}{% elif m.role == 'assistant' %}"
        "{{ '### Response:\n' + m.content }}<|EOT|>{{ '\n' }}{% elif m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
        ("<pad>", "<|EOT|>"),
        ("<|EOT|>",),
        words_then("<|EOT|>"),
        EMPTY_CALLS,
    ),
    "exaone": Family(
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}[|system|][|endofturn|]{{ '\n' }}{% endif %}[|{{ m.role }}|]{{ m.content }}"
        "{% if m.role != 'user' %}[|endofturn|]{% endif %}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n' }}[|assistant|]{% endif %}",
        ("[PAD]", "[|endofturn|]"),
        ("[|endofturn|]",),
        words_then("[|endofturn|]"),
        EMPTY_CALLS,
    ),
    "olmo": Family(
        "<|endoftext|>{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ '\n' + m.content }}<|endoftext|>{% if not loop.last %}{{ '\n' }}{% endif %}"
        "{% else %}<|{{ m.role }}|>{{ '\n' + m.content + '\n' }}{% endif %}{% if loop.last and add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}{% endfor %}",
        ("<|padding|>", "<|endoftext|>"),
        ("<|endoftext|>",),
        words_then("<|endoftext|>"),
        EMPTY_CALLS,
    ),
    "openchat": Family(
        "<s>{% for m in messages %}{{ 'GPT4 Correct ' + m.role.title() + ': ' + m.content }}<|end_of_turn|>{% endfor %}"
        "{% if add_generation_prompt %}GPT4 Correct Assistant:{% endif %}",
        ("<unk>", "<s>", "<|end_of_turn|>"),
        ("<|end_of_turn|>",),
        words_then("<|end_of_turn|>", " "),
        EMPTY_CALLS,
    ),
    "falcon": Family(
        "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}{{ m.role | title + ': ' + m.content }}{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n' }}Assistant:{% endif %}",
        ("<|pad|>", "<|endoftext|>"),
        ("<|endoftext|>",),
        words_then("<|endoftext|>", " "),
        EMPTY_CALLS,
    ),
    "seed-oss": Family(
        _LAST_QUESTION
        + "{% for m in messages %}<seed:bos>{{ m.role + '\n' }}{% if m.role == 'assistant' and m.reasoning_content and loop.index0 > ns.last %}"
        "<seed:think>{{ m.reasoning_content }}</seed:think>{% endif %}{{ m.content }}<seed:eos>{% endfor %}{% if add_generation_prompt %}<seed:bos>assistant{{ '\n' }}{% endif %}",
        ("<pad>", "<seed:bos>", "<seed:eos>", "<seed:think>", "</seed:think>"),
        ("<seed:eos>",),
        lambda m: (
            (f"<seed:think>{reasoning_of(m)}</seed:think>" if reasoning_of(m) else "") + content_of(m) + "<seed:eos>"
        ),
        EMPTY_CALLS,
    ),
    "hunyuan": Family(
        "<｜hy_begin｜>{% for m in messages %}{% if m.role == 'user' %}<｜hy_User｜>{{ m.content }}{% elif m.role == 'assistant' %}<｜hy_Assistant｜>{{ m.content }}<｜hy_end｜>"
        "{% elif m.role == 'system' %}{{ m.content }}<｜hy_sep｜>{% endif %}{% endfor %}{% if add_generation_prompt %}<｜hy_Assistant｜>{% endif %}",
        ("<pad>", "<｜hy_begin｜>", "<｜hy_User｜>", "<｜hy_Assistant｜>", "<｜hy_end｜>", "<｜hy_sep｜>"),
        ("<｜hy_end｜>",),
        words_then("<｜hy_end｜>"),
        EMPTY_CALLS,
    ),
    "baichuan": Family(
        "{% for m in messages %}{% if m.role == 'user' %}<reserved_106>{{ m.content }}{% elif m.role == 'assistant' %}<reserved_107>{{ m.content }}</s>"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<reserved_107>{% endif %}",
        ("<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"),
        ("</s>",),
        words_then("</s>"),
        EMPTY_CALLS,
    ),
}
