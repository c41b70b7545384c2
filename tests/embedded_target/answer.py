"""The target's greedy answers with the likelihood of each token, for its measurements.

Written apart from `dflash regenerate`, which makes the shipped conversations, so that the two can be compared.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from embedded_target.conversations import Conversation, Message
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_NEW_TOKENS = 256
BATCH = 64


@dataclass(kw_only=True)
class Answered:
    """A conversation as the target carries it on."""

    conversation: Conversation
    messages: list[Message] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    """Negative log-likelihood of each answer token, end of turn included, in nats."""
    failure: str | None = None
    """Why the conversation stopped: "length" or "empty"; None when every turn was answered."""

    def ask(self) -> bool:
        """Move on to the next assistant turn; return False where there is none."""
        rest = self.conversation.messages[len(self.messages) :]
        if self.failure or not rest:
            return False
        self.messages += [dict(message) for message in rest[: [m["role"] for m in rest].index("assistant")]]
        return True


def load(folder: Path) -> tuple[Any, Any]:
    """Return the target in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, prompts: list[list[Message]]) -> list[tuple[list[int], list[float]]]:
    """Return the greedy answer of each prompt: its token ids, and the negative log-likelihood of each.

    An answer ends with the end-of-turn token unless it has MAX_NEW_TOKENS. Batching does not change an answer
    except where two tokens tie.
    """
    encoded = tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
        tokenizer_kwargs={"padding_side": "left"},
    )
    made = model.generate(
        **encoded, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, output_logits=True, return_dict_in_generate=True
    )
    new_BS = made.sequences[:, encoded["input_ids"].shape[1] :]
    chosen = [-step.log_softmax(-1).gather(1, new_BS[:, i, None]) for i, step in enumerate(made.logits)]
    answers = []
    for ids, nll in zip(new_BS.tolist(), torch.cat(chosen, 1).tolist(), strict=True):
        end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
        answers.append((ids[:end], nll[:end]))
    return answers


def answer(model: Any, tokenizer: Any, conversations: Iterable[Conversation]) -> list[Answered]:
    """Return the conversations, in order, with the target's answers in place of the references."""
    all_answered = [Answered(conversation=conversation) for conversation in conversations]
    while waiting := [one for one in all_answered if one.ask()]:
        waiting.sort(key=lambda one: (one.conversation.kind, len(str(one.messages))))
        for start in range(0, len(waiting), BATCH):
            group = waiting[start : start + BATCH]
            for one, (ids, nll) in zip(group, greedy(model, tokenizer, [o.messages for o in group]), strict=True):
                said = tokenizer.decode(ids, skip_special_tokens=True)
                if ids[-1] != tokenizer.eos_token_id:
                    one.failure = "length"
                elif not said.strip():
                    one.failure = "empty"
                one.messages.append({"role": "assistant", "content": said})
                one.nll += nll
    return all_answered
