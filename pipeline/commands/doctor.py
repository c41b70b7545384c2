"""`dflash doctor`: its options, what they start, and what is printed, at most 80 columns wide."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.options import Json, LogFormatOption, Quiet, command
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.errors import dflash_line
from dflash_offline.schemas.paths import free_name, store_url
from dflash_offline.schemas.settings.option import Option
from dflash_offline.stages.progress import readable_bytes

if TYPE_CHECKING:
    from dflash_offline.pipeline.doctor.examine import Examination


@command(
    "doctor",
    "Look at this machine, and say what is wrong.",
    ("packages, devices, attention, this disk", ""),
    ("another disk and a target", "--out /data --target Qwen/Qwen3-8B"),
    ("a bucket", "--out s3://bucket/caches"),
    ("for a bug report", "--json > here.json"),
)
def doctor(
    out: Annotated[
        Path,
        Option(
            "Folder whose disk is tried, or address of a bucket: where caches and runs will be.",
            "What is looked at",
            "free",
            "FOLDER",
        ),
    ] = Path(),
    target: Annotated[
        str | None,
        Option(
            "Target to look at as well: a folder, or a hub id that was fetched before.",
            "What is looked at",
            "free",
            "MODEL",
        ),
    ] = None,
    hub: Annotated[bool, Option("See whether the model hub answers as well.", "What is looked at", "free")] = False,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Look at packages, devices, disk and speed; exit 1 if something that is needed is wrong."""
    with reported(quiet=quiet, log_format=log_format) as progress:
        from dflash_offline.pipeline.doctor.examine import examine

        found = examine(out, target, hub, progress)
        print(found.to_json()) if json_ else _print(found, out)
        if not found.sound:
            raise typer.Exit(1)


def _print(found: "Examination", out: Path) -> None:
    """Print what was found, then what is wrong and what to do."""
    for title, lines in (
        ("Software", _packages(found)),
        ("Torch; attention by a training step, compared with eager attention's", _trials(found)),
        ("Caches", _storage(found)),
    ):
        print(title)
        for line in lines:
            print(_filled(line, "  "))
    print()
    for finding in found.findings:
        print(_filled(finding.what, "WRONG  " if finding.needed else "NOTE   "))
        print(f"       {finding.do}")
    if found.sound:
        print("Nothing that is needed is wrong.")
        print(f"Next: {dflash_line('demo', '--out', free_name(Path() / 'x' if store_url(out) else out / 'x', 'demo'))}")


def _filled(text: str, head: str) -> str:
    indent = " " * max(4, len(head))
    return textwrap.fill(text, 80, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False)


def _packages(found: "Examination") -> Iterator[str]:
    memory = readable_bytes(found.memory_bytes)
    yield f"dflash-offline {found.version} on {found.system} with {found.cores} usable cores, {memory} of memory"
    for package in found.packages:
        note = "   <- WRONG" if package.fault else ""
        if package.extra and not package.installed:
            note = f"   pip install '{package.requirement}'"
        yield f"{package.name:<16} {package.installed or 'absent':<14} {package.supported}{note}".rstrip()


def _trials(found: "Examination") -> Iterator[str]:
    for trial in found.trials:
        yield f"{trial.name:<22} {f'FAILS: {trial.error}' if trial.error else trial.result}"


def _storage(found: "Examination") -> Iterator[str]:
    disk, store, bucket = found.disk, found.store, found.bucket
    if bucket and bucket.error:
        yield f"{bucket.address}: no cache can lie there"
    elif bucket:
        written, read = readable_bytes(bucket.write_bytes_per_s), readable_bytes(bucket.read_bytes_per_s)
        yield (
            f"{bucket.address} writes {written}/s and reads {read}/s, one object at a time; a request takes "
            f"{1000 * bucket.request_s:.0f} ms; writes can be conditional"
        )
    yield f"{disk.folder}: {readable_bytes(disk.free_bytes)} free"
    if disk.error:
        yield f"cannot be written: {disk.error}"
    else:
        written, read = readable_bytes(disk.write_bytes_per_s), readable_bytes(disk.read_bytes_per_s)
        yield f"writes {written}/s, synced, and reads {read}/s; locks {'hold' if disk.locks else 'do NOT hold'}"
    if store:
        encoded, decoded = readable_bytes(store.encode_bytes_per_s), readable_bytes(store.decode_bytes_per_s)
        yield f"one core encodes {encoded}/s and decodes {decoded}/s of raw bfloat16"
        files = "any number of" if store.open_files < 0 else f"{store.open_files:,}"
        yield f"{files} files may be open at once; {store.open_shards:,} shard files are kept open"
