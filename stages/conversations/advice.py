"""What would keep a row that a plan leaves out, by reason; what a plan says of parts that are not in the text."""

from collections.abc import Mapping

from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations.loss_mask import (
    ANSWER_FIRST,
    EMPTY_ANSWER,
    OTHER_PROMPT,
    REWRITTEN,
    SPECIAL_TOKEN,
    TOKENS_REASON,
    TOO_LONG,
)
from dflash_offline.stages.conversations.tokenize import BAD_ROW, NO_SUPERVISED, NOT_A_BLOCK, TOO_NEAR_END

DUPLICATE = "duplicate"
_TEMPLATE = "--chat-template-kwargs with a chat_template"
_ADVICE = {
    BAD_ROW: "rejects.parquet says what is wrong with each; mend them",
    DUPLICATE: "without --drop-duplicates they are kept",
    TOO_LONG: "split them",
    SPECIAL_TOKEN: "--keep-special-tokens keeps them as the target would be served them; of a plain text every token "
    "is then supervised, the user's too, unless it is given as 'messages'",
    TOKENS_REASON: "without --no-reasoning they are kept",
    OTHER_PROMPT: "the template opens an answer otherwise where it prompts for one than where it writes one, as with a "
    "thought that the answer lacks; --chat-template-kwargs '{\"enable_thinking\": false}' if the template knows that, "
    f"or {_TEMPLATE} that writes both alike or has generation tags",
    ANSWER_FIRST: "--mask last-turn keeps those with another answer; put a user's turn before the first, or use "
    f"{_TEMPLATE} that has generation tags",
    EMPTY_ANSWER: f"{_TEMPLATE} that writes tool calls keeps them",
    NO_SUPERVISED: "`dflash regenerate` answers a last turn that nobody answered; --mask all supervises every token; a "
    "larger --max-length keeps answers beyond it",
    NOT_A_BLOCK: "a smaller --block-size keeps them",
    TOO_NEAR_END: "a smaller --block-size keeps them, or a larger --max-length if they were cut",
}


def advice(reason: str, config: ExtractConfig) -> str:
    """Return the flag or the change that would keep rows which are left out for a reason; empty if none is known."""
    if reason == REWRITTEN:
        if config.mask == "last-turn":
            return f"end them with the answer, or use {_TEMPLATE} that writes answers alike wherever they stand"
        return (
            "the template writes an answer otherwise once another turn follows; --mask last-turn keeps the last answer "
            "of each"
        )
    return _ADVICE.get(reason, "")


def left_out(reason: str, count: int, config: ExtractConfig) -> str:
    """Return how many rows are left out for a reason, and what would keep them."""
    told = advice(reason, config)
    return f"{count:,} rows: {reason}" + (f" ({told})" if told else "")


def not_in_text(dropped: Mapping[str, int]) -> str:
    """Return of how many samples the template dropped which parts, and what would keep those."""
    listed = ", ".join(f"{kind} of {count:,}" for kind, count in dropped.items())
    return f"the chat template drops {listed} samples ({_TEMPLATE} that writes them keeps them)"
