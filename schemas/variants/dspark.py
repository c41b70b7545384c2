"""DSpark (arXiv 2607.05147): every slot predicts the token after its own, biased by the token before it.

A second head says how probable it is that the target accepts a slot's token. Read in DeepSpec (`modeling/dspark`), in
speculators 0.9.0 (`dspark`), in vLLM's `qwen3_dspark` and in SGLang's `dspark`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dflash_offline.schemas.checked import Size
from dflash_offline.schemas.draft.anchor_rule import PARTIAL, AnchorRule
from dflash_offline.schemas.draft.values import Found, is_int, say
from dflash_offline.schemas.variants.variant import Counted, Curve, Sizes

_SAID = {"markov_head_type": "vanilla", "enable_confidence_head": True, "confidence_head_with_markov": True}
"""What its config.json says of the heads that are computed here; there are others."""
_DRAWN = "Acceptance of a token drawn from the draft"


def _loss(metric: str, name: str) -> Curve:
    return Curve("training", metric, f"training loss, {name}", "Loss", f"training, {name}")


@dataclass(frozen=True, kw_only=True)
class DSpark:
    """The width of the Markov head; the default is that of the published drafts."""

    name: ClassVar[str] = "dspark"
    architecture: ClassVar[str] = "Qwen3DSparkModel"
    speculators: ClassVar[str | None] = "dspark"
    transformers: ClassVar[bool] = False
    vllm_method: ClassVar[str] = "dspark"
    sglang_algorithm: ClassVar[str] = "DSPARK"
    needs_plain_head: ClassVar[bool] = False
    summary: ClassVar[str] = (
        "A DSpark draft: every slot of a block predicts, biased by the token before it, and a second head says how "
        "probable it is\nthat the target accepts it."
    )
    starts_from: ClassVar[tuple[str, ...]] = ()
    nested_only: ClassVar[tuple[str, ...]] = ()
    top_only: ClassVar[tuple[str, ...]] = ("block_size", "target_layer_ids", "num_target_layers", "mask_token_id")
    first_slot: ClassVar[int] = 0
    label_offset: ClassVar[int] = 1
    is_unbroken: ClassVar[bool] = True
    has_confidence: ClassVar[bool] = True
    needs_final: ClassVar[bool] = True
    anchors: ClassVar[tuple[str, ...]] = (PARTIAL,)
    has_own_loss: ClassVar[bool] = True
    loss_settings: ClassVar[Mapping[str, float]] = {
        "ce_loss_alpha": 0.1,
        "l1_loss_alpha": 0.9,
        "confidence_loss_alpha": 1.0,
    }
    losses: ClassVar[tuple[str, ...]] = ("ce_loss", "l1_loss", "confidence_loss", "mean_confidence")
    paths: ClassVar[tuple[str, ...]] = ("without_markov",)
    curves: ClassVar[tuple[Curve, ...]] = (
        Curve(
            *("validation", "val_serving_walk_without_markov", "serving walk, without the Markov head"),
            *("Acceptance length, serving walk", "without the Markov head"),
        ),
        Curve("validation", "val_mean_acceptance", "acceptance of a drawn token", _DRAWN, "expected"),
        Curve(
            "validation", "val_mean_confidence", "acceptance as foretold", _DRAWN, "as the confidence head foretells"
        ),
        _loss("ce_loss", "cross-entropy"),
        _loss("l1_loss", "distance to the target's distribution"),
        _loss("confidence_loss", "confidence head"),
    )
    by_slot: ClassVar[Mapping[str, str]] = {}

    markov_rank: Size = 256
    """r: width of the codes of a token and of the token before it."""

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return both tables of the Markov head, and the confidence head."""
        table = sizes["vocab_size"], self.markov_rank
        return {
            "markov_head.markov_w1.weight": table,
            "markov_head.markov_w2.weight": table,
            "confidence_head.proj.weight": (1, sizes["hidden_size"] + self.markov_rank),
            "confidence_head.proj.bias": (1,),
        }

    def kept(self, sizes: Sizes, compiled: bool) -> Counted:
        """Return the numbers kept of a slot: the code before it, what the confidence head reads, the target's state.

        Logits are formed again in the backward pass.
        """
        return Counted(0, 2 * self.markov_rank + 2 * sizes["hidden_size"])

    def work(self, sizes: Sizes) -> Counted:
        """Return the multiply-adds of a slot: the target's logits, and both again in the backward pass; the bias.

        They are counted as if each had two gradients, as those of the layers have.
        """
        return Counted(0, sizes["hidden_size"] * sizes["vocab_size"] + 4 * self.markov_rank * sizes["vocab_size"] // 3)

    def written(self, document: dict[str, Any]) -> dict[str, Any]:
        """Return the document as the published drafts have it: all at the top, nothing in `dflash_config`."""
        nested = document["dflash_config"]
        said = {"is_causal": nested["causal"]} if "causal" in nested else {}
        kept = {name: value for name, value in document.items() if name != "dflash_config"}
        return {**kept, **said, "architectures": [self.architecture], **self._own()}

    def speculators_fields(self) -> dict[str, Any]:
        """Return its names there, and its fields."""
        return {"architectures": ["DSparkSpeculator"], "speculators_model_type": self.speculators, **self._own()}

    def _own(self) -> dict[str, Any]:
        return {"markov_rank": self.markov_rank, **_SAID}

    @classmethod
    def anchor_rule(cls, kind: str, block_size: int) -> AnchorRule:
        """Return the rule that two supervised tokens in a row begin a block, wherever its document ends."""
        return AnchorRule(2, kind)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "DSpark":
        """Return the fields as a config.json without faults has them."""
        return cls(markov_rank=config["markov_rank"])

    @classmethod
    def faults(cls, config: dict[str, Any]) -> Found:
        """Yield what is wrong with the fields of both heads."""
        rank = config.get("markov_rank")
        if not is_int(rank, 1):
            yield "variant's shape", "markov_rank", f"is {say(rank)}; expected a whole number of at least 1"
        for name, wanted in _SAID.items():
            if config.get(name) != wanted:
                yield "variant's heads", name, f"is {say(config.get(name))}; expected {say(wanted)}"

    def figures(self, means: Mapping[str, Any]) -> dict[str, Any]:
        """Return the probability that the target accepts a token drawn from the draft: 1 - half the distance."""
        return {"mean_acceptance": 1 - means["l1_loss"] / 2}
