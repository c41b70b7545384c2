"""What a variant of the draft says of itself, without torch: its fields, its tensors, its place in config.json."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.schemas.draft.values import Found

Sizes = Mapping[str, Any]
"""The sizes of a draft's config.json, as a checked document or the fields of a `DraftConfig` give them."""


class Curve(NamedTuple):
    """A metric as reports show it."""

    kind: str
    """Which rows of the log have it: training or validation."""
    metric: str
    label: str
    """What it is, for a line of the terminal."""
    plot: str
    """Title of the plot that it stands in; one that all drafts have, or its own."""
    name: str
    """What it is called there."""


class Counted(NamedTuple):
    """What a variant adds to a step."""

    by_layer: int = 0
    """For each block token, in each layer."""
    by_slot: int = 0
    """For each slot that predicts, behind the layers."""


class Variant(Protocol):
    """A variant's own fields; two are equal if these are.

    Its modules, loss and drafting are in `stages/draft/variants`, under the same architecture.
    """

    name: ClassVar[str]
    """What a user calls it."""
    architecture: ClassVar[str]
    """What config.json calls it."""
    speculators: ClassVar[str | None]
    """What the speculators format calls it; None if that has no such draft."""
    transformers: ClassVar[bool]
    """Whether transformers' own generator has such a draft."""
    vllm_method: ClassVar[str]
    """What vLLM's speculative config calls its way of drafting."""
    sglang_algorithm: ClassVar[str]
    """What SGLang calls it."""
    needs_plain_head: ClassVar[bool]
    """Whether vLLM serves it only where the target's head is not quantized."""
    summary: ClassVar[str]
    """What a card says of it, a sentence; empty for the base."""
    starts_from: ClassVar[tuple[str, ...]]
    """Architectures of drafts without its own tensors that it can start from; it then drafts at first what they do."""
    nested_only: ClassVar[tuple[str, ...]]
    """Fields of every draft that its config.json has in `dflash_config` alone, and not at the top as well."""
    top_only: ClassVar[tuple[str, ...]]
    """Fields of every draft that its config.json may have at the top alone, where its clients find them."""
    first_slot: ClassVar[int]
    """First slot of a block that predicts."""
    label_offset: ClassVar[int]
    """Slot k of anchor a predicts the token at a + label_offset + k."""
    is_unbroken: ClassVar[bool]
    """Whether a block's supervised slots end before the first that is not."""
    has_confidence: ClassVar[bool]
    """Whether it foretells each slot's acceptance, so that a block may end early."""
    needs_final: ClassVar[bool]
    """Whether its loss reads the target's states after the final norm, which a cache has only where asked for."""
    anchors: ClassVar[tuple[str, ...]]
    """Kinds of `AnchorRule` that it can be trained by; the first is taken where none is asked for."""
    has_own_loss: ClassVar[bool]
    """Whether what a slot learns is its own, so that a user's choice of a loss only says how slots are weighed."""
    loss_settings: ClassVar[Mapping[str, float]]
    """Settings of its loss, by the names that a user knows them by, with their defaults."""
    losses: ClassVar[tuple[str, ...]]
    """Parts of its loss that are measured by themselves."""
    paths: ClassVar[tuple[str, ...]]
    """Other ways to choose a block's tokens whose accepted length is measured beside that of the served one."""
    curves: ClassVar[tuple[Curve, ...]]
    """Its metrics, as reports show them."""
    by_slot: ClassVar[Mapping[str, str]]
    """Its metrics of held-out samples that have a value for each slot, with what they are."""

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return its tensors beyond those of every draft, with their shapes."""

    def kept(self, sizes: Sizes, compiled: bool) -> "Counted":
        """Return how many numbers a step keeps for its backward pass beyond the base draft's."""

    def work(self, sizes: Sizes) -> "Counted":
        """Return how many multiply-adds a forward pass takes beyond the base draft's."""

    def written(self, document: dict[str, Any]) -> dict[str, Any]:
        """Return the config.json of every draft as this variant's clients read it, its own fields included."""

    def speculators_fields(self) -> dict[str, Any]:
        """Return what its config.json in the speculators format has beyond, or other than, every draft's."""

    @classmethod
    def anchor_rule(cls, kind: str, block_size: int) -> AnchorRule:
        """Return which positions anchor a block of K tokens, by one of its kinds."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Variant":
        """Return the fields that a config.json without faults has."""

    @classmethod
    def faults(cls, config: dict[str, Any]) -> Found:
        """Yield what is wrong with its fields in a config.json."""

    def figures(self, means: Mapping[str, Any]) -> dict[str, Any]:
        """Return its further metrics, given those that are measured of every path and part of the loss."""
