"""Which packages are installed, against those that the project's own metadata asks for. Loads none of them."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

DISTRIBUTION = "dflash-offline"
BRINGS = {
    "accelerate": "targets over several GPUs, quantized targets",
    "datasets": "data by hub id",
    "matplotlib": "the pages of --html",
    "selenium": "make check-browser",
}
"""What the packages of the extras are for, by the package's name."""
REPORTERS = {"wandb": "dflash train --report-to wandb", "trackio": "dflash train --report-to trackio"}
"""Packages that are used where they are, and that no extra installs."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """One package: what is here, and what is supported."""

    name: str
    found: str | None
    """Installed version; None if it is absent."""
    supported: str
    """Versions that will do, as pip writes them; empty for any."""
    extra: str | None = None
    """The extra that installs it; None for what is always needed."""
    brings: str = ""
    """What an optional package is for."""

    @property
    def fits(self) -> bool:
        """Whether it is here in a supported version."""
        return self.found is not None and SpecifierSet(self.supported).contains(self.found, prereleases=True)

    @property
    def fault(self) -> str | None:
        """What is wrong with it, in a few words; None if it fits."""
        if self.found is None:
            return f"{self.name} is not installed; expected {self.supported or 'any version'}."
        return None if self.fits else f"{self.name} is {self.found}; expected {self.supported}."


def installed(name: str) -> str | None:
    """Return the version of an installed distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def needed_packages() -> list[Package]:
    """Return Python and every package without which nothing runs."""
    python = Package(
        name="python", found=platform.python_version(), supported=metadata(DISTRIBUTION)["Requires-Python"] or ""
    )
    return [python, *(_package(one, None) for one in _requirements() if one.marker is None)]


def optional_packages() -> list[Package]:
    """Return the packages of the extras for users, and those that are used where they are."""
    found: dict[str, Package] = {}
    for one in _requirements():
        extra = _extra(one)
        if extra not in (None, "dev"):
            found.setdefault(one.name, _package(one, extra))
    for name, brings in REPORTERS.items():
        found.setdefault(name, Package(name=name, found=installed(name), supported="", brings=brings))
    return list(found.values())


def _requirements() -> list[Requirement]:
    return [Requirement(text) for text in requires(DISTRIBUTION) or []]


def _extra(one: Requirement) -> str | None:
    """Return the extra that a requirement belongs to."""
    extras = metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    if one.marker is None or one.marker.evaluate({"extra": ""}):
        return None
    return next((extra for extra in extras if one.marker.evaluate({"extra": extra})), None)


def _package(one: Requirement, extra: str | None) -> Package:
    return Package(
        name=one.name,
        found=installed(one.name),
        supported=",".join(sorted(map(str, one.specifier), reverse=True)),
        extra=extra,
        brings=BRINGS.get(one.name, "") if extra else "",
    )
