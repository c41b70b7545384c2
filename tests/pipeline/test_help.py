"""Help: what every command's text teaches, and what the shell completes."""

import os
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dflash_offline.pipeline.app import COMMANDS, app

NAMES = [command.name for command in COMMANDS]
PARSED: dict[str, Any] = typer.main.get_command(app).commands
OPTION = re.compile(r"^  ((?:-\w, )?--[a-z\d-]+(?:(?:, | / )--[a-z\d-]+)*)(?: (\S+))?(?:  .*)?$", re.MULTILINE)
"""The line of help on which an option begins: its flags, and what its value is."""


def help_of(command: str, columns: int) -> str:
    text: str = PARSED[command].make_context(command, [], resilient_parsing=True, terminal_width=columns).get_help()
    return text


@pytest.mark.parametrize("command", NAMES)
def test_every_option_stands_under_a_heading_once(command: str) -> None:
    text = help_of(command, 80).split("Examples:")[0]
    shown = [flag for flags, _ in OPTION.findall(text) for flag in re.findall(r"-[\w-]+", flags)]
    options = [param for param in PARSED[command].params if param.param_type_name == "option"]
    expected = [flag for param in options for flag in (*param.opts, *param.secondary_opts)] + ["--help"]
    assert sorted(shown) == sorted(expected) and "\nOptions:" not in text


@pytest.mark.parametrize("command", NAMES)
def test_every_value_names_its_unit(command: str) -> None:
    units = {flags.split(" / ")[0]: unit for flags, unit in OPTION.findall(help_of(command, 80))}
    for param in PARSED[command].params:
        if param.param_type_name == "option" and not param.is_flag:
            unit = next(unit for flags, unit in units.items() if param.opts[0] in flags.split(", "))
            assert unit and unit == unit.upper(), param.name


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_help_fits_the_terminal_and_shows_examples(command: Any) -> None:
    text = help_of(command.name, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count(f"\n  dflash {command.name}") == len(command.examples) > 0
    options = help_of(command.name, 50).split("Examples:")[0]
    assert max(map(len, options.splitlines())) <= 50


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_every_example_is_understood(command: Any) -> None:
    for _, arguments in command.examples:
        PARSED[command.name].make_context(command.name, shlex.split(arguments.split(" > ")[0]))


def test_help_tells_what_must_be_given_and_what_holds_otherwise() -> None:
    said = {name: " ".join(help_of(name, 80).split()) for name in ("extract", "train", "export")}
    assert "--target MODEL Hugging Face model: a folder, or a hub id. [required]" in said["extract"]
    assert "[default: 16]" in said["extract"]
    assert "decays by e; not of one with dpace. [default: 7, 5, 4 for blocks of 16, 10, 8]" in said["train"]
    assert "and the anchors. [default: 0]" in said["train"] and "[default: yes]" in said["train"]
    assert "RUN Run folder made by `dflash train`, or a draft folder. [required]" in said["export"]


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("dflash doc", ["doctor"]),
        ("dflash extract --mantissa", ["--mantissa-bits"]),
        ("dflash extract --features ", ["lossless", "rounded", "scaled"]),
        ("dflash train --optimizer m", ["muon"]),
        ("dflash export --format s", ["speculators"]),
        ("dflash eval --log-format ", ["text", "json"]),
        ("dflash inspect --mask l", ["last-turn"]),
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
    assert "loss is 'mse'; expected dflash, dpace, kl, tv, lk or soft-ce.\n" in result.stderr
    assert "Did you mean adamw?" in result.stderr
