"""`dflash doctor`: what this machine has and does, what is wrong with it, and what to do about that."""

import json
import os
import platform
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dflash_offline.pipeline.doctor.machine import DISTRIBUTION, Package, find_packages, installed
from dflash_offline.pipeline.doctor.storage import BucketTrial, Disk, Store, try_bucket, try_disk, try_store
from dflash_offline.pipeline.doctor.trials import REINSTALL, Trial, run_trials
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.paths import local_path, store_url
from dflash_offline.stages.cores import usable_cores, usable_memory_bytes
from dflash_offline.stages.progress import Progress, readable_bytes

_LITTLE_BYTES = 1 << 30
_HUB_TIMEOUT_S = 10


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as it should be."""

    needed: bool
    """Whether a command cannot run, or not by default, as long as this stands."""
    what: str
    do: str


@dataclass(frozen=True, kw_only=True)
class Examination:
    """All that was looked at."""

    version: str
    packages: list[Package]
    system: str
    cores: int
    """That this process may use."""
    memory_bytes: int
    """That this process may fill."""
    disk: Disk
    bucket: BucketTrial | None
    """None unless `--out` is an address in an object store; the disk is then that of temporary files."""
    store: Store | None
    """None where a package that it needs cannot be loaded."""
    trials: list[Trial]
    """Of torch, its devices, attention and compiler, and of a target."""
    findings: list[Finding]

    @property
    def sound(self) -> bool:
        """Whether nothing that is needed is wrong."""
        return not any(finding.needed for finding in self.findings)

    def to_json(self) -> str:
        """Return everything for a script."""
        return json.dumps({**asdict(self), "sound": self.sound}, indent=1)


def examine(out: Path, target: str | None, hub: bool, progress: Progress) -> Examination:
    """Look at everything, a target if one is named and the hub if asked, for half a minute; leaves nothing behind."""
    out, url = local_path(out), store_url(out)
    if out.exists() and not out.is_dir():
        raise DflashError(f"--out {out} is not a folder. Name the folder in which caches and runs will be.")
    progress.start("Examining", 3, "parts")
    bucket = try_bucket(url) if url else None
    disk = try_disk(Path(tempfile.gettempdir()) if url else out)
    progress.advance(1)
    store, broken = None, []
    try:
        store = try_store()
    except ImportError as error:  # a package that is missing or broken is what this looks for
        broken = [Finding(needed=True, what=f"The feature codec cannot be loaded: {error}.", do=REINSTALL)]
    progress.advance(1)
    trials = run_trials(target)
    progress.finish()
    packages = find_packages()
    return Examination(
        version=installed(DISTRIBUTION) or "?",
        packages=packages,
        system=f"{platform.system()} {platform.machine()}",
        cores=usable_cores(),
        memory_bytes=usable_memory_bytes(),
        disk=disk,
        bucket=bucket,
        store=store,
        trials=trials,
        findings=[
            *(*_package_findings(packages), *_disk_findings(disk), *_bucket_findings(bucket)),
            *(*broken, *_trial_findings(trials)),
            *(_hub_findings() if hub else ()),
        ],
    )


def _package_findings(packages: list[Package]) -> Iterator[Finding]:
    for package in packages:
        if package.fault:
            do = "Use another Python." if package.name == "python" else f"pip install '{package.requirement}'"
            yield Finding(needed=package.extra is None, what=package.fault, do=do)


def _disk_findings(disk: Disk) -> Iterator[Finding]:
    if disk.error:
        what = f"{disk.folder} cannot be written: {disk.error}."
        yield Finding(needed=True, what=what, do="Name another folder with --out.")
    if disk.free_bytes < _LITTLE_BYTES:
        what = f"{disk.folder} has {readable_bytes(disk.free_bytes)} free."
        yield Finding(needed=False, what=what, do="`dflash extract --plan` says how much a cache takes.")
    if not disk.locks:
        what = f"Locks do not hold under {disk.folder}: two commands could do the same work there."
        yield Finding(needed=False, what=what, do="Give one --out to one command at a time.")


def _bucket_findings(bucket: BucketTrial | None) -> Iterator[Finding]:
    if bucket and bucket.error:
        yield Finding(needed=True, what=bucket.error, do="Try again with this command; nothing was left there.")


def _trial_findings(trials: list[Trial]) -> Iterator[Finding]:
    for trial in trials:
        if trial.error:
            yield Finding(needed=trial.needed, what=f"{trial.name}: {trial.error}.", do=trial.do)


def _hub_findings() -> Iterator[Finding]:
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_HUB_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        what = f"{address} does not answer ({getattr(error, 'reason', None) or error})."
        yield Finding(needed=False, what=what, do="Name folders instead of hub ids, or set HF_ENDPOINT.")
