"""Packages, memory and the driver of the GPUs. Loads neither torch nor any package that it looks for."""

import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

DISTRIBUTION = "dflash-offline"
_DEVELOPMENT = ("dev", "browser")
"""Extras that only those who change the code need."""
_TIMEOUT_S = 20


@dataclass(frozen=True, kw_only=True)
class Package:
    """One package: the version that is installed, and those that are supported."""

    name: str
    installed: str | None
    """None if it is not."""
    supported: str
    """As pip writes versions; empty for any."""
    extra: str | None = None
    """The extra that installs it; None for what is always needed."""

    @property
    def requirement(self) -> str:
        """What to tell pip."""
        return f"dflash-offline[{self.extra}]" if self.extra else f"{self.name}{self.supported}"

    @property
    def fault(self) -> str | None:
        """What is wrong with it; None for a supported version, and for an optional package that is not installed."""
        if self.installed is None:
            return None if self.extra else f"{self.name} is not installed; expected {self.supported or 'any version'}."
        fits = SpecifierSet(self.supported).contains(self.installed, prereleases=True)
        return None if fits else f"{self.name} is {self.installed}; expected {self.supported}."


def installed(name: str) -> str | None:
    """Return the version of an installed distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def find_packages() -> list[Package]:
    """Return Python, then what is always needed, then what the extras install, as the project's own metadata says."""
    about = metadata(DISTRIBUTION)
    supported = about["Requires-Python"] or ""
    found = [Package(name="python", installed=platform.python_version(), supported=supported)]
    requirements = [Requirement(text) for text in requires(DISTRIBUTION) or []]
    for extra in (None, *(name for name in about.get_all("Provides-Extra") or () if name not in _DEVELOPMENT)):
        for one in requirements:
            if one.marker is None if extra is None else one.marker and one.marker.evaluate({"extra": extra}):
                supported = ",".join(sorted(map(str, one.specifier), reverse=True))
                found.append(Package(name=one.name, installed=installed(one.name), supported=supported, extra=extra))
    return found


def nvidia_driver() -> str | None:
    """Return the version of NVIDIA's driver; None where nvidia-smi finds no GPU."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(found.stdout.split()), None)
