"""`dflash verify`: its options, the check that its folder calls for, and what it prints."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.options import Json, LogFormatOption, Part, Quiet, command
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.errors import CacheError, DflashError, dflash_line
from dflash_offline.schemas.manifest import FINAL, HIDDEN, MANIFEST, Manifest
from dflash_offline.schemas.paths import free_name, shown
from dflash_offline.schemas.settings.option import ARGUMENTS, Option
from dflash_offline.schemas.settings.shared import TARGET
from dflash_offline.schemas.settings.verify import RerunConfig
from dflash_offline.stages.buckets.mirror import with_urls, worked_on
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.store.leftovers import summarize
from dflash_offline.stages.store.unexpected_files import UnexpectedFiles, unexpected_files

if TYPE_CHECKING:  # a draft is verified without torch
    from dflash_offline.stages.capture.compare import LayerFit
    from dflash_offline.stages.store.verify import Fault

_OTHERS_SHOWN = 5


@command(
    "verify",
    "Check a cache, or a draft; exit 1 if it is wrong.",
    ("every checksum, and some samples run again", "cache --target Qwen/Qwen3-8B"),
    ("the same, run again by vLLM", "cache --target Qwen/Qwen3-8B --engine vllm"),
    ("forget what is faulty; repeat the extraction then", "cache --repair"),
    ("a draft, by every client's rules", "draft"),
)
def verify(
    folder: Annotated[Path, Option("Cache folder, or draft folder.", ARGUMENTS, "free", "FOLDER")],
    settings: Annotated[Callable[..., RerunConfig], Part()],
    target: Annotated[
        str | None,
        Option(
            "Also run this target again on some samples and compare each layer; or compare a draft with its sizes.",
            TARGET.group,
            "free",
            TARGET.unit,
        ),
    ] = None,
    repair: Annotated[
        bool, Option("Forget a cache's faulty shards; `dflash extract` then does just those again.", "Checks", "free")
    ] = False,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Check every file, chunk, token and statistic of a cache, or a draft by every client's rules; exit 1 if wrong."""
    with reported("Repeat the command.", quiet=quiet, log_format=log_format) as progress:
        rerun = settings(target=target) if target else None
        from dflash_offline.schemas.draft.lint import is_draft

        folder = worked_on(folder)
        if (folder / MANIFEST).exists() or not is_draft(folder):
            is_sound = _verify_cache(folder, rerun, repair, json_, progress)
        elif repair:
            raise DflashError(f"{folder} is a draft, and --repair mends caches. Export it again.")
        else:
            is_sound = _verify_draft(folder, target, as_json=json_)
        if not is_sound:
            raise typer.Exit(1)


def _verify_cache(folder: Path, rerun: RerunConfig | None, repair: bool, as_json: bool, progress: Progress) -> bool:
    """Print every fault of a cache and, if asked, how the target run again compares; returns whether all is well."""
    from dflash_offline.stages.store.verify import repair as forget
    from dflash_offline.stages.store.verify import verify_cache

    unexpected = _unexpected_files_of(folder)  # before any shard is forgotten, whose files then have no record
    faults = verify_cache(folder, progress, unexpected)
    forgotten = forget(folder, faults) if repair else None
    fits = []
    if rerun and not faults:  # of a damaged cache the faults are the news
        from dflash_offline.stages.capture.compare import compare_with_target
        from dflash_offline.stages.target.model import quiet_libraries

        quiet_libraries()
        fits = compare_with_target(folder, rerun, progress)
    elif rerun:
        progress.say("The target is not run: it is compared with a cache that has no other fault.")
    show = _print_json if as_json else _print_report
    show(folder, unexpected, faults, fits, forgotten)
    return not faults and not any(fit.fault for fit in fits)


def _verify_draft(draft: Path, target: str | None, *, as_json: bool) -> bool:
    """Print every fault of a draft folder with its reason and the clients it breaks; returns whether it breaks none."""
    from dflash_offline.schemas.draft.config_rules import read_document
    from dflash_offline.schemas.draft.lint import lint_draft

    folder = None if target is None else Path(target).expanduser()
    config = None if folder is None else read_document(folder)
    if isinstance(config, str):
        raise DflashError(f"{folder}/config.json {config}. Name the target's folder to compare the draft with it.")
    faults = lint_draft(draft, config)
    is_sound = not any(fault.breaks for fault in faults)
    if as_json:
        print(json.dumps({"draft": str(draft), "faults": [asdict(fault) for fault in faults]}, indent=1))
        return is_sound
    for fault in faults:
        broken = f"breaks {', '.join(fault.breaks)}" if fault.breaks else "breaks no client of today"
        print(f"{fault.place} {fault.what}.\n    {broken} ({fault.rule}): {fault.why}")
    if is_sound:
        print(f"{draft} is sound.")
        print(f"Next: {dflash_line('eval', '--help')}")
    return is_sound


