"""Which positions of a document anchor a block."""

from typing import NamedTuple

WHOLE, PARTIAL = ANCHORS = ("whole", "partial")
"""What a user may ask for; where a document, a plan or a run says nothing, it was made by the first."""


class AnchorRule(NamedTuple):
    """A supervised position anchors a block if enough of its document follows."""

    tokens: int
    """The position and those behind it that count, at least 2."""
    kind: str = WHOLE
    """whole: all of them lie in the document. partial: one behind the position is supervised; others may be missing."""

    @property
    def wanted(self) -> str:
        """What an anchor is, in words that follow "a supervised position with"."""
        if self.kind == WHOLE:
            return "a whole block after it"
        return f"a supervised token among the {self.tokens - 1} after it"
