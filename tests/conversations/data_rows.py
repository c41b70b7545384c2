"""Rows that are bad in every way, and Arrow files to hold good ones."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

DEEP = 100_000


def one(role: object, content: object, **more: object) -> bytes:
    """Return a line whose second message is the one given."""
    question = {"role": "user", "content": "two"}
    return json.dumps({"messages": [question, {"role": role, "content": content, **more}]}).encode()


BAD: dict[str, tuple[Callable[[random.Random], bytes], str]] = {
    "broken UTF-8": (lambda r: one("user", "a").replace(b"two", bytes([r.choice([0x80, 0xC3, 0xFF])])), "is not UTF-8"),
    "surrogate bytes": (lambda r: one("user", "a").replace(b"two", b"\xed\xa0\x80"), "is not UTF-8"),
    "UTF-16": (lambda r: one("user", "a").decode().encode("utf-16-be").replace(b"\n", b""), "is not JSON"),
    "a NUL byte": (lambda r: b"\0" + one("user", "a"), "is not JSON"),
    "cut": (lambda r: (line := one("user", "a"))[: r.randrange(1, len(line))], "is not JSON"),
    "raw control character": (lambda r: one("user", "a").replace(b"two", bytes([r.randrange(1, 9)])), "is not JSON"),
    "unpaired surrogate": (lambda r: one("assistant", "\ud800"), "unpaired surrogate"),
    "null": (lambda r: b"null", "is a JSON NoneType"),
    "number": (lambda r: str(r.random()).encode(), "is a JSON float"),
    "huge number": (lambda r: b"9" * 5000, "is not JSON"),
    "list": (lambda r: b"[" + one("user", "a") + b"]", "is a JSON list"),
    "deep": (lambda r: b"[" * DEEP, "is nested more than 100 deep"),
    "deep object": (lambda r: b'{"messages":' * DEEP, "is nested more than 100 deep"),
    "no keys": (lambda r: b"{}", "has none of the keys"),
    "null messages": (lambda r: b'{"messages": null}', "has no list 'messages'"),
    "null turn": (lambda r: b'{"messages": [null]}', "messages[0] of type NoneType"),
    "number as role": (lambda r: one(r.choice([1, None, [], {}, True]), "a"), "messages[1].role"),
    "number as content": (lambda r: one("user", r.choice([1, 1.5, {}, True, [3]])), "messages[1].content"),
    "picture": (lambda r: one("user", [{"type": "image_url", "image_url": "x"}]), "'image_url'; expected parts"),
    "empty turn": (lambda r: one("assistant", r.choice(["", " ", "\n\t", None])), "messages[1].content"),
    "doubled key": (lambda r: one("user", "a").replace(b'{"role"', b'{"role": "user", "role"'), "'role' twice"),
    "string as calls": (lambda r: one("assistant", "a", tool_calls="x"), "tool_calls of type str"),
    "nameless call": (lambda r: one("assistant", "a", tool_calls=[{"function": {}}]), "without a function"),
    "calls not JSON": (
        lambda r: one("assistant", "a", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
        "is not JSON",
    ),
    "number as reasoning": (lambda r: one("assistant", "a", reasoning_content=3), "reasoning_content of type int"),
    "tools": (lambda r: json.dumps({**json.loads(one("user", "a")), "tools": [3]}).encode(), "tools that are not"),
    "ShareGPT": (lambda r: b'{"conversations": [{"from": "robot", "value": "a"}]}', "conversations[0].from 'robot'"),
    "ShareGPT null": (lambda r: b'{"conversations": [{"from": "gpt", "value": null}]}', "conversations[0].content"),
    "response": (lambda r: b'{"prompt": "a", "response": 3}', "response.content of type int"),
    "text": (lambda r: b'{"text": ["a"]}', "text of type list"),
    "tokens": (lambda r: b'{"input_ids": [1, -2], "loss_mask": [1, 1]}', "input_ids that are not all"),
    "mask": (lambda r: b'{"input_ids": [1, 2], "loss_mask": [1, 2]}', "loss_mask that is not all"),
    "lengths": (lambda r: b'{"input_ids": [1, 2], "loss_mask": [1]}', "2 input_ids and a loss_mask of 1"),
    "tokens as text": (lambda r: b'{"input_ids": "1 2", "loss_mask": "1 2"}', "input_ids of type str"),
}


def write_arrow(path: Path, rows: list[dict[str, Any]], *, stream: bool) -> Path:
    table = pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path