def _unexpected_files_of(folder: Path) -> UnexpectedFiles:
    """Return what lies in a cache beside its own files; `CacheError` if the folder is no cache, however damaged."""
    if not (folder / MANIFEST).exists():
        found = f"it has no {MANIFEST}" if folder.is_dir() else "there is no such folder"
        raise CacheError(
            f"{folder} is not a feature cache, nor a draft: {found}. Name a cache of `dflash extract` or a draft of "
            f"`dflash export`."
        )
    try:
        return unexpected_files(folder, Manifest.read(folder))
    except CacheError:  # is the fault that is told
        return UnexpectedFiles()


def _notes(cache: Path, unexpected: UnexpectedFiles) -> dict[str, Any]:
    """Return what is in a cache's folder that is no fault."""
    return {
        "half_written": summarize(cache),
        "unrecorded_shards": unexpected.unrecorded_shards,
        "other_files": unexpected.harmless,
    }


def _print_json(
    cache: Path, unexpected: UnexpectedFiles, faults: "list[Fault]", fits: "list[LayerFit]", forgotten: list[int] | None
) -> None:
    """Print the result for a script; a number that is not finite is null."""
    layers = [(asdict(fit) | {"fault": fit.fault}).items() for fit in fits]
    document = {
        "faults": [asdict(fault) | {"what": with_urls(fault.what)} for fault in faults],
        "layers": [
            {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in one}
            for one in layers
        ],
        "forgotten_shards": forgotten or [],
        **_notes(cache, unexpected),
    }
    print(json.dumps(document, indent=1, allow_nan=False, default=asdict))


def _print_report(
    cache: Path, unexpected: UnexpectedFiles, faults: "list[Fault]", fits: "list[LayerFit]", forgotten: list[int] | None
) -> None:
    """Print the result for a person, one line a fault. `forgotten` is None if nothing was to be repaired."""
    for fault in faults:
        print(with_urls(f"{fault.place}: {fault.what}"))
    for fit in fits:
        channels = f"over a channel's deviation: median {fit.channel_error:.3%}, worst {fit.worst_channel_error:.3%}"
        if fit.is_finite and math.isnan(fit.channel_error):
            channels = "too few tokens to judge its channels, which more --samples do"
        name = f"layer {fit.layer_id:>3}" if fit.array == HIDDEN else "final state"
        print(f"{name}: relative error {fit.error:.3%} against the target run again; {channels}")
    for fit in fits:
        if fit.fault:
            print(fit.fault)
    _print_notes(_notes(cache, unexpected))
    if any(fit.fault and fit.is_finite for fit in fits):
        print("Next: do not train from it; extract again into a new --out, with the target in the dtype that serves.")
    elif faults:
        print(f"{len(faults):,} fault{'s' if len(faults) > 1 else ''}.")
        _print_next(cache, faults, forgotten)
    elif all(fit.is_finite for fit in fits):
        address = Path(with_urls(str(cache)))
        print(f"{shown(address)} is sound.")
        print(f"Next: {dflash_line('train', shown(address), '--out', free_name(address, 'run'))}")


def _print_notes(found: dict[str, Any]) -> None:
    if found["half_written"].files:
        print(f"tmp/ holds {found['half_written']}, which is no fault; `dflash extract` removes those of dead workers.")
    if unrecorded := found["unrecorded_shards"]:
        shards = "1 shard has" if len(unrecorded) == 1 else f"{len(unrecorded):,} shards have"
        print(f"{shards} files but no record yet, {unrecorded[0]} first: a worker may be at it, no reader is.")
    if others := found["other_files"]:
        named = ", ".join(others[:_OTHERS_SHOWN]) + (", ..." if len(others) > _OTHERS_SHOWN else "")
        print(f"Beside the cache's own files lie {named}, which no reader opens.")


def _print_next(cache: Path, faults: "list[Fault]", forgotten: list[int] | None) -> None:
    """Print what to do about a cache's faults, in order."""
    faulty = {fault.shard for fault in faults if fault.shard is not None and not fault.missing}
    steps = []
    if any(fault.shard is None and fault.array != FINAL for fault in faults):
        steps.append("mend the files whose lines say how")
    if forgotten:
        print(f"Forgot shards {', '.join(map(str, forgotten))}.")
    if forgotten is not None and (left := sorted(faulty - {*forgotten})):
        print(f"Kept shards {', '.join(map(str, left))}: a worker has done them anew meanwhile.")
    is_damaged = any(fault.shard is None and fault.array == FINAL for fault in faults)
    if (faulty or is_damaged) and forgotten is None:
        steps.append(with_urls(dflash_line("verify", cache, "--repair")))
    if any(fault.shard is not None or fault.array == FINAL for fault in faults):
        final = ", with --final" if any(fault.array == FINAL for fault in faults) else ""
        steps.append(with_urls(f"the `dflash extract` that made {cache}{final}"))
    for index, step in enumerate(steps):
        print(f"{'Next:' if index == 0 else 'then:'} {step}")
