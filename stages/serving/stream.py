"""An answer as a server streams it: server-sent events of the OpenAI protocol, each with the moment it came at."""

import json
import time
from typing import Any

from dflash_offline.stages.answers.exchange import NoAnswerError


class StreamedAnswer:
    """Takes the pieces of a response as they come; what it has read so far stands in its fields."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.first: float | None = None
        """Moment of the first piece of the answer, and of the last."""
        self.last: float | None = None
        self.text = ""
        """Reasoning and content, in the order in which they came."""
        self.ids: list[int] = []
        """Its tokens, where the server gives them."""
        self.prompt_ids: list[int] | None = None
        self.num_tokens: int | None = None
        self.rounds: tuple[list[int], list[int]] | None = None
        """Tokens drafted and tokens accepted in each round, where the server tells them."""
        self.has_ended = False
        self._rest = b""

    def take(self, piece: bytes) -> None:
        """Read another piece; raises `NoAnswerError` if it is none of the protocol's, or says an error."""
        now = time.perf_counter()
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            name, _, value = line.strip().partition(b":")
            if name == b"data" and (data := value.strip()):
                if data == b"[DONE]":
                    self.has_ended = True
                    continue
                try:
                    self._event(json.loads(data), now)
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                    why = f"{type(error).__name__}: {error}"[:200]
                    raise NoAnswerError(f"an event that is no chat completion ({why})", of_row=True) from None

    def _event(self, event: dict[str, Any], now: float) -> None:
        if error := event.get("error"):
            raise NoAnswerError(f"the server says {str(error)[:200]}", of_row=True)
        if usage := event.get("usage"):
            self.num_tokens = int(usage["completion_tokens"])
        if told := (event.get("metrics") or {}).get("speculative_decoding"):
            drafted, accepted = told.get("per_step_drafted"), told.get("per_step_accepted")
            if drafted is not None and accepted is not None and len(drafted) == len(accepted):
                self.rounds = [int(n) for n in drafted], [int(n) for n in accepted]
        self.prompt_ids = event.get("prompt_token_ids") or self.prompt_ids
        for choice in event.get("choices") or ():
            delta, ids = choice.get("delta") or choice, choice.get("token_ids") or []
            self.prompt_ids = choice.get("prompt_token_ids") or self.prompt_ids
            parts = [delta.get(name) or "" for name in ("reasoning_content", "reasoning", "content", "text")]
            said = (parts[0] or parts[1]) + parts[2] + parts[3]
            self.text += said
            self.ids += ids
            if said or ids:
                self.first = now if self.first is None else self.first
                self.last = now
