"""Prompts of several turns, each turn behind the target's own answers to those before it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.stages.conversations.prompts import Prompt, encode_prompt
from dflash_offline.stages.draft.decode import plain_decode
from dflash_offline.stages.evaluation.decoding import chooser_for
from dflash_offline.stages.progress import Progress


def stop_ids(target: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: the target's generation settings', else the tokenizer's."""
    ids = target.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def all_turns(
    prompts: Sequence[Prompt],
    config: EvalConfig,
    target: Any,
    tokenizer: Any,
    progress: Progress,
) -> list[Prompt]:
    """Return a prompt for each turn; what the target answers to the earlier ones stands in the later ones.

    Answers are written into the conversation without special tokens, as the reference benchmark does.
    """
    several = sum(1 for prompt in prompts if prompt.then)
    if not several:
        return list(prompts)
    found: list[Prompt] = []
    stops = stop_ids(target, tokenizer)
    progress.start("Answering first turns", several, "prompts")
    try:
        for index, prompt in enumerate(prompts):
            found.append(replace(prompt, then=()))
            for turn, said in enumerate(prompt.then, start=2):
                ids = encode_prompt(found[-1], tokenizer, config.chat_template_kwargs)
                chooser = chooser_for(config, target.device, f"turn {index} {turn}")
                answer = plain_decode(target, ids, config.max_new_tokens, stops, chooser).tokens
                text = tokenizer.decode(answer, skip_special_tokens=True)
                messages = [*(found[-1].messages or ()), {"role": "assistant", "content": text}]
                messages.append({"role": "user", "content": said})
                found.append(replace(found[-1], place=f"{prompt.place}, turn {turn}", messages=messages))
            if prompt.then:
                progress.advance(1)
    finally:
        progress.finish()
    return found
