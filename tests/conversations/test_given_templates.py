"""A chat template given as an argument decides how the mask is told, not the target's own."""

from pathlib import Path

import pytest
from chat_templates import TWO, WORDS_TAGGED, encoder
from tiny_target import WITH_TAGS, WITHOUT_TAGS

from dflash_offline.stages.conversations.content import Chat

ANSWERS = "a red dog<|im_end|>the bird sees<|im_end|>"


@pytest.mark.parametrize("own", ["tags", "words", "none", "qwen3"])
@pytest.mark.parametrize(
    ("given", "how"),
    [
        (WITH_TAGS, "generation tags"),
        (WORDS_TAGGED, "generation tags"),
        (WORDS_TAGGED.replace("{% generation %}", "{%- generation -%}"), "generation tags"),
        (WITHOUT_TAGS, "rendering turn by turn"),
    ],
)
def test_tags_of_a_given_template_are_used_and_its_lack_of_them_is_known(
    tmp_path: Path, own: str, given: str, how: str
) -> None:
    made = encoder(tmp_path, own, {"chat_template": given})
    sample = made.encode(Chat(TWO))
    assert made.mask_rule == f"assistant, from {how}"
    assert made.tokenizer.decode(sample.input_ids[sample.loss_mask].tolist()) == ANSWERS
