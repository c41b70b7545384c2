"""Commands as tests run them: in this process, in a fresh one, and in one that cannot import torch; and slow cases."""

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dflash_offline.pipeline.app import app

Settings = dict[str, object]
"""Of `ExtractConfig`, by name."""


def dflash(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def some_slow(cases: Iterable[str], *slow: str) -> list[Any]:
    """Return the cases, by name, with those marked that `make check` leaves out."""
    return [pytest.param(case, marks=pytest.mark.slow) if case in slow else case for case in cases]


def refused(result: Result, *said: str) -> None:
    """Check for one clear message and exit 1."""
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stderr.startswith("dflash: ") or "\ndflash: " in result.stderr
    assert "Traceback" not in result.stderr
    for part in said:
        assert part in result.stderr, result.stderr


def flags(settings: Mapping[str, object]) -> list[str]:
    """Return settings, by name, as a command line gives them."""
    return [str(part) for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]


def arguments(config: Settings, out: Path) -> list[str]:
    """Return what follows `dflash` on the command line."""
    data, layers = config["data"], config["layers"]
    assert isinstance(data, tuple) and isinstance(layers, tuple)
    given = {"target": config["target"], "out": out, "layers": ",".join(map(str, layers)), "device": "cpu"}
    given |= {name: config[name] for name in ("block_size", "shard_mib", "chunk_tokens")}
    return ["extract", *map(str, data), *flags(given)]


def command(config: Settings, out: Path) -> list[str]:
    """Return a command line that a fresh interpreter runs."""
    return [sys.executable, "-m", "dflash_offline.pipeline.app", *arguments(config, out)]


WITHOUT_TORCH = """
import sys
for name in {missing!r}:
    sys.modules[name] = None
from dflash_offline.pipeline.app import app
for arguments in {commands!r}:
    print("$", *arguments)
    if code := app(arguments, standalone_mode=False):
        sys.exit(code)
"""


def without_torch(*commands: list[str], missing: str = "torch transformers") -> list[str]:
    """Return what each command prints in a process where torch, or what else is missing, cannot be imported."""
    program = WITHOUT_TORCH.format(commands=commands, missing=missing.split())
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    printed = re.split(r"^\$ .*\n", run.stdout, flags=re.MULTILINE)[1:]
    assert len(printed) == len(commands)
    return printed
