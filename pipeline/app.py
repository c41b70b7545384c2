"""The command line: every command under its name, with the help that teaches it."""

from importlib.metadata import version
from typing import Annotated

import typer

from dflash_offline.pipeline.commands.demo import demo
from dflash_offline.pipeline.commands.diagnose import diagnose
from dflash_offline.pipeline.commands.doctor import doctor
from dflash_offline.pipeline.commands.evaluate import evaluate
from dflash_offline.pipeline.commands.export import export
from dflash_offline.pipeline.commands.extract import extract
from dflash_offline.pipeline.commands.inspect import inspect
from dflash_offline.pipeline.commands.regenerate import regenerate
from dflash_offline.pipeline.commands.train import train
from dflash_offline.pipeline.commands.verify import verify
from dflash_offline.pipeline.options import add_command
from dflash_offline.pipeline.safe_output import guard_output
from dflash_offline.stages.cores import limit_threads

OVERVIEW = """\b
The way through:
  dflash doctor
  dflash regenerate chats.jsonl --target Qwen/Qwen3-8B --out own.jsonl
  dflash extract own.jsonl --target Qwen/Qwen3-8B --out cache
  dflash inspect cache
  dflash train cache --out run
  dflash export run --out draft
  dflash eval draft --target Qwen/Qwen3-8B --prompts held_out.jsonl

dflash COMMAND --help has examples. dflash --install-completion lets the shell complete commands, options and values."""
app = typer.Typer(
    name="dflash",
    help="Train DFlash drafters offline: cache a target's hidden states once, then train from the cache.",
    epilog=OVERVIEW,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (regenerate, extract, inspect, verify, train, export, evaluate, diagnose, demo, doctor)
"""In the order of the help."""


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"dflash-offline {version('dflash-offline')}")
        raise typer.Exit


@app.callback()
def _main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for command in COMMANDS:
    add_command(app, command)


def main() -> None:
    """Run the command line."""
    guard_output()
    limit_threads()
    app()


if __name__ == "__main__":
    main()
