"""Help: what every command's text teaches, and what the shell completes."""

import os
import shlex
import subprocess
import sys
from typing import Any, get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from dflash_offline.pipeline.app import app
from dflash_offline.pipeline.help import EXAMPLES, GROUPS

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands


def help_of(command: str, columns: int) -> str:
    text: str = COMMANDS[command].make_context(command, [], resilient_parsing=True, terminal_width=columns).get_help()
    return text


@pytest.mark.parametrize("command", GROUPS)
def test_every_option_stands_under_a_heading_once(command: str) -> None:
    named = [name for names in GROUPS[command].values() for name in names.split()]
    options = {param.name for param in COMMANDS[command].params if param.param_type_name == "option"} | {"help"}
    assert len(named) == len(set(named)) and set(named) == options


@pytest.mark.parametrize("command", GROUPS)
def test_every_number_names_its_unit(command: str) -> None:
    kinds = get_type_hints(COMMANDS[command].callback)
    for param in COMMANDS[command].params:
        if {int, float} & {kinds[param.name], *get_args(kinds[param.name])}:
            assert param.metavar and param.metavar.isupper(), param.name


@pytest.mark.parametrize("command", GROUPS)
def test_help_fits_the_terminal_and_shows_examples(command: str) -> None:
    text = help_of(command, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count(f"\n  dflash {command}") == len(EXAMPLES[command]) and "\nOptions:" not in text
    options = help_of(command, 50).split("Examples:")[0]
    assert max(map(len, options.splitlines())) <= 50


@pytest.mark.parametrize("command", EXAMPLES)
def test_every_example_is_understood(command: str) -> None:
    for _, arguments in EXAMPLES[command]:
        COMMANDS[command].make_context(command, shlex.split(arguments.split(" > ")[0]))


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("dflash doc", ["doctor"]),
        ("dflash extract --mantissa", ["--mantissa-bits"]),
        ("dflash extract --features ", ["lossless", "rounded", "scaled"]),
        ("dflash train --optimizer m", ["muon"]),
        ("dflash export --format s", ["speculators"]),
        ("dflash eval --log-format ", ["text", "json"]),
    ],
)
def test_the_shell_completes_commands_options_and_values(line: str, completed: list[str]) -> None:
    program = "from dflash_offline.pipeline.app import app; app(prog_name='dflash')"
    settings = {"_DFLASH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    found = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | settings, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == completed


def test_a_wrong_name_is_told_with_the_nearest() -> None:
    result = CliRunner().invoke(app, ["extract", "a", "--target", "b", "--out", "c", "--features", "scalled"])
    assert result.exit_code == 1 and "Did you mean scaled?" in result.stderr
    result = CliRunner().invoke(app, ["train", "a", "--out", "b", "--loss", "mse", "--optimizer", "adam"])
    assert "loss is 'mse'; expected dflash or dpace.\n" in result.stderr and "Did you mean adamw?" in result.stderr
