"""Arguments that several commands have, and what they are converted to."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.schemas.settings.extract import MASKS, ExtractConfig
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.schemas.settings.shared import DTYPES
from dflash_offline.schemas.settings.toml import read_settings, require_fields
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.schemas.settings.verify import RerunConfig

_INPUT_FORMATS = "json jsonl parquet arrow messages sharegpt prompt-response text tokens".split()
Config = TypeVar("Config", ExtractConfig, RerunConfig, TrainConfig, EvalConfig, RegenerateConfig)
Number = TypeVar("Number", int, float)


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Return what completes an option that takes one of a few names; a wrong one is refused with all other settings."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the result and errors.")]
LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", help="Progress on stderr for people, or as events, a JSON object a line.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Html = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write a page that opens in a browser, without network.")
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="cpu, cuda or cuda:N; auto takes a GPU if there is one.",
        autocompletion=one_of("auto", "cpu", "cuda", "cuda:0"),
    ),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
TemplateKwargs = Annotated[
    str, typer.Option(metavar="JSON", help="""Passed to the chat template, e.g. '{"enable_thinking": false}'.""")
]
InputFormat = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[,NAME]",
        autocompletion=one_of(*_INPUT_FORMATS),
        help="json, jsonl, parquet or arrow, and/or messages, sharegpt, prompt-response, text or tokens, as in "
        "parquet,messages. [default: found out]",
    ),
]
Mask = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Supervised: every assistant turn, the last-turn, or all tokens.",
        autocompletion=one_of(*MASKS),
    ),
]
NoReasoning = Annotated[bool, typer.Option("--no-reasoning", help="Leave an answer's reasoning unsupervised.")]
KeepSpecialTokens = Annotated[
    bool, typer.Option("--keep-special-tokens", help="Keep rows whose text spells a special token, as it is served.")
]
Limit = Annotated[int | None, typer.Option(help="Rows read, at most. [default: all]")]
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave unusable rows out, counted, instead of stopping.")
]
TargetDtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="float32, bfloat16 or float16; auto is float32 on the CPU, else the checkpoint's.",
        autocompletion=one_of(*DTYPES),
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="auto spreads a target that is larger than one GPU over all of them."),
]
Attention = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Of the target, as transformers names it: sdpa, eager, flash_attention_2, ...",
        autocompletion=one_of("sdpa", "eager", "flash_attention_2", "flex_attention"),
    ),
]
Target = Annotated[str, typer.Option(metavar="MODEL", help="Hugging Face model: a folder, or a hub id.")]
Revision = Annotated[str | None, typer.Option(metavar="NAME", help="Of a hub id: a branch, a tag or a commit.")]


def _listed(kind: type[Number], text: str | None, flag: str, example: str) -> tuple[Number, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise DflashError(
            f"{flag} is {text!r}; expected numbers with commas between, as in {flag} {example}."
        ) from None


def ids(text: str | None, flag: str) -> tuple[int, ...] | None:
    """Return numbers that stand with commas between, as in 1,9,17."""
    return _listed(int, text, flag, "1,9,17")


def shares(text: str | None, flag: str) -> tuple[float, ...] | None:
    """Return shares that stand with commas between, as in 1,0.3."""
    return _listed(float, text, flag, "1,0.3")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def json_object(text: str, flag: str) -> dict[str, Any]:
    """Return the JSON object that an argument holds."""
    try:
        value = json.loads(text, parse_constant=_no_number)
    except ValueError as error:
        raise DflashError(
            f"{flag} is not JSON ({error}): {text!r}. Give an object, as in '{{\"a\": true}}'."
        ) from error
    if not isinstance(value, dict):
        raise DflashError(f"{flag} is a JSON {type(value).__name__}; expected an object, as in '{{\"a\": true}}'.")
    return value


def settings(kind: type[Config], given: dict[str, Any], **converted: Any) -> Config:
    """Return a command's settings: its arguments by name, some of them converted first."""
    names = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in given.items() if name in names} | converted)


def settings_over_file(kind: type[Config], ctx: typer.Context, path: Path | None, given: dict[str, Any]) -> Config:
    """Return a command's settings: a file's, where there is one, and over them what stands on the command line."""
    settings = read_settings(path, kind) if path else {}
    for field in fields(kind):
        if field.name not in settings or _given(ctx, field.name):
            settings[field.name] = given[field.name]
    if _given(ctx, "epochs") and not _given(ctx, "steps"):
        settings["steps"] = None  # the file's, which would go before the epochs asked for
    require_fields(kind, settings)
    return kind(**settings)


def _given(ctx: typer.Context, name: str) -> bool:
    """Say whether an argument stands on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def check_file(path: Path, flag: str) -> None:
    """Raise `DflashError` before any work if a file could not be written there."""
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise DflashError(f"{flag} {path} is not a file in an existing folder. Name one.")
