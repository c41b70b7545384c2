"""Settings from a TOML file: one key a field of a command's config, checked by name and type."""

import difflib
import json
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.paths import local_path, store_url
from dflash_offline.schemas.settings.option import options

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", Path: "a path, as a string"}


def read_settings(path: Path, kind: type) -> dict[str, Any]:
    """Return the settings in a TOML file, each converted to the type of the field of `kind` that has its name.

    Its flags name a field as well, and dashes are underscores. Raises `DflashError` naming every unknown key with the
    nearest known one, and every value of another type.
    """
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DflashError(f"{path} cannot be read ({error.strerror}). Name a TOML file with --config.") from error
    except ValueError as error:
        raise DflashError(
            f"{path} is not TOML: {error}. Write one setting a line, as in learning_rate = 6e-4."
        ) from error
    hints, settings, problems = get_type_hints(kind), {}, []
    flags = {_name(flag): field for field, option in options(kind).items() for flag in option.flags}
    for key, value in document.items():
        name = flags.get(_name(key), _name(key))
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            problems.append(f"{key} is no setting" + (f"; did you mean {near[0]}?" if near else "."))
            continue
        if name in settings:
            problems.append(f"{name} stands there twice, under two of its names; keep one of them.")
        try:
            settings[name] = _converted(value, hints[name])
        except TypeError as error:
            problems.append(f"{key} is {value!r}; expected {error}.")
    if problems:
        raise DflashError(f"{path} holds what `dflash` cannot use:\n  " + "\n  ".join(problems))
    return settings


def _name(key: str) -> str:
    return key.strip("-").replace("-", "_")


def _converted(value: Any, hint: Any) -> Any:
    """Return a TOML value as the type that a field declares; `TypeError` says what was expected."""
    kind = next((kind for kind in get_args(hint) if NoneType in get_args(hint) and kind is not NoneType), hint)
    if get_origin(kind) is dict:
        if not (isinstance(value, dict) and _is_json(value)):
            raise TypeError("a table of strings, numbers, lists and tables")
        return value
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if not isinstance(value, list):
            raise TypeError(f"a list, each {_NAMES[item]}")
        return tuple(_converted(element, item) for element in value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number:
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not kind:
        raise TypeError(_NAMES[kind])
    return value


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):  # a date, or a number that is not finite
        return False
    return True


def require_fields(kind: type, settings: dict[str, Any]) -> None:
    """Raise `DflashError` naming every field without a default that is not set."""
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in missing if settings.get(name) in (None, ())]
    if missing:
        raise DflashError(f"Not set: {', '.join(missing)}. Give them on the command line or in the --config file.")


def to_toml(config: Any) -> str:
    """Return a config as a file that `read_settings` reads to the same one: every field, paths made absolute.

    A field that is None is a comment; TOML has no such value, and its absence means the same.
    """
    lines = []
    for field in fields(config):
        value = getattr(config, field.name)
        lines.append(f"# {field.name}: not set" if value is None else f"{field.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml(name)} = {_toml(one)}' for name, one in value.items())}}}"
    if isinstance(value, Path):
        value = store_url(value) or str(local_path(value).resolve())
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML has no pairs of surrogates
