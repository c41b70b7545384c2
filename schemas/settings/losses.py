"""The losses of a draft and mixtures of them, as `--loss` names them."""

import math
from dataclasses import dataclass

from dflash_offline.schemas.settings.option import choice_problem

HARD = ("dflash", "dpace")
"""Cross-entropy with the cached words; they differ in how slots are weighed."""
SOFT = ("kl", "tv", "lk", "soft-ce")
"""Distances from the target's own distribution."""
LOSSES = (*HARD, *SOFT)


@dataclass(frozen=True, kw_only=True)
class LossMixture:
    """Losses with the coefficients by which they are added, in one order."""

    coefficients: tuple[tuple[str, float], ...]

    @classmethod
    def read(cls, text: str) -> "LossMixture":
        """Return what a text as `kl` or `kl:0.9,dflash:0.1` names; `ValueError` with what is wrong with it."""
        found: dict[str, float] = {}
        for part in text.split(","):
            name, colon, number = part.strip().partition(":")
            if problem := choice_problem("loss", name, LOSSES):
                raise ValueError(problem)
            if name in found:
                raise ValueError(f"loss names {name} twice; expected each loss once, with one coefficient.")
            found[name] = _coefficient(name, number) if colon else 1.0
            if not colon and "," in text:
                raise ValueError(f"loss gives {name} no coefficient; expected one for each, as in kl:0.9,dflash:0.1.")
        if found.keys() >= {*HARD}:
            raise ValueError(
                "loss mixes dflash and dpace, the same cross-entropy weighed in two ways; expected one of them, which "
                "then weighs every loss of the mixture."
            )
        if len(found) == 1:
            found = dict.fromkeys(found, 1.0)
        return cls(coefficients=tuple((name, found[name]) for name in (*SOFT, *HARD) if name in found))

    def __str__(self) -> str:
        """Return the text that names it: the same for all that read as the same."""
        if len(self.coefficients) == 1:
            return self.coefficients[0][0]
        return ",".join(f"{name}:{repr(number).removesuffix('.0')}" for name, number in self.coefficients)

    @property
    def needs_final(self) -> bool:
        """Whether it reads the target's states after its final norm."""
        return any(name in SOFT for name, _ in self.coefficients)

    @property
    def weighs_by_confidence(self) -> bool:
        """Whether slots are weighed as D-PACE does; else by their place in the block."""
        return any(name == "dpace" for name, _ in self.coefficients)

    def of(self, name: str) -> float:
        """Return a loss's coefficient, 0 where it has none."""
        return dict(self.coefficients).get(name, 0.0)


def _coefficient(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"loss gives {name} the coefficient {text!r}; expected a number above 0, as in {name}:0.9.")
    return number
