"""Commands with the options that their settings declare: typer's parameters, help by heading, values by their types."""

import inspect
import json
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
import typer.core

from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.option import ARGUMENTS, Option, options
from dflash_offline.schemas.settings.toml import read_settings, require_fields

_OUTPUT = "Output"
Quiet = Annotated[
    bool, Option("Show no progress, only the result and errors.", _OUTPUT, "free", flags=("--quiet", "-q"))
]
LogFormatOption = Annotated[
    LogFormat, Option("Format of progress on stderr: text, or json, an event a line.", _OUTPUT, "free", "NAME")
]
Json = Annotated[bool, Option("Print the result as JSON on stdout.", _OUTPUT, "free")]
_CONFIG = Option("TOML file of settings, each named as its flag; flags go before it.", "", "free", "FILE")
_SETTINGS, _FILE = "settings", "config"
"""The parameter by which a command reads its settings, and the one that names their file."""


@dataclass(frozen=True)
class Part:
    """Marks that a command has only some options of a config, and no file of them."""

    names: str = ""
    """Fields with spaces between; all if empty."""
    group: str = ""
    """Heading they have in its help; their own if empty."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of the program, and what its help teaches beside its options."""

    name: str
    summary: str
    """What stands beside it in the list of commands."""
    examples: tuple[tuple[str, str], ...]
    """A remark and the arguments of each example, which run as printed."""
    function: Callable[..., None]


def command(name: str, summary: str, *examples: tuple[str, str]) -> Callable[[Callable[..., None]], Command]:
    """Make a function a command whose parameters are its options, each annotated with its `Option`.

    A parameter `settings`, annotated as a callable that returns a config, stands for the options of all its fields and
    for a file of them. The function calls it to have the config; it raises `DflashError` for settings that cannot be
    used.
    """
    return lambda function: Command(name=name, summary=summary, examples=examples, function=function)


def add_command(app: typer.Typer, command: Command) -> None:
    """Add a command to the program."""
    parameters, config = _parameters_of(command.function)
    run = _runner(command.function, parameters, config)
    lines = [f"  # {remark}\n  {_broken(f'dflash {command.name} {line}'.strip())}" for remark, line in command.examples]
    app.command(
        command.name,
        cls=_grouped(
            {parameter.name: parameter.option.group for parameter in parameters},
            {flag: parameter.option.bare for parameter in parameters for flag in _flags(parameter)},
        ),
        short_help=command.summary,
        epilog="\b\nExamples:\n" + "\n".join(lines),
    )(run)


@dataclass(frozen=True)
class _Parameter:
    """One option of a command, as its config or its function declares it."""

    name: str
    hint: Any
    """Type of its value, None left out."""
    option: Option
    default: Any
    """MISSING if it has to be given."""
    is_needed: bool
    """Whether typer refuses a call without it; what may stand in a file is looked for there first."""


def _parameters_of(function: Callable[..., None]) -> tuple[list[_Parameter], type | None]:
    """Return all options of a command in order, and its config; its own go before its config's of the same name."""
    found: dict[str, _Parameter] = {}
    hints, config = get_type_hints(function, include_extras=True), None
    for name, written in inspect.signature(function).parameters.items():
        hint, *marks = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        if name == _SETTINGS:
            config = get_args(hint)[1]
            found = {**found, **_of_config(config, marks[0] if marks else None), **found}
            continue
        default = MISSING if written.default is written.empty else written.default
        found[name] = _Parameter(name, _without_none(hint), marks[0], default, default is MISSING)
    return list(found.values()), config


def _of_config(config: type, part: Part | None) -> dict[str, _Parameter]:
    """Return the options of a config's fields, or of a part of them, and that of their file."""
    hints, found = get_type_hints(config), {}
    for field in fields(config):
        option = options(config)[field.name]
        if part is None or not part.names or field.name in part.names.split():
            if part and part.group:
                option = replace(option, group=part.group)
            default = field.default if field.default_factory is MISSING else None
            found[field.name] = _Parameter(field.name, _without_none(hints[field.name]), option, default, False)
    if part is None:
        group = next(parameter.option.group for parameter in found.values() if parameter.option.group != ARGUMENTS)
        found[_FILE] = _Parameter(_FILE, Path, replace(_CONFIG, group=group), None, False)
    return found


def _without_none(hint: Any) -> Any:
    return next((kind for kind in get_args(hint) if NoneType in get_args(hint) and kind is not NoneType), hint)


def _runner(function: Callable[..., None], parameters: list[_Parameter], config: type | None) -> Callable[..., None]:
    """Return what typer calls: its signature is the options', and what is not given is None."""
    own = inspect.signature(function).parameters.keys()
    of_config = [parameter for parameter in parameters if parameter.name not in own]

    def run(**given: Any) -> None:
        given = {name: value for name, value in given.items() if value is not None}
        kept = {name: value for name, value in given.items() if name in own}
        if config is not None:
            kept[_SETTINGS] = partial(_settings, config, of_config, given)
        function(**kept)

    shown = [_as_typer_reads(parameter) for parameter in parameters]
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    run.__doc__ = function.__doc__
    return run


