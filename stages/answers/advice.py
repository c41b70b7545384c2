"""What would keep an answer that is left out, by reason; what is said where the first answers all are."""

from collections.abc import Iterable, Mapping

from dflash_offline.schemas.errors import DflashError
from dflash_offline.stages.answers.dialogues import (
    BAD_ROW,
    NO_USER_TURN,
    PLAIN_TEXT,
    PROMPT_TOO_LONG,
    REFUSED_BY_TEMPLATE,
    TOKENS,
    TRUNCATED,
    Answer,
    Dialogue,
)

EMPTY = "empty answer"
ENDED_OTHERWISE = "answer ended otherwise"
NO_ANSWER = "no answer from the server"
OTHER_TOKENS = "answer's text has other tokens"
REFUSED = "refused by the server"
REWRITTEN = "template writes the answer otherwise"
SPECIAL = "special token in answer"
SPELLS_KEY = "answer spells the key"
UNREADABLE_CALL = "call of a tool cannot be read"
_ADVICE = {
    BAD_ROW: "mend them; the detail says what is wrong with each",
    NO_USER_TURN: "put a user's turn before the first answer",
    PLAIN_TEXT: "give them as 'messages'",
    TOKENS: "give them as 'messages'",
    PROMPT_TOO_LONG: "split them, or use a target of more positions",
    REFUSED_BY_TEMPLATE: "change what the template refuses, or give another by --chat-template-kwargs with a "
    "chat_template",
    TRUNCATED: "a larger --max-new-tokens keeps them where the target ends at all; a prompt that asks for no thoughts, "
    "as --chat-template-kwargs '{\"enable_thinking\": false}' does for some templates, shortens them",
    EMPTY: "nothing was said; a --temperature above 0 with another --seed may give words",
    ENDED_OTHERWISE: "the server stopped them; change what makes it, such as its filter",
    NO_ANSWER: "a larger --timeout-s or --row-tries may get them",
    OTHER_TOKENS: "--keep-rewritten keeps them: drafts then train on the tokens of the text instead",
    REFUSED: "the detail says why; often a prompt and --max-new-tokens that exceed the server's --max-model-len",
    REWRITTEN: "--keep-rewritten keeps them: drafts then train on what the template makes of them; or give a template "
    "that writes answers as they were said by --chat-template-kwargs with a chat_template",
    SPECIAL: "put a response_template that reads the target's answers into its tokenizer_config.json, or let a server "
    "that reads them answer (--server)",
    SPELLS_KEY: "the server repeats the key that it was sent: use another server, or a key that may be seen",
    UNREADABLE_CALL: "let the server read the target's calls, as vLLM does with --enable-auto-tool-choice and the "
    "--tool-call-parser of the target's family",
}
_OF_PROMPTS = {PROMPT_TOO_LONG, REFUSED_BY_TEMPLATE}
"""Reasons for which nothing was asked."""


def advice(reason: str) -> str:
    """Return the flag or the change that would keep what is left out for a reason; empty if none is known."""
    return _ADVICE.get(reason, "")


def left_out(counts: Mapping[str, int]) -> list[str]:
    """Return a line for each reason: how many rows are left out for it, and what would keep them."""
    lines = []
    for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        told = advice(reason)
        lines.append(f"{count:,} rows: {reason}" + (f" ({told})" if told else ""))
    return lines


class FirstAnswers:
    """The first answers of a command, held back while all of them are rejected for one reason."""

    def __init__(self, most: int) -> None:
        self._most = most
        """Rejections that are too many; 0 for any number."""
        self._held: list[tuple[Dialogue, Answer]] | None = [] if most else None

    def passed(
        self, answered: Iterable[tuple[Dialogue, Answer]], under_way: int | None
    ) -> list[tuple[Dialogue, Answer]]:
        """Return the answers that may be kept now, those before included, in the order in which they came.

        `under_way` is the number of the oldest row that is still being answered: rejections come quicker than answers,
        so only those before it are looked at. Raises `DflashError` once too many are rejected for one reason.
        """
        if self._held is None:
            return [*answered]
        self._held += answered
        judged = [pair for pair in self._held if pair[1].fault not in _OF_PROMPTS]
        reasons = {answer.fault for _, answer in judged}
        if len(reasons) > 1 or "" in reasons:
            return self.rest()
        oldest = [pair for pair in judged if under_way is None or pair[0].index < under_way]
        if len(oldest) >= self._most:
            last = oldest[-1][1]
            raise DflashError(
                f"The first {len(oldest)} answers were all left out: {last.fault} (the last: {last.detail}).\n"
                f"To keep such answers: {advice(last.fault) or 'see the detail'}.\n"
                f"Nothing of them is kept. --stop-after-rejected 0 goes on all the same."
            )
        return []

    def rest(self) -> list[tuple[Dialogue, Answer]]:
        """Return what is held back; nothing is from now on."""
        held, self._held = self._held or [], None
        return held
