"""Prompts and responses of a machine's world: logs, configs, code, queries, traces and the babble of a Markov chain.

A row is {"prompt": ..., "response": ...}. A response of the kinds `log` and `babble` is drawn
from a grammar that the prompt only begins, so that much of it cannot be known; the others follow from the prompt.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

Drawn = tuple[str, str]
HELD_OUT_OF = 20
"""One in this many prompts is held out."""

SERVICES = "auth billing cache cron edge gateway indexer ledger mailer queue relay vault".split()
EVENTS = {
    "start": ("listen", "load"),
    "load": ("listen", "warn"),
    "listen": ("accept", "accept", "idle"),
    "accept": ("read", "read", "deny"),
    "read": ("reply", "reply", "retry"),
    "retry": ("read", "drop"),
    "reply": ("accept", "idle", "flush"),
    "deny": ("accept", "idle"),
    "idle": ("accept", "flush"),
    "flush": ("idle", "accept"),
    "drop": ("warn", "accept"),
    "warn": ("listen", "stop"),
    "stop": ("start",),
}
SAYS = {
    "start": "INFO  service starting with pid {n}",
    "load": "INFO  loaded {n} keys from /etc/{service}.conf",
    "listen": "INFO  listening on port {port}",
    "accept": "DEBUG accepted connection #{n} from {host}",
    "read": "DEBUG read {n} bytes from {host}",
    "reply": "INFO  replied 200 to {host} in {ms} ms",
    "retry": "WARN  timeout from {host}, retrying in {ms} ms",
    "deny": "ERROR denied {host}: bad signature",
    "idle": "DEBUG idle for {ms} ms",
    "flush": "INFO  flushed {n} records to disk",
    "drop": "ERROR dropped connection #{n} from {host}",
    "warn": "WARN  memory at {ms} percent of limit",
    "stop": "INFO  service stopping",
}
KEYS = "timeout retries workers backlog region bucket secret level limit prefix shard ttl window zone".split()
WORDS = "north south east west blue amber slate coral iron cedar delta omega sigma quartz".split()
FIELDS = "id name size color owner price stock weight created updated status rank".split()
TABLES = "orders parts users visits grants crates routes tokens".split()
TYPES = {"int": "i64", "text": "String", "flag": "bool", "real": "f64"}
BABBLE = [
    first + last for first in "ba ke li mo nu ra so ti vu za".split() for last in "dor fen gal him jos lun".split()
]


def log(rng: random.Random) -> Drawn:
    """Lines of a service's log: a walk over its states, with clock, hosts and numbers of its own."""
    service, num, event = rng.choice(SERVICES), rng.randint(3, 6), rng.choice(list(EVENTS))
    hour, minute, second = rng.randint(0, 23), rng.randint(0, 59), rng.randint(0, 59)
    host, port = f"10.0.{rng.randint(0, 9)}.{rng.randint(1, 99)}", rng.choice((80, 443, 5432, 8080))
    prompt = f"log {service} {hour:02}:{minute:02}:{second:02} port {port} host {host} after {event}, {num} lines"
    lines = []
    for count in range(1, num + 1):
        event = rng.choice(EVENTS[event])
        second += rng.choice((1, 1, 1, 2, 5))
        minute, second = minute + second // 60, second % 60
        hour, minute = (hour + minute // 60) % 24, minute % 60
        said = SAYS[event].format(n=count, service=service, port=port, host=host, ms=rng.choice((5, 20, 80)))
        lines.append(f"{hour:02}:{minute:02}:{second:02} {service} {said}")
    return prompt, "\n".join(lines)


def config(rng: random.Random) -> Drawn:
    """The same settings, from one line to a nested block."""
    section, keys = rng.choice(SERVICES), rng.sample(KEYS, rng.randint(3, 5))
    values = [rng.choice((str(rng.randint(1, 999)), rng.choice(WORDS), rng.choice(("true", "false")))) for _ in keys]
    pairs = list(zip(keys, values, strict=True))
    prompt = f"block {section}: " + " ".join(f"{key}={value}" for key, value in pairs)
    if rng.random() < 0.5:
        return prompt, f"[{section}]\n" + "\n".join(f"{key} = {value}" for key, value in pairs)
    return prompt + " as yaml", f"{section}:\n" + "\n".join(f"  {key}: {value}" for key, value in pairs)


def struct(rng: random.Random) -> Drawn:
    """A struct and its constructor."""
    name, fields = rng.choice(TABLES)[:-1].capitalize(), rng.sample(FIELDS, rng.randint(2, 3))
    kinds = [rng.choice(list(TYPES)) for _ in fields]
    pairs = [(field, TYPES[kind]) for field, kind in zip(fields, kinds, strict=True)]
    body = "".join(f"    {field}: {kind},\n" for field, kind in pairs)
    arguments = ", ".join(f"{field}: {kind}" for field, kind in pairs)
    new = f"fn new({arguments}) -> {name} {{\n    {name} {{ {', '.join(fields)} }}\n}}"
    prompt = f"struct {name} with " + ", ".join(f"{kind} {field}" for field, kind in zip(fields, kinds, strict=True))
    return prompt, f"struct {name} {{\n{body}}}\n\n{new}"


def query(rng: random.Random) -> Drawn:
    """A query in words as one in SQL."""
    table, shown, by = rng.choice(TABLES), rng.sample(FIELDS, rng.randint(1, 3)), rng.choice(FIELDS)
    field, number, above = rng.choice(FIELDS), rng.randint(2, 500), rng.random() < 0.5
    order = rng.choice(("asc", "desc"))
    prompt = f"query {table}: {' '.join(shown)} where {field} {'above' if above else 'below'} {number} by {by} {order}"
    sign = ">" if above else "<"
    return prompt, (
        f"SELECT {', '.join(f'{table}.{one}' for one in shown)}\nFROM {table}\n"
        f"WHERE {table}.{field} {sign} {number}\nORDER BY {table}.{by} {order.upper()};"
    )


def trace(rng: random.Random) -> Drawn:
    """The stack after every operation of a short program."""
    stack, operations, lines = [], [], []
    for _ in range(rng.randint(4, 7)):
        names = ["push"] * 2 + (["dup", "drop"] if stack else []) + (["add", "swap"] * 2 if len(stack) > 1 else [])
        name = rng.choice(names)
        if name == "push":
            stack.append(rng.randint(1, 9))
            name = f"push {stack[-1]}"
        elif name == "dup":
            stack.append(stack[-1])
        elif name == "drop":
            stack.pop()
        elif name == "add":
            stack[-2:] = [stack[-2] + stack[-1]]
        else:
            stack[-2:] = stack[:-3:-1]
        operations.append(name)
        lines.append(f"{name:<8}| {' '.join(map(str, stack))}".rstrip())
    return f"trace {'; '.join(operations)}", "\n".join(lines)


def babble(rng: random.Random) -> Drawn:
    """Words of a chain in which the last one leaves three to follow, each of its own likelihood."""
    word = rng.choice(BABBLE)
    said = [word]
    for _ in range(rng.randint(12, 24)):
        at = BABBLE.index(word)
        word = rng.choices([BABBLE[(7 * at + step) % len(BABBLE)] for step in (3, 11, 29)], (6, 3, 1))[0]
        said.append(word)
    return f"babble from {said[0]} {said[1]}, {len(said) - 2} words", " ".join(said[2:]) + "."


KINDS: dict[str, Callable[[random.Random], Drawn]] = {
    one.__name__: one for one in (log, config, struct, query, trace, babble)
}


def generate(split: str, seed: int) -> Iterator[Drawn]:
    """Yield the endless (prompt, response) of a split, all kinds equally often; the same seed yields the same ones."""
    rng = random.Random(f"second {split} {seed}")
    while True:
        prompt, response = KINDS[rng.choice(list(KINDS))](rng)
        digest = hashlib.sha256(prompt.encode()).digest()
        if (int.from_bytes(digest[:4], "big") % HELD_OUT_OF == 0) == (split == "heldout"):
            yield prompt, response


def write(out: Path, num: int, split: str, seed: int) -> None:
    """Write the first `num` rows of a split."""
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = islice(generate(split, seed), num)
    out.write_text("".join(json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in rows))
