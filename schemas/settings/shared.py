"""What the settings of several commands share: the choices, and how a wrong one is told."""

import difflib
from typing import Any

from dflash_offline.schemas.errors import DflashError


def choice_problem(name: str, value: str | None, allowed: tuple[str, ...]) -> str | None:
    """Return what is wrong with a setting that takes one of a few names, with the nearest of them; None for nothing."""
    if value is None or value in allowed:
        return None
    near = difflib.get_close_matches(value, allowed, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{name} is {value!r}; expected {', '.join(allowed[:-1])} or {allowed[-1]}.{hint}"


def choice_problems(config: Any, **choices: tuple[str, ...]) -> list[str]:
    """Return what is wrong with those settings of a config that take one of a few names."""
    found = (choice_problem(name, getattr(config, name), allowed) for name, allowed in choices.items())
    return [problem for problem in found if problem]


def refuse(what: str, problems: list[str]) -> None:
    if problems:
        raise DflashError(f"These settings of `dflash {what}` cannot be used:\n  " + "\n  ".join(problems))


RESERVED_TEMPLATE_KWARGS = {
    "conversation",
    "messages",
    "tokenize",
    "tokenizer_kwargs",
    "add_generation_prompt",
    "continue_final_message",
}


def template_problems(kwargs: dict[str, Any]) -> list[str]:
    """Return what is wrong with a user's arguments to the chat template: those that this program sets itself."""
    taken = sorted(name for name in kwargs if name in RESERVED_TEMPLATE_KWARGS or name.startswith("return_"))
    return [f"chat_template_kwargs holds {', '.join(taken)}, which this program sets itself."] if taken else []


DTYPES = ("auto", "float32", "bfloat16", "float16")