def _as_typer_reads(parameter: _Parameter) -> inspect.Parameter:
    """Return an option as typer reads it."""
    option, kind = parameter.option, parameter.hint
    item = get_args(kind)[0] if get_origin(kind) is tuple else None
    if item in (str, Path):
        kind = list[item]  # type: ignore[valid-type]
    elif item or get_origin(kind) is dict:
        kind = str
    shown: dict[str, Any] = {
        "help": option.help + _default(parameter),
        "show_default": False,
        "metavar": option.unit or None,
    }
    names = option.choices or option.completions
    if names:
        shown["autocompletion"] = lambda incomplete: [name for name in names if name.startswith(incomplete)]
    default = inspect.Parameter.empty if parameter.is_needed else None
    info = typer.Argument(**shown) if option.group == ARGUMENTS else typer.Option(*_flags(parameter), **shown)
    kind = kind if parameter.is_needed else kind | None
    return inspect.Parameter(
        parameter.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _flags(parameter: _Parameter) -> tuple[str, ...]:
    name = parameter.name.strip("_").replace("_", "-")
    if parameter.hint is bool and (parameter.default or parameter.default is None):
        return (f"--{name}/--no-{name}",)
    return parameter.option.flags or (f"--{name}",)


def _default(parameter: _Parameter) -> str:
    """Return the end of an option's help: that it has to be given, or what holds otherwise."""
    if parameter.default is MISSING:
        return "" if parameter.is_needed else "  [required]"  # typer says it of what it refuses a call without
    said = parameter.option.unset
    if parameter.default is True:
        said = "yes"
    elif parameter.default is not False and parameter.default not in (None, (), Path()):
        said = ",".join(map(str, parameter.default)) if isinstance(parameter.default, tuple) else str(parameter.default)
    return said and f"  [default: {said}]"


def _settings(config: type, parameters: list[_Parameter], given: dict[str, Any], **fixed: Any) -> Any:
    """Return a command's settings: a file's, over them what stands on the command line, and over all what is fixed."""
    from_file = read_settings(given[_FILE], config) if _FILE in given else {}
    line, wrong = {}, []
    for parameter in parameters:
        if parameter.name in given and parameter.name != _FILE:
            try:
                line[parameter.name] = _converted(parameter, given[parameter.name])
            except DflashError as error:
                wrong.append(str(error))
    if wrong:
        raise DflashError("\n".join(wrong))
    for name, option in options(config).items():
        for this, other in ((name, option.instead_of), (option.instead_of, name)):
            if option.instead_of and this in line and other not in line:
                from_file.pop(other, None)
    chosen = from_file | line | fixed
    require_fields(config, chosen)
    return config(**chosen)


def _converted(parameter: _Parameter, value: Any) -> Any:
    """Return what stands on the command line as the type that the setting declares."""
    flag = _flags(parameter)[0]
    if get_origin(parameter.hint) is dict:
        return _json_object(value, flag)
    if get_origin(parameter.hint) is not tuple or isinstance(value, list):
        return tuple(value) if isinstance(value, list) else value
    kind, example = get_args(parameter.hint)[0], "1,9,17" if int in get_args(parameter.hint) else "1,0.3"
    try:
        return tuple(kind(part) for part in value.split(","))
    except ValueError:
        raise DflashError(
            f"{flag} is {value!r}; expected numbers with commas between, as in {flag} {example}."
        ) from None


def _json_object(text: str, flag: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise DflashError(
            f"{flag} is not JSON ({error}): {text!r}. Give an object, as in '{{\"a\": true}}'."
        ) from error
    if not isinstance(value, dict):
        raise DflashError(f"{flag} is a JSON {type(value).__name__}; expected an object, as in '{{\"a\": true}}'.")
    return value


def _broken(line: str) -> str:
    """Return a command in lines of 80 columns at most that a shell reads as one."""
    return " \\\n    ".join(textwrap.wrap(line, 74, break_long_words=False, break_on_hyphens=False))


def _with_bare_values(words: list[str], bare: dict[str, str]) -> list[str]:
    """Return the words of a command line in which a flag that stands alone has the value it means, if it has one."""
    found: list[str] = []
    for word, following in pairwise([*words, "-"]):
        found += [word, bare[word]] if bare.get(word) and following.startswith("-") else [word]
    return found


def _grouped(headings: dict[str, str], bare: dict[str, str]) -> type[typer.core.TyperCommand]:
    """Return a command class that lists its options by heading: typer knows headings in rich's boxes alone.

    `bare` are the values of flags that stand alone, which typer does not know either.
    """

    class Grouped(typer.core.TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            """Read the command line."""
            return super().parse_args(ctx, _with_bare_values(args, bare))

        def format_options(self, ctx: Any, formatter: Any) -> None:
            """Write the arguments first, the options of output last, and the other headings in order between them."""
            sections: dict[str, list[tuple[str, str]]] = {ARGUMENTS: []}
            sections |= {heading: [] for heading in headings.values() if heading != _OUTPUT} | {_OUTPUT: []}
            for param in self.get_params(ctx):
                heading = headings.get(param.name or "", _OUTPUT)
                if record := param.get_help_record(ctx):
                    name = record[0].split(" <")[0] if heading == ARGUMENTS else record[0]  # typer adds its type
                    sections[heading].append((name, record[1]))
            for heading, records in sections.items():
                if records:
                    with formatter.section(heading):
                        formatter.write_dl(records)

        def format_epilog(self, ctx: Any, formatter: Any) -> None:
            """Write the examples as they stand; click would indent them and join their lines."""
            formatter.write_paragraph()
            formatter.write_text(inspect.cleandoc(self.epilog or ""))

    return Grouped


def check_file(path: Path, flag: str) -> None:
    """Raise `DflashError` before any work if a file could not be written there."""
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise DflashError(f"{flag} {path} is not a file in an existing folder. Name one.")
