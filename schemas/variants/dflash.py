"""The base draft, DFlash (arXiv 2602.06036): a block in one pass, each slot by itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dflash_offline.schemas.draft.anchor_rule import ANCHORS, AnchorRule
from dflash_offline.schemas.draft.values import Found
from dflash_offline.schemas.variants.variant import Counted, Curve, Sizes


@dataclass(frozen=True, kw_only=True)
class DFlash:
    """Nothing beyond what every draft has."""

    name: ClassVar[str] = "dflash"
    architecture: ClassVar[str] = "DFlashDraftModel"
    speculators: ClassVar[str | None] = "dflash"
    transformers: ClassVar[bool] = True
    vllm_method: ClassVar[str] = "dflash"
    sglang_algorithm: ClassVar[str] = "DFLASH"
    needs_plain_head: ClassVar[bool] = False
    summary: ClassVar[str] = ""
    starts_from: ClassVar[tuple[str, ...]] = ()
    nested_only: ClassVar[tuple[str, ...]] = ()
    top_only: ClassVar[tuple[str, ...]] = ()
    first_slot: ClassVar[int] = 1
    label_offset: ClassVar[int] = 0
    is_unbroken: ClassVar[bool] = False
    has_confidence: ClassVar[bool] = False
    needs_final: ClassVar[bool] = False
    anchors: ClassVar[tuple[str, ...]] = ANCHORS
    has_own_loss: ClassVar[bool] = False
    loss_settings: ClassVar[Mapping[str, float]] = {}
    losses: ClassVar[tuple[str, ...]] = ()
    paths: ClassVar[tuple[str, ...]] = ()
    curves: ClassVar[tuple[Curve, ...]] = ()
    by_slot: ClassVar[Mapping[str, str]] = {}

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return no further tensor."""
        return {}

    def kept(self, sizes: Sizes, compiled: bool) -> Counted:
        """Return nothing further."""
        return Counted()

    def work(self, sizes: Sizes) -> Counted:
        """Return nothing further."""
        return Counted()

    def written(self, document: dict[str, Any]) -> dict[str, Any]:
        """Return the document as it is."""
        return document

    def speculators_fields(self) -> dict[str, Any]:
        """Return its names there."""
        return {"architectures": ["DFlashSpeculator"], "speculators_model_type": self.speculators}

    @classmethod
    def anchor_rule(cls, kind: str, block_size: int) -> AnchorRule:
        """Return the rule over the block's own tokens."""
        return AnchorRule(block_size, kind)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "DFlash":
        """Return the variant, which has no fields."""
        return cls()

    @classmethod
    def faults(cls, config: dict[str, Any]) -> Found:
        """Yield nothing."""
        yield from ()

    def figures(self, means: Mapping[str, Any]) -> dict[str, Any]:
        """Return no further metric."""
        return {}
