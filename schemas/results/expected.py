"""The acceptance length that is expected where tokens are drawn, which follows from cached final states."""

from dataclasses import dataclass

TEMPERATURES = (0.6, 1.0)
"""At which it is computed wherever the target's distribution is known."""
WHAT_IT_IS = (
    "Of drafted and verified tokens drawn at the temperature, given that the answers are the cached ones: what live "
    "decoding gives on average if the target drew them at that temperature, and too much where they are likelier."
)


def expected_metric(temperature: float) -> str:
    """Return what a run's log calls it, behind `val_`."""
    return f"expected_acceptance_length_t{temperature:g}"


@dataclass(frozen=True, kw_only=True)
class ExpectedAcceptance:
    """The serving walk along cached answers where tokens are drawn."""

    temperature: float
    pooled: float
    """Tokens of all turns after their first / rounds that they are expected to take."""
    rounds: float
    """Those rounds."""
