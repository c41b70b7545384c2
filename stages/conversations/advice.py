"""What would keep a row that a plan leaves out, by reason; what a plan says of parts that are not in the text."""

from collections.abc import Mapping

from dflash_offline.stages.conversations.content import OTHERS_LEARNED, ROW_SHARE
from dflash_offline.stages.conversations.loss_mask import SPECIAL_TOKEN, TOKENS_REASON
from dflash_offline.stages.conversations.rendering import (
    ALL_CONTEXT,
    ANSWER_FIRST,
    AS_TEXT,
    CONTEXT,
    CONTEXT_LEARNED,
    EMPTY_ANSWER,
    OTHER_PROMPT,
    REFUSED_TURN,
    REWRITTEN,
    TOO_LONG,
)
from dflash_offline.stages.conversations.tokenize import BAD_ROW, NO_SUPERVISED, NONE_FOLLOWS, NOT_A_BLOCK, TOO_NEAR_END

DUPLICATE = "duplicate"
_TEMPLATE = "--chat-template-kwargs with a chat_template"
_ADVICE = {
    ALL_CONTEXT: "the data marks every answer that --mask names as one not to be learned; --mask assistant keeps those "
    "with another answer, --mask all supervises every token, and without the marks in the data they are kept",
    BAD_ROW: "without --skip-bad-rows the first are named, and rejects.parquet of a cache says what is wrong with "
    "each; mend them",
    DUPLICATE: "without --drop-duplicates they are kept",
    TOO_LONG: "split them",
    SPECIAL_TOKEN: "--keep-special-tokens keeps them as the target would be served them; of a plain text every token "
    "is then supervised, the user's too, unless it is given as 'messages'",
    TOKENS_REASON: "without --no-reasoning they are kept",
    OTHER_PROMPT: "the template opens an answer otherwise where it prompts for one than where it writes one, as with a "
    "thought that the answer lacks; --chat-template-kwargs '{\"enable_thinking\": false}' if the template knows that, "
    f"or {_TEMPLATE} that writes both alike or has generation tags",
    ANSWER_FIRST: f"put a user's turn before it, or use {_TEMPLATE} that has generation tags; other answers of its "
    "conversation are kept",
    REFUSED_TURN: "a server could not be asked for that answer either: mend the turns before it, or use "
    f"{_TEMPLATE} that renders them",
    REWRITTEN: "this cache was planned when such conversations were left out: extracting into a new --out keeps them, "
    "a sample an answer",
    EMPTY_ANSWER: f"{_TEMPLATE} that writes tool calls keeps them, and so does --mask last-turn where the last answer "
    "is written",
    NO_SUPERVISED: "`dflash regenerate` answers a last turn that nobody answered; --mask all supervises every token; a "
    "larger --max-length keeps answers beyond it",
    NOT_A_BLOCK: "a smaller --block-size keeps them, or --anchors partial",
    TOO_NEAR_END: "a smaller --block-size keeps them, or --anchors partial, or a larger --max-length if they were cut",
    NONE_FOLLOWS: "a larger --block-size keeps them, or a larger --max-length if they were cut",
}


def advice(reason: str) -> str:
    """Return the flag or the change that would keep rows which are left out for a reason; empty if none is known."""
    return _ADVICE.get(reason, "")


def left_out(reason: str, count: int, what: str = "rows") -> str:
    """Return how many rows, or answers of conversations that are kept, are left out for a reason, and what would keep
    them."""
    told = advice(reason)
    return f"{count:,} {what}: {reason}" + (f" ({told})" if told else "")


def split_up(split: Mapping[str, int], num_tokens: int) -> str:
    """Return how many conversations became several samples, and what that costs of the plan's tokens."""
    more = split["more_tokens"]
    return (
        f"{split['conversations']:,} conversations whose history the chat template rewrites, into {split['samples']:,} "
        f"samples, an answer each after its history as served; {more:,} tokens more than of the longest of each alone, "
        f"{more / num_tokens:.0%} of all (--mask last-turn takes the last answer alone)"
    )


def not_in_text(dropped: Mapping[str, int]) -> str:
    """Return of how many samples the template dropped which parts, and what would keep those."""
    listed = ", ".join(f"{kind} of {count:,}" for kind, count in dropped.items())
    return f"the chat template drops {listed} samples ({_TEMPLATE} that writes them keeps them)"


_NOTES = {
    AS_TEXT: "the template cannot write them as objects, as others do",
    CONTEXT: "the data marks them as not to be learned, and they are not supervised; take the marks out of the data to "
    "have them supervised",
    CONTEXT_LEARNED: "--mask all supervises every token, whatever the data marks",
    OTHERS_LEARNED: "a draft learns what the assistant says, and these are not supervised; --mask all supervises every "
    "token",
    ROW_SHARE: "every row counts alike here; `a.jsonl:0.3` takes a share of a file's rows",
}


def noted(kind: str, count: int) -> str:
    """Return of how many samples something is to be said, and what follows from it."""
    return f"{kind} in {count:,} samples ({_NOTES[kind]})"
