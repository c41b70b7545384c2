"""`dflash demo`: its options, and what they start."""

from pathlib import Path
from typing import Annotated

from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.options import LogFormatOption, Quiet, command
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.settings.option import Option


@command("demo", "Run all of it on a small target that ships here.", ("six minutes on two cores", "--out demo"))
def demo(
    out: Annotated[Path, Option("Folder for cache, run and draft.", "Output", "free", "FOLDER")] = Path("dflash-demo"),
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Run extract, inspect, train, export and eval on the target that ships with the package."""
    with reported("Repeat the command to go on.", quiet=quiet, log_format=log_format):
        from dflash_offline.pipeline.demo import run_demo

        run_demo(out, [f"--log-format={log_format}", *(["--quiet"] if quiet else [])])
