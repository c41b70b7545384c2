"""DFlash 2: convolutions within the block, and a selector that walks over each slot's best candidates.

Read in z-lab's client 0.1.0 (`DFlash2DraftModel`), in vLLM's `qwen3_dflash2` and in speculators 0.9.0 (`dflash2`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from dflash_offline.schemas.checked import Size
from dflash_offline.schemas.draft.anchor_rule import PARTIAL, WHOLE, AnchorRule
from dflash_offline.schemas.draft.values import Found, first, is_int, say, section
from dflash_offline.schemas.variants.dflash import DFlash
from dflash_offline.schemas.variants.variant import Counted, Curve, Sizes


def _walk(path: str, name: str) -> Curve:
    walk = "Acceptance length, serving walk"
    return Curve("validation", f"val_serving_walk_{path}", f"serving walk, {name}", walk, name)


def _share(metric: str, name: str) -> Curve:
    return Curve("validation", metric, f"{name}, share", "Selector", name)


@dataclass(frozen=True, kw_only=True)
class DFlash2:
    """Shapes of the convolutions and of the selector; the defaults are those of the published drafts."""

    name: ClassVar[str] = "dflash2"
    architecture: ClassVar[str] = "DFlash2DraftModel"
    speculators: ClassVar[str | None] = "dflash2"
    transformers: ClassVar[bool] = False
    vllm_method: ClassVar[str] = "dflash"
    sglang_algorithm: ClassVar[str] = "DFLASH"
    needs_plain_head: ClassVar[bool] = True
    summary: ClassVar[str] = (
        "A DFlash 2 draft: convolutions within the block, and a selector that walks over each slot's best candidates."
    )
    starts_from: ClassVar[tuple[str, ...]] = (DFlash.architecture,)
    nested_only: ClassVar[tuple[str, ...]] = ("block_size",)
    top_only: ClassVar[tuple[str, ...]] = ()
    first_slot: ClassVar[int] = 1
    label_offset: ClassVar[int] = 0
    is_unbroken: ClassVar[bool] = False
    has_confidence: ClassVar[bool] = False
    needs_final: ClassVar[bool] = False
    anchors: ClassVar[tuple[str, ...]] = (PARTIAL, WHOLE)
    has_own_loss: ClassVar[bool] = False
    loss_settings: ClassVar[Mapping[str, float]] = {"selector_loss_alpha": 1.0, "selector_warmup_ratio": 0.0}
    losses: ClassVar[tuple[str, ...]] = ("draft_loss", "selector_loss")
    paths: ClassVar[tuple[str, ...]] = ("without_selector", "oracle")
    curves: ClassVar[tuple[Curve, ...]] = (
        _walk("without_selector", "without the selector"),
        _walk("oracle", "best candidates"),
        _share("val_top_k_recall", "truth among candidates"),
        _share("val_selector_accuracy_where_covered", "chosen where among them"),
        Curve("training", "draft_loss", "training loss without selector", "Loss", "training, without selector"),
        Curve("training", "selector_loss", "training loss of the selector", "Loss", "training, selector"),
    )
    by_slot: ClassVar[Mapping[str, str]] = {"val_top_k_recall_by_slot": "Truth among the candidates by slot"}

    conv_kernel_size: Size = 2
    """c: slots that a convolution reads, the own one and those before it."""
    conv_group_size: Size = 16
    """Channels that share a kernel which depends on the token; divides H."""
    selector_rank: Size = 256
    """r: width of the selector's two codebooks."""
    selector_top_k: Size = 16
    """Candidates of each slot among which the selector chooses."""

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return the convolutions of every layer, and the selector."""
        hidden, vocab, taps, rank = sizes["hidden_size"], sizes["vocab_size"], self.conv_kernel_size, self.selector_rank
        found: dict[str, tuple[int, ...]] = {}
        for i in range(sizes["num_hidden_layers"]):
            for place in ("attention_conv", "mlp_conv"):
                found[f"layers.{i}.{place}.base_kernel"] = (2, taps, hidden)
                kernels = 2 * taps * (hidden // self.conv_group_size)
                found[f"layers.{i}.{place}.kernel_projection.weight"] = (kernels, hidden)
        return found | {
            "candidate_selector.predecessor_codebook": (vocab, rank),
            "candidate_selector.successor_codebook": (vocab, rank),
            "candidate_selector.hidden_projection.weight": (rank, hidden),
        }

    def kept(self, sizes: Sizes, compiled: bool) -> Counted:
        """Return how many numbers a step keeps of a block token's convolutions in a layer, and of a slot's selector.

        `compiled`, what enters and what leaves both sublayers before it is convolved, and the dynamic kernels; else
        also the kernel and the earlier slots' values of each tap. The selector keeps P h, scores and candidates.
        """
        hidden, taps = sizes["hidden_size"], self.conv_kernel_size
        kernels = 4 * taps * (hidden // self.conv_group_size)
        layer = 4 * hidden if compiled else 8 * taps * hidden
        return Counted(layer + kernels, 2 * self.selector_rank + 6 * self.selector_top_k)

    def work(self, sizes: Sizes) -> Counted:
        """Return the multiply-adds of both kernel projections and all four convolutions, and those of the selector."""
        hidden, taps = sizes["hidden_size"], self.conv_kernel_size
        kernels = 4 * taps * (hidden // self.conv_group_size)
        return Counted(kernels * hidden + 4 * taps * hidden, self.selector_rank * (hidden + self.selector_top_k + 1))

    def written(self, document: dict[str, Any]) -> dict[str, Any]:
        """Return the document as the published drafts have it.

        `is_causal` is said also where no layer is causal, except, as always, where it differs between layers.
        """
        nested = {**document["dflash_config"], **asdict(self)}
        said = {"is_causal": nested["causal"]} if "causal" in nested else {}
        kept = {name: value for name, value in document.items() if name not in self.nested_only}
        return {**kept, **said, "architectures": [self.architecture], "dflash_config": nested}

    def speculators_fields(self) -> dict[str, Any]:
        """Return its names there, and its fields."""
        return {"architectures": [self.architecture], "speculators_model_type": self.speculators, **asdict(self)}

    @classmethod
    def anchor_rule(cls, kind: str, block_size: int) -> AnchorRule:
        """Return the rule over the block's own tokens."""
        return AnchorRule(block_size, kind)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "DFlash2":
        """Return the fields as a config.json without faults has them."""
        return cls(**{field.name: first(config, field.name) for field in fields(cls)})

    @classmethod
    def faults(cls, config: dict[str, Any]) -> Found:
        """Yield what is wrong with the four fields."""
        values = {field.name: first(config, field.name) for field in fields(cls)}
        for name, value in values.items():
            if not is_int(value, 1):
                yield "variant's shape", name, f"is {say(value)}; expected a whole number of at least 1"
            elif name not in section(config, "dflash_config") and "speculators_model_type" not in config:
                yield "nested variant's shape", f"dflash_config.{name}", "is absent; expected there as at the top"
        group, hidden = values["conv_group_size"], config.get("hidden_size")
        if is_int(group, 1) and is_int(hidden, 1) and hidden % group:
            yield "variant's shape", "conv_group_size", f"is {group}; expected a divisor of hidden_size {hidden}"
        taps, block = values["conv_kernel_size"], first(config, "block_size")
        if is_int(taps, 1) and is_int(block, 2) and taps > block:
            yield "kernel and block", "conv_kernel_size", f"is {taps}; expected at most the block_size {block}"
        candidates, vocab = values["selector_top_k"], config.get("vocab_size")
        if is_int(candidates, 1) and is_int(vocab, 1) and candidates > vocab:
            yield "variant's shape", "selector_top_k", f"is {candidates}; expected at most the vocab_size {vocab}"

    def figures(self, means: Mapping[str, Any]) -> dict[str, Any]:
        """Return how often the truth is among the candidates, by slot too, and how often the selector takes it then.

        What the selector chooses is a candidate, so it is never right where the truth is none.
        """
        recall = means["accuracy_oracle"]
        return {
            "top_k_recall": recall,
            "top_k_recall_by_slot": means["accuracy_oracle_by_slot"],
            "selector_accuracy_where_covered": means["accuracy"] / recall if recall else 0.0,
        }
