"""`dflash doctor`: its options, and what they start."""

from pathlib import Path
from typing import Annotated

import typer

from dflash_offline.pipeline.arguments import Json, LogFormatOption, Quiet
from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.progress import LogFormat


def doctor(
    out: Annotated[Path, typer.Option(help="Folder whose disk is tried: where caches and runs will be.")] = Path(),
    target: Annotated[
        str | None, typer.Option(help="Look at this target as well: a folder, or a hub id that was fetched before.")
    ] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Also see whether the model hub answers.")] = False,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Look at packages, devices, disk and speed; exit 1 if something that is needed is wrong."""
    with reported(quiet=quiet, log_format=log_format) as progress:
        from dflash_offline.pipeline.doctor.examine import examine, require_folder
        from dflash_offline.pipeline.doctor.report import print_examination

        require_folder(out)
        found = examine(out, target, hub, progress)
        print(found.to_json()) if json_ else print_examination(found, out)
        if any(finding.needed for finding in found.findings):
            raise typer.Exit(1)
