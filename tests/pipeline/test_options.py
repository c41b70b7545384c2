"""One setting is one edit: a field of a config is at once an option with help and a key of a settings file."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner, Result

from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.options import Part, add_command, command
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.option import ARGUMENTS, AT_LEAST_1, Option, Role, options, problems, refuse
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.schemas.settings.toml import to_toml
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.schemas.settings.verify import RerunConfig


@dataclass(frozen=True, kw_only=True)
class Brewing:
    """Settings of a command that there is not."""

    pots: Annotated[tuple[Path, ...], Option("Pots to brew in.", ARGUMENTS, "resolved", "POT")]
    cups: Annotated[int, Option("Cups in one pot.", "Water", "identity", "CUPS", bounds=AT_LEAST_1)] = 4
    litres: Annotated[
        float | None, Option("Litres of water.", "Water", "identity", "LITRES", unset="enough", instead_of="cups")
    ] = None
    leaf: Annotated[str, Option("Leaf to brew.", "Tea", "identity", "NAME", choices=("green", "black"))] = "green"
    minutes: Annotated[tuple[int, ...], Option("Minutes of each infusion.", "Tea", "free", "LIST")] = (2, 3)
    warm: Annotated[bool, Option("Warm the pot first.", "Tea", "free")] = True
    stir: Annotated[bool, Option("Stir.", "Tea", "free")] = False
    guests: Annotated[tuple[str, ...], Option("Guest to serve.", "Tea", "free", "NAME", flags=("--guest", "-g"))] = ()
    milk: Annotated[str | None, Option("Milk.", "Tea", "free", "[KIND]", unset="none", bare="cow's")] = None
    sugar: Annotated[dict[str, Any], Option("Sugar by guest.", "Tea", "free", "JSON")] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse("brew", problems(self))


brewed: list[tuple[Brewing, bool]] = []


@command("brew", "Brew tea.", ("a pot", "pot"))
def brew(
    settings: Callable[..., Brewing], taste: Annotated[bool, Option("Taste it.", "Output", "free")] = False
) -> None:
    """Brew tea in pots."""
    with reported():
        brewed.append((settings(), taste))


@command("warm", "Warm a pot.", ("a pot", "pot"))
def warm(
    pot: Annotated[Path, Option("The pot.", ARGUMENTS, "free", "POT")],
    settings: Annotated[Callable[..., Brewing], Part("cups sugar", group="Of the pot")],
    leaf: Annotated[int, Option("Leaves in it.", "Tea", "free", "LEAVES")] = 0,
) -> None:
    """Warm a pot."""
    with reported():
        brewed.append((settings(pots=(pot,)), bool(leaf)))


app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
for one in (brew, warm):
    add_command(app, one)


def run(*arguments: object) -> Result:
    brewed.clear()
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def made(*arguments: object) -> Brewing:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return brewed[0][0]


def test_every_field_is_an_option_with_its_help_unit_heading_and_default() -> None:
    text = run("brew", "--help").stdout
    for part in (
        "Arguments:\n  POT  Pots to brew in.  [required]",
        "Water:\n  --cups CUPS      Cups in one pot.  [default: 4]\n",
        "  --litres LITRES  Litres of water.  [default: enough]\n",
        "--leaf NAME         Leaf to brew.  [default: green]\n",
        "--minutes LIST      Minutes of each infusion.  [default: 2,3]\n",
        "--warm / --no-warm  Warm the pot first.  [default: yes]\n",
        "--stir              Stir.\n",
        "-g, --guest NAME    Guest to serve.\n",
        "--config FILE",
        "Output:\n  --taste ",
    ):
        assert part in text, text
    assert text.index("Arguments:") < text.index("Water:") < text.index("Tea:") < text.index("Output:")


def test_flags_are_converted_to_the_types_of_the_fields() -> None:
    flags = "--cups 2 --minutes 1,2,3 --no-warm --stir -g Ann --guest Bo --leaf black".split()
    assert made("brew", "a", "b", *flags, "--sugar", '{"Ann": 2}') == Brewing(
        pots=(Path("a"), Path("b")),
        cups=2,
        minutes=(1, 2, 3),
        warm=False,
        stir=True,
        guests=("Ann", "Bo"),
        leaf="black",
        sugar={"Ann": 2},
    )
    assert made("brew", "a") == Brewing(pots=(Path("a"),)) and not brewed[0][1]
    assert run("brew", "a", "--taste") and brewed[0][1]


def test_a_flag_may_stand_alone_where_it_means_something_alone() -> None:
    assert made("brew", "a").milk is None
    for words in (("a", "--milk"), ("--milk", "--stir", "a")):
        assert made("brew", *words).milk == "cow's"
    assert made("brew", "a", "--milk", "oat").milk == "oat"
    assert "--milk [KIND]" in run("brew", "--help").stdout


def test_every_field_may_stand_in_a_file_and_flags_go_before_it(tmp_path: Path) -> None:
    path = tmp_path / "tea.toml"
    path.write_text('pots = ["a"]\ncups = 2\nminutes = [5]\nwarm = false\nguests = ["Ann"]\nsugar = {Ann = 1}\n')
    assert made("brew", "--config", path, "--minutes", "7") == Brewing(
        pots=(Path("a"),), cups=2, minutes=(7,), warm=False, guests=("Ann",), sugar={"Ann": 1}
    )
    assert made("brew", "--config", path, "b", "--sugar", "{}").sugar == {}
    assert made("brew", "--config", path, "--litres", "0.5").cups == Brewing.cups  # the file's cups mean nothing then
    path.write_text('guest = ["Bo"]\n')
    assert made("brew", "a", "--config", path).guests == ("Bo",)
    path.write_text("cup = 2\n")
    assert "cup is no setting; did you mean cups?" in run("brew", "a", "--config", path).stderr
    path.write_text("sugar = {Ann = 1979-05-27}\n")
    assert "expected a table of strings, numbers, lists and tables." in run("brew", "a", "--config", path).stderr


def test_every_field_may_be_written_to_a_file_and_read_again(tmp_path: Path) -> None:
    config = Brewing(pots=(tmp_path,), litres=0.5, guests=("Ann", "Bo"), sugar={"A b": [1, {"c": 0.5}], "d": {}})
    (tmp_path / "tea.toml").write_text(to_toml(config))
    assert made("brew", "--config", tmp_path / "tea.toml") == config


def test_what_cannot_be_is_refused_all_at_once() -> None:
    result = run("brew", "a", "--cups", "0", "--leaf", "blakc")
    assert result.exit_code == 1 and brewed == []
    assert "cups is 0; expected at least 1." in result.stderr and "Did you mean black?" in result.stderr
    result = run("brew", "a", "--minutes", "1;2", "--sugar", "[1]")
    assert "--minutes is '1;2'; expected numbers" in result.stderr and "--sugar is a JSON list" in result.stderr
    assert "Not set: pots." in run("brew").stderr
    assert run("warm").exit_code == 2


def test_a_command_may_have_a_part_of_a_config_beside_options_of_its_own() -> None:
    text = run("warm", "--help").stdout
    assert "Of the pot:\n  --cups" in text and "--litres" not in text and "--config" not in text
    assert made("warm", "a", "--cups", "3", "--leaf", "9") == Brewing(pots=(Path("a"),), cups=3) and brewed[0][1]


CONFIGS = (ExtractConfig, RegenerateConfig, TrainConfig, EvalConfig, RerunConfig)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_setting_has_a_sentence_a_unit_and_a_role(config: type) -> None:
    for name, option in options(config).items():
        assert re.fullmatch(r"[A-Z].*\.", option.help), name
        assert option.group and option.role in get_args(Role), name
        is_flag = get_type_hints(config)[name] in (bool, bool | None)
        assert is_flag != bool(option.unit) and option.unit == option.unit.upper(), name
        assert not option.instead_of or option.instead_of in options(config), name


def test_a_field_without_its_option_is_refused_by_name() -> None:
    @dataclass(frozen=True)
    class Wrong:
        cups: Annotated[int, Option("Cups.", "Water", "free", "CUPS")] = 4
        pots: int = 1

    with pytest.raises(TypeError, match=r"Wrong\.pots"):
        options(Wrong)
