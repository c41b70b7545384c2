"""`dflash doctor`: what this machine has and does, what is wrong with it, and what to do about that."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dflash_offline.pipeline.doctor.disk import Disk, try_disk
from dflash_offline.pipeline.doctor.installed import Package, installed, needed_packages, optional_packages
from dflash_offline.pipeline.doctor.machine import CodecRates, Machine, look_at_machine, time_codec
from dflash_offline.pipeline.doctor.trial_process import run_trials
from dflash_offline.schemas.errors import DflashError
from dflash_offline.stages.progress import Progress, readable_bytes

HUB_TIMEOUT_S = 10
FEW_BYTES = 1 << 30
FEW_FILES = 1024
DEFAULT_BACKENDS = {"cpu": "sdpa", "cuda": "flex_attention"}
"""What `--attention-backend auto` takes."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as it should be."""

    needed: bool
    """Whether a stage cannot run, or not by default, as long as this stands."""
    what: str
    do: str


@dataclass(frozen=True, kw_only=True)
class Examination:
    """All that was looked at; what could not be is None."""

    version: str
    needed: list[Package]
    optional: list[Package]
    machine: Machine
    disk: Disk
    codec: CodecRates | str
    """The rates, or why there are none."""
    trials: list[dict[str, Any]]
    """What `trials.py` printed of torch, devices, attention and the compiler, and of a target."""
    hub: str | None
    """What is wrong with the hub, empty for nothing; None if it was not tried."""
    findings: list[Finding] = field(default_factory=list)

    def of(self, trial: str) -> list[dict[str, Any]]:
        """Return the results of one kind of trial."""
        return [one for one in self.trials if one["trial"] == trial]

    def to_json(self) -> str:
        """Return everything for a script."""
        sound = not any(finding.needed for finding in self.findings)
        return json.dumps({**asdict(self), "sound": sound}, indent=1, default=str)


def examine(out: Path, target: str | None, with_hub: bool, progress: Progress) -> Examination:
    """Look at everything, and at a target if one is named; takes half a minute, and leaves nothing behind."""
    progress.start("Examining", 4 + (target is not None), "parts")
    disk = try_disk(out)
    progress.advance(1)
    codec = _codec()
    progress.advance(1)
    trials = run_trials("torch")
    progress.advance(1)
    if not any(one["error"] for one in trials if one["trial"] == "torch"):
        trials += run_trials("compile")
    progress.advance(1)
    if target is not None:
        trials += run_trials("target", target)
        progress.advance(1)
    found = Examination(
        version=installed("dflash-offline") or "?",
        needed=needed_packages(),
        optional=optional_packages(),
        machine=look_at_machine(),
        disk=disk,
        codec=codec,
        trials=trials,
        hub=_try_hub() if with_hub else None,
    )
    progress.finish()
    found.findings.extend(_findings(found))
    return found


def _codec() -> CodecRates | str:
    try:
        return time_codec()
    except ImportError as error:  # a package that is missing or broken is what this looks for
        return str(error)


def _try_hub() -> str:
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_TIMEOUT_S):
            return ""
    except (OSError, ValueError) as error:
        return f"{address} does not answer ({getattr(error, 'reason', None) or error})."


def _findings(found: Examination) -> Iterator[Finding]:
    yield from _package_findings(found)
    yield from _disk_findings(found.disk)
    if isinstance(found.codec, str):
        yield Finding(needed=True, what=f"The feature codec cannot be loaded: {found.codec}.", do=_REINSTALL)
    if found.machine.open_files < FEW_FILES:
        yield Finding(
            needed=False,
            what=f"Only {found.machine.open_files} files may be open at once; training keeps up to 256 a cache open.",
            do=f"ulimit -n {FEW_FILES}, before the command.",
        )
    for trial in found.trials:
        yield from _trial_findings(trial, found)
    if found.hub:
        yield Finding(needed=False, what=found.hub, do="Name folders instead of hub ids, or set HF_ENDPOINT.")


_REINSTALL = "pip install --force-reinstall dflash-offline, in an environment of its own."


