"""Tokens as text, each where it stands: a token's text depends on those before it, and a character may span several."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
"""Turns token ids into text, special tokens written out."""
_UNFINISHED = "\ufffd"
_WINDOW = 16
"""Tokens of an unfinished character before it is taken as broken for good; no character has as many bytes."""


def token_texts(ids: Sequence[int], decode: Decode, context: Sequence[int] = ()) -> list[str]:
    """Return the text that each token adds after `context`; together they are the text of them all.

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
    """Return text with every character that would be invisible, or would reorder others, written as its number.

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
