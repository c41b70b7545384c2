"""`dflash verify`: its options, and the check that its folder calls for."""

from pathlib import Path
from typing import Annotated

import typer

from dflash_offline.pipeline.arguments import Device, Json, LogFormatOption, Quiet, TrustRemoteCode, settings
from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.verify import RerunConfig


def verify(
    folder: Annotated[Path, typer.Argument(help="Cache folder, or draft folder.")],
    target: Annotated[
        str | None,
        typer.Option(help="Also run this target again on some samples and compare each layer; a draft: compare sizes."),
    ] = None,
    samples: Annotated[int, typer.Option(help="To run the target on.")] = RerunConfig.samples,
    seed: Annotated[int, typer.Option(help="Draws those samples.")] = RerunConfig.seed,
    repair: Annotated[
        bool, typer.Option("--repair", help="Forget a cache's faulty shards; `dflash extract` redoes just those.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the target's hub id. [default: the extraction's]")
    ] = RerunConfig.revision,
    trust_remote_code: TrustRemoteCode = RerunConfig.trust_remote_code,
    attn_implementation: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the target, where this machine lacks the extraction's. [default: its]"),
    ] = RerunConfig.attn_implementation,
    device: Device = RerunConfig.device,
    device_map: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the target, as for `dflash extract`. [default: its]")
    ] = RerunConfig.device_map,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Check every file, chunk, token and statistic of a cache, or a draft by every client's rules; exit 1 if wrong."""
    given = locals()
    with reported(quiet=quiet, log_format=log_format) as progress:
        rerun = settings(RerunConfig, given) if target else None
        from dflash_offline.pipeline import verify as report
        from dflash_offline.schemas.draft.lint import is_draft
        from dflash_offline.schemas.manifest import MANIFEST

        if not (folder / MANIFEST).exists() and is_draft(folder):
            if repair:
                raise DflashError(f"{folder} is a draft, and --repair mends caches. Export it again.")
            if not report.verify_draft(folder, target, as_json=json_):
                raise typer.Exit(1)
            return
        from dflash_offline.stages.store.verify import repair as forget
        from dflash_offline.stages.store.verify import verify_cache

        beside = report.surplus_of(folder)  # before any shard is forgotten, whose files then have no record
        faults = verify_cache(folder, progress, beside)
        forgotten = forget(folder, faults) if repair else None
        fits = []
        if rerun and not faults:  # of a damaged cache the faults are the news
            from dflash_offline.stages.capture.compare import compare_with_target
            from dflash_offline.stages.target.model import quiet_libraries

            quiet_libraries()
            fits = compare_with_target(folder, rerun, progress)
        elif rerun:
            progress.say("The target is not run: it is compared with a cache that has no other fault.")
        show = report.print_json if json_ else report.print_report
        show(folder, beside, faults, fits, forgotten)
        if faults or any(fit.fault for fit in fits):
            raise typer.Exit(1)
