"""Token ids as text: a token's text depends on the tokens before it, and a character may span several tokens."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
"""A function that turns token ids into text, special tokens included."""
_UNFINISHED = "\ufffd"
_WINDOW = 16
"""Number of tokens after which an unfinished character is taken for broken; no character has as many bytes."""


def token_texts(ids: Sequence[int], decode: Decode, context: Sequence[int] = ()) -> list[str]:
    """Return the text that each token adds after `context`; joined, these are the text of all tokens.

    A token that only begins a character adds nothing, and the one that completes it adds the character.
    """
    everything = [*context[-4:], *ids]
    first = len(everything) - len(ids)
    texts: list[str] = []
    begin, read = 0, first  # what stands before `read` has been given out; decoding begins at `begin`
    for i in range(first, len(everything)):
        known = decode(everything[begin:read]) if read > begin else ""
        text = decode(everything[begin : i + 1])
        unfinished = text.endswith(_UNFINISHED) and i + 1 - read < _WINDOW and i + 1 < len(everything)
        if unfinished:
            texts.append("")
            continue
        texts.append(text[len(known) :])
        begin, read = read, i + 1
    return texts


def visible(text: str) -> str:
    """Return text in which every character that is invisible, or reorders others, is written as its number.

    Line ends are shown, and stay.
    """
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character.isprintable() or character == "\t":
        return character
    number = ord(character)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
