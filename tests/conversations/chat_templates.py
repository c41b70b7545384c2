"""Chat templates of the shapes that models ship, conversations for them, and an encoder for each."""

from pathlib import Path
from typing import Any

from tiny_target import SPECIAL, WITH_TAGS, WITHOUT_TAGS, save_tokenizer
from transformers import AutoTokenizer, Qwen3Config

from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations.loss_mask import ConversationEncoder
from dflash_offline.stages.target.files import TargetFiles

# Reasoning is written for the turns after the last question alone, and always there, even if empty.
QWEN3_LIKE = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>{{ '\n' + (m.reasoning_content or '') + '\n' }}"
    "</think>{{ '\n\n' }}{% endif %}{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}"
    "{% if enable_thinking is false %}<think>{{ '\n\n' }}</think>{{ '\n\n' }}{% endif %}{% endif %}"
)
# No tags, headers around roles, a system turn even if there is none, contents trimmed.
LLAMA_LIKE = (
    "<|bos|>{% if messages[0].role != 'system' %}<|head|>system<|/head|>{{ '\n\n' }}cutting date<|eot|>{% endif %}"
    "{% for m in messages %}<|head|>{{ m.role }}<|/head|>{{ '\n\n' + m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>{{ '\n\n' }}{% endif %}"
)
# The system text is folded into the first question, the assistant has another name, turns must alternate.
GEMMA_LIKE = (
    "<bos>{% set first = '' %}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Turns must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}{{ '\n' }}"
    "{% if loop.first %}{{ first }}{% endif %}{{ m.content | trim }}<end_of_turn>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}"
)
# Channels; the reasoning of earlier turns is dropped, and the last answer ends in another token than they do.
GPT_OSS_LIKE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if loop.last and m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# No prompt for an answer; the system text stands before the last question, so that it moves as turns are added.
MISTRAL_LIKE = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}{% set ns = namespace(last=0) %}"
    "{% for m in turns %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "<s>{% for m in turns %}{% if m.role == 'user' %}[INST]"
    "{% if system and loop.index0 == ns.last %} {{ system }}{{ '\n\n' }}{% endif %} {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
# Roles are tokens, what precedes </think> is dropped from every answer, and the prompt may open a <think>.
DEEPSEEK_LIKE = (
    "<｜begin｜>{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end｜>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% if thinking %}<think>{{ '\n' }}{% endif %}{% endif %}"
)
# The tags enclose the words alone, so that the end of the turn stands after them.
WORDS_TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>{{ '\n' }}"
    "{% endfor %}"
)
SHAPES = {
    "tags": (WITH_TAGS, SPECIAL, "<|im_end|>"),
    "words": (WORDS_TAGGED, SPECIAL, "<|im_end|>"),
    "none": (WITHOUT_TAGS, SPECIAL, "<|im_end|>"),
    "qwen3": (QWEN3_LIKE, SPECIAL, "<|im_end|>"),
    "llama": (LLAMA_LIKE, ("<|pad|>", "<|bos|>", "<|head|>", "<|/head|>", "<|eot|>"), "<|eot|>"),
    "gemma": (GEMMA_LIKE, ("<pad>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "gpt-oss": (
        GPT_OSS_LIKE,
        ("<|pad|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        "<|return|>",
    ),
    "mistral": (MISTRAL_LIKE, ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), "</s>"),
    "deepseek": (DEEPSEEK_LIKE, ("<pad>", "<｜begin｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end｜>"), "<｜end｜>"),
}
ONE = [{"role": "user", "content": "two cats"}, {"role": "assistant", "content": "a red dog"}]
TWO = [*ONE, {"role": "user", "content": "one"}, {"role": "assistant", "content": "the bird sees"}]


def encoder(folder: Path, shape: str, kwargs: dict[str, Any] | None = None, **settings: Any) -> ConversationEncoder:
    template, special, eos = SHAPES[shape]
    tokenizer = save_tokenizer(folder, template, special=special, eos=eos)
    files = TargetFiles(
        folder=folder,
        name=shape,
        config=Qwen3Config(vocab_size=400, eos_token_id=tokenizer.eos_token_id),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        template=template,
    )
    config = ExtractConfig(
        data=(Path("d"),), target=shape, out=Path("o"), chat_template_kwargs=kwargs or {}, **settings
    )
    return ConversationEncoder(files, config)
