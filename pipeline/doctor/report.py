"""What `dflash doctor` prints for a person, at most 80 columns wide."""

import platform
import shlex
import textwrap
from pathlib import Path

from dflash_offline.pipeline.doctor.examine import DEFAULT_BACKENDS, Examination
from dflash_offline.pipeline.doctor.machine import CodecRates
from dflash_offline.schemas.errors import dflash_line
from dflash_offline.schemas.paths import free_name
from dflash_offline.stages.progress import readable_bytes

_EXAMPLE = (5, 4096)
"""Layers and width of the target for which rates are told, if none is named."""


def print_examination(found: Examination, out: Path) -> None:
    """Print what was found, then what is wrong and what to do."""
    for title, lines in (
        ("Software", _software(found)),
        ("Optional", _optional(found)),
        ("Machine", _machine(found)),
        ("Devices", _devices(found)),
        ("Attention, a training step compared with eager attention's", _attention(found)),
        ("torch.compile", _compiler(found)),
        ("Disk", _disk(found)),
        ("Feature codec", _codec(found)),
        ("Target", _target(found)),
        ("Hub", ["not tried; --hub tries it" if found.hub is None else found.hub or "answers"]),
    ):
        if lines:
            print(title)
        for line in lines:
            print(textwrap.fill(line, 80, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False))
    print()
    for finding in found.findings:
        head = "WRONG  " if finding.needed else "NOTE   "
        print(textwrap.fill(finding.what, 80, initial_indent=head, subsequent_indent=" " * 7, break_on_hyphens=False))
        print(f"       {finding.do}")
    if not any(finding.needed for finding in found.findings):
        print("Nothing that is needed is wrong.")
        print(f"Next: {dflash_line('demo', '--out', free_name(out / 'x', 'demo'))}")


def _software(found: Examination) -> list[str]:
    lines = [f"dflash-offline {found.version} on {platform.system()} {platform.machine()}"]
    for package in found.needed:
        mark = "" if package.fits else "   <- WRONG"
        lines.append(f"{package.name:<16} {package.found or 'absent':<14} {package.supported}{mark}".rstrip())
    return lines


def _optional(found: Examination) -> list[str]:
    lines = []
    for package in found.optional:
        lines.append(f"{package.name:<16} {package.found or 'absent':<14} {package.brings}")
        if package.found is None:
            source = f"dflash-offline[{package.extra}]" if package.extra else package.name
            lines.append(f"{'':<31} pip install {shlex.quote(source)}")
    return lines


def _machine(found: Examination) -> list[str]:
    machine = found.machine
    memory = f"{readable_bytes(machine.memory_bytes)} of memory"
    if machine.available_bytes is not None:
        memory += f", {readable_bytes(machine.available_bytes)} of it free"
    if machine.memory_limit_bytes is not None:
        memory += f"; this process is held to {readable_bytes(machine.memory_limit_bytes)}"
    return [
        f"{machine.usable_cores} of {machine.cores} cores may be used",
        memory,
        f"{machine.open_files:,} files may be open at once",
    ]


def _devices(found: Examination) -> list[str]:
    lines = []
    for one in found.of("device"):
        if one["error"]:
            lines.append(f"{one['device']:<8} FAILS: {one['error']}")
        elif one["device"] == "cpu":
            lines.append(f"cpu      {one['name']}, {one['threads']} threads")
        else:
            memory = f"{readable_bytes(one['bytes'])}, {readable_bytes(one['free_bytes'])} free"
            bfloat16 = "bfloat16" if one["bfloat16"] else "NO bfloat16"
            lines.append(f"{one['device']:<8} {one['name']}: {memory}, capability {one['capability']}, {bfloat16}")
    if found.machine.driver:
        lines.append(f"NVIDIA driver {found.machine.driver}")
    return lines


def _attention(found: Examination) -> list[str]:
    lines = []
    for one in found.of("attention"):
        default = "; the default" if DEFAULT_BACKENDS[one["device"].split(":")[0]] == one["backend"] else ""
        works = "works" if one.get("backward") else "works forward only, as everywhere on a CPU"
        state = f"FAILS: {one['error']}" if one["error"] else works
        lines.append(f"{one['device']:<8} {one['backend']:<15} {state}{default}")
    return lines


def _compiler(found: Examination) -> list[str]:
    lines = []
    for one in found.of("compile"):
        where = one.get("device", "")
        state = f"FAILS: {one['error']}" if one["error"] else f"works, {one['seconds']:.0f} s for a small function"
        default = "; not used by default" if where == "cpu" else "; the default"
        lines.append(f"{where:<8} {state}{default}")
    return lines


def _disk(found: Examination) -> list[str]:
    disk = found.disk
    lines = [f"{disk.folder}: {readable_bytes(disk.free_bytes)} free"]
    if disk.error:
        return [*lines, f"cannot be written: {disk.error}"]
    assert disk.write_bytes_per_s is not None and disk.read_bytes_per_s is not None and disk.trial_bytes is not None
    written, read = readable_bytes(disk.write_bytes_per_s), readable_bytes(disk.read_bytes_per_s)
    lines.append(f"writes {written}/s, synced, and reads {read}/s ({readable_bytes(disk.trial_bytes)} tried)")
    lines.append("locks hold" if disk.locks else "locks do NOT hold")
    return lines


def _codec(found: Examination) -> list[str]:
    codec = found.codec
    if not isinstance(codec, CodecRates):
        return [f"FAILS: {codec}"]
    layers, width = _EXAMPLE
    whose = "a target of which"
    for one in found.of("target"):
        if not one["error"]:
            layers, width, whose = len(one["layer_ids"]), one["hidden_size"], "this target, of which"
    token = 2 * layers * width
    encoded, decoded = codec.encode_bytes_per_s, codec.decode_bytes_per_s
    return [
        f"one core encodes {readable_bytes(encoded)}/s and decodes {readable_bytes(decoded)}/s of raw bfloat16",
        f"of {whose} {layers} layers of width {width:,} are captured, {readable_bytes(token)} a token, that is "
        f"{encoded / token:,.0f} and {decoded / token:,.0f} tokens/s",
    ]


def _target(found: Examination) -> list[str]:
    lines = []
    for one in found.of("target"):
        if one["error"]:
            lines.append(f"FAILS: {one['error']}")
            continue
        tags = "with" if one["generation_tags"] else "without"
        lines.append(f"{one['folder']}: {one['model_type']}, {readable_bytes(one['weight_bytes'])} of weights")
        lines.append(
            f"{one['layers']} layers of width {one['hidden_size']:,}; captured by default: "
            f"{', '.join(map(str, one['layer_ids']))}; a chat template {tags} generation tags"
        )
    return lines