def _package_findings(found: Examination) -> Iterator[Finding]:
    for package in found.needed:
        if package.fault:
            wanted = f"{package.name}{package.supported}"
            do = "Use another Python." if package.name == "python" else f"pip install '{wanted}'"
            yield Finding(needed=True, what=package.fault, do=do)
    for package in found.optional:
        if package.found and package.fault:
            do = f"pip install '{package.name}{package.supported}'"
            yield Finding(needed=False, what=f"{package.fault} It is for {package.brings}.", do=do)
    build = next((one for one in found.of("torch") if not one["error"]), None)
    if build and found.machine.driver and not any(one["device"] != "cpu" for one in found.of("device")):
        why = "is a CPU build" if build["cuda"] is None else f"is built for CUDA {build['cuda']} and sees none of it"
        yield Finding(
            needed=False,
            what=f"There is a GPU with driver {found.machine.driver}, and torch {build['version']} {why}.",
            do="Install the build of torch for that driver: https://pytorch.org/get-started.",
        )


def _disk_findings(disk: Disk) -> Iterator[Finding]:
    if disk.error:
        yield Finding(
            needed=True, what=f"{disk.folder} cannot be written: {disk.error}.", do="Name another folder with --out."
        )
    if disk.free_bytes < FEW_BYTES:
        yield Finding(
            needed=False,
            what=f"{disk.folder} has {readable_bytes(disk.free_bytes)} free.",
            do="`dflash extract --plan` says how much a cache takes.",
        )
    if disk.locks is False:
        yield Finding(
            needed=False,
            what=f"Locks do not hold under {disk.folder}: two commands could do the same work there.",
            do="Give one --out to one command at a time.",
        )


def _trial_findings(trial: dict[str, Any], found: Examination) -> Iterator[Finding]:
    kind, error = trial["trial"], trial["error"]
    where = trial.get("device", "")
    if kind == "target":
        yield from _target_findings(trial, found)
    elif kind == "device" and not error and trial.get("bfloat16") is False:
        yield Finding(needed=False, what=f"{where} does not compute in bfloat16.", do="Train with --dtype float32.")
    elif not error:
        return
    elif kind == "torch":
        yield Finding(needed=True, what=f"torch cannot be loaded: {error}.", do=_REINSTALL)
    elif kind == "device":
        yield Finding(needed=True, what=f"{where} cannot be used: {error}.", do="Hide it: CUDA_VISIBLE_DEVICES.")
    elif kind == "attention":
        backend, default = trial["backend"], DEFAULT_BACKENDS[where.split(":")[0]]
        others = [one["backend"] for one in found.of("attention") if one["device"] == where and not one["error"]]
        instead = f"Train with --attention-backend {others[0]}." if others else _REINSTALL
        yield Finding(
            needed=backend == default,
            what=f"{backend} attention does not work on {where}: {error}.",
            do=instead if backend == default else f"Leave it: {default} is the default there.",
        )
    elif kind == "compile":
        on_gpu = where != "cpu"
        do = "Train with --no-compile" if on_gpu else "Leave it, for --compile is not the default on a CPU"
        yield Finding(
            needed=on_gpu,
            what=f"torch.compile does not work on {where}: {error}.",
            do=f"{do}; or install a C++ compiler, as in apt install g++.",
        )


def _target_findings(trial: dict[str, Any], found: Examination) -> Iterator[Finding]:
    if trial["error"]:
        yield Finding(
            needed=True,
            what=f"The target cannot be used: {trial['error']}.",
            do="Name its folder, or fetch it first: hf download NAME.",
        )
        return
    needed, gpus = trial["weight_bytes"], [one["bytes"] for one in found.of("device") if one.get("bytes")]
    room, place = (max(gpus), "one GPU") if gpus else (found.machine.usable_bytes, "the memory of this machine")
    if needed > room:
        do = "Extract with --device-map auto over several GPUs, or on a larger machine."
        what = f"The target's weights take {readable_bytes(needed)}, and {place} holds {readable_bytes(room)}."
        yield Finding(needed=False, what=what, do=do)


def require_folder(out: Path) -> None:
    """Raise `DflashError` if the path is something else than a folder."""
    if out.exists() and not out.is_dir():
        raise DflashError(f"--out {out} is not a folder. Name the folder in which caches and runs will be.")
