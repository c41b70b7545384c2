"""The mistakes a server may make with a draft: each as one change to how the draft is run offline."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.errors import DflashError

AS_TRAINED = "as trained"
LAYERS, NORMED, CAUSALITY, MASK_TOKEN, ROTARY = "layer ids", "normed layer", "causality", "mask token", "rotary base"
ANCHOR, WINDOW, BLOCK, DTYPE = "anchor in context", "window", "block size", "data type"
TEMPLATE, TARGET = "chat template", "another target"
EMBEDDING = -1
"""The tap of the embedded tokens; tap i is the output of decoder layer i, of the last layer after the final norm."""
_ROTARY_FACTOR = 100
_MOST_MASK_TOKENS = 12


@dataclass(frozen=True, kw_only=True)
class Change:
    """How a draft is run, one thing being other than it was trained with."""

    cause: str
    """What is changed: one of the names above."""
    title: str
    """The change itself."""
    config: DraftConfig
    """What the draft is run by; its layer ids stand in `taps`."""
    taps: tuple[int, ...]
    """Where the features are taken, in the order in which they are concatenated."""
    sees_anchor: bool = False
    """Whether the context includes the features of the anchor, which serving does not have yet."""


def possible_changes(
    config: DraftConfig, num_draft_tokens: int | None, target: Any | None, special_ids: Sequence[int]
) -> list[Change]:
    """Return the draft as it was trained, and then with one mistake at a time.

    `num_draft_tokens` is what is served, where it is known: it then holds for all of them. `target` is the target's
    own text config, and `special_ids` are tokens that a client may take for the mask token.
    """
    if num_draft_tokens is not None:
        config = replace(config, block_size=config.variant.first_slot + num_draft_tokens)
    trained = Change(cause=AS_TRAINED, title=AS_TRAINED, config=config, taps=config.target_layer_ids)
    found = [trained, *_other_features(trained)]
    found += _other_configs(trained, CAUSALITY, _causalities(config))
    masks = [token for token in dict.fromkeys(special_ids) if token != config.mask_token_id][:_MOST_MASK_TOKENS]
    found += _other_configs(trained, MASK_TOKEN, [(f"mask token {i}", {"mask_token_id": i}) for i in masks])
    found += _other_configs(trained, ROTARY, _rotary_bases(config, target))
    found += _other_configs(trained, WINDOW, _windows(config, target))
    if num_draft_tokens is None:
        sizes = sorted({config.block_size // 2, config.block_size + 2, config.block_size * 2} - {0, 1})
        found += _other_configs(trained, BLOCK, [(f"blocks of {size}", {"block_size": size}) for size in sizes])
    return found


def _other_features(trained: Change) -> Iterator[Change]:
    ids, last = trained.taps, trained.config.num_target_layers - 1
    for shift in (-1, 1):
        taps = tuple(i + shift for i in ids)
        if taps[0] >= EMBEDDING and taps[-1] <= last:
            yield replace(trained, cause=LAYERS, title=f"target layers {shift:+d}", taps=taps)
    if ids[-1] + 1 != last or len(ids) > 1:
        title = f"final norm's output for layer {ids[-1]}"
        yield replace(trained, cause=NORMED, title=title, taps=(*ids[:-1], last))
    yield replace(trained, cause=ANCHOR, title="context that includes the anchor", sees_anchor=True)


def _other_configs(trained: Change, cause: str, changes: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Change]:
    for title, fields in changes:
        try:
            yield replace(trained, cause=cause, title=title, config=replace(trained.config, **fields))
        except DflashError:  # no draft of that config can be built, nor served
            continue


def _causalities(config: DraftConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    titles = {"none": "blocks seen whole", "sliding": "causal blocks where layers slide", "all": "causal blocks"}
    for value, title in titles.items():
        if value != config.causal_layers and (value != "sliding" or config.sliding_layers):
            yield title, {"causal_layers": value}


def _rotary_bases(config: DraftConfig, target: Any | None) -> Iterator[tuple[str, dict[str, Any]]]:
    own = config.rope_theta
    bases = [own * _ROTARY_FACTOR, own / _ROTARY_FACTOR]
    theta = (getattr(target, "rope_parameters", None) or {}).get("rope_theta")
    bases += [float(base) for base in (theta, 10_000.0, 1_000_000.0) if isinstance(base, int | float)]
    for base in dict.fromkeys(base for base in bases if base != own):
        yield f"rotary base {base:g}", {"rope_theta": base}


def _windows(config: DraftConfig, target: Any | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if config.sliding_layers:
        causal = "all" if config.causal_layers == "all" else "none"
        yield "no window", {"sliding_window": None, "sliding_layers": (), "causal_layers": causal}
        window = config.sliding_window
    else:
        window = getattr(target, "sliding_window", None)
    every = tuple(range(config.num_hidden_layers))
    if window and config.sliding_layers != every:
        yield f"a window of {window} in every layer", {"sliding_window": window, "sliding_layers": every}
