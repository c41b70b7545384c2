"""`dflash inspect CACHE --sample I`: one sample's text with mask and anchors marked, and its norms along the tokens.

Axes: T tokens, L captured layers.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from dflash_offline.pipeline.inspect.feature_statistics import token_norms
from dflash_offline.pipeline.safe_output import safe
from dflash_offline.pipeline.terminal import facts, has_colour, open_console, sparkline
from dflash_offline.pipeline.token_text import token_texts
from dflash_offline.schemas.draft.anchor_rule import WHOLE, AnchorRule
from dflash_offline.schemas.errors import CacheError, DflashError, dflash_line
from dflash_offline.schemas.manifest import TARGET
from dflash_offline.schemas.samples import document_anchors, origin
from dflash_offline.stages.store.cache import Cache

BRACKETS = {"anchor": ("[[", "]]", "green"), "tail": ("((", "))", "yellow"), "": ("", "", "")}
"""Around a run of tokens where there is no colour, and its colour: supervised and able to anchor a block, supervised
with less than a block left, and not supervised."""


@dataclass(frozen=True)
class TextRun:
    """The text of successive tokens that are all supervised or all not, and all can anchor a block or none."""

    supervised: bool
    anchor: bool
    tokens: int
    text: str


@dataclass(frozen=True, kw_only=True)
class SampleView:
    """One sample: its place, its numbers, its text in runs and token by token, and its norms if it has features."""

    cache: str
    sample: int
    source: str
    row: int
    answer: int
    """Counts the assistant's turns of the row, up to the last one that is supervised here; 0 for the whole row."""
    tokens: int
    supervised: int
    anchors: int
    block_size: int
    anchor_kind: str
    shard: int
    start: int
    next_start: int
    """First slot of the next sample, or of the next shard."""
    runs: list[TextRun]
    token_ids: list[int]
    token_texts: list[str]
    loss_mask: list[int]
    layer_ids: list[int]
    norms: list[list[float]] | None
    """[L][T]: root mean square over channels; None if the features cannot be read."""
    no_features: str
    """Why; empty if there are norms."""


def sample_view(cache: Cache, sample: int) -> SampleView:
    """Return one sample; `DflashError` if the cache has no such sample."""
    samples = cache.samples
    if not 0 <= sample < len(samples):
        raise DflashError(f"{cache.path} has samples 0 to {len(samples) - 1}; {sample} is not one of them.")
    tokenizer = open_tokenizer(cache.path)
    ids, mask = samples.input_ids(sample), samples.loss_mask(sample)
    texts = token_texts(ids.tolist(), lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
    shard = int(samples.shard[sample])
    rule = cache.manifest.anchor_rule
    norms, reason = sample_norms(cache, sample)
    ends_shard = sample == samples.samples_of_shard(shard)[-1]
    return SampleView(
        cache=cache.name,
        sample=sample,
        source=samples.source(sample),
        row=int(samples.row[sample]),
        answer=int(samples.answer[sample]),
        tokens=len(ids),
        supervised=int(mask.sum()),
        anchors=int(samples.num_anchors[sample]),
        block_size=rule.tokens,
        anchor_kind=rule.kind,
        shard=shard,
        start=int(samples.start[sample]),
        next_start=(shard + 1) * cache.layout.shard_tokens if ends_shard else int(samples.start[sample + 1]),
        runs=text_runs(texts, mask, rule),
        token_ids=ids.tolist(),
        token_texts=texts,
        loss_mask=mask.astype(int).tolist(),
        layer_ids=list(cache.layer_ids),
        norms=None if norms is None else norms.round(5).tolist(),
        no_features=reason,
    )


def open_tokenizer(cache: Path) -> Tokenizer:
    """Return the cache's own tokenizer; `CacheError` if it cannot be read."""
    path = cache / TARGET / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CacheError(f"{path} cannot be read: {error}. Restore it from a copy, or extract again.") from error


def sample_norms(cache: Cache, sample: int) -> tuple[NDArray[np.float64] | None, str]:
    """Return the norms of a sample's features, [L, T], infinite ones as 0; or None, and why there are none."""
    try:
        return np.nan_to_num(token_norms(cache.values(sample)).T, posinf=0.0), ""
    except CacheError as error:
        return None, str(error)


def text_runs(texts: list[str], mask: NDArray[np.bool_], rule: AnchorRule) -> list[TextRun]:
    """Return the text of a sample's tokens in runs, each as long as it can be."""
    anchors = np.zeros_like(mask)
    anchors[document_anchors(mask, rule)] = True
    kind = mask.astype(np.int8) + anchors
    edges = [0, *(np.flatnonzero(kind[1:] != kind[:-1]) + 1).tolist(), len(texts)]
    return [
        TextRun(bool(mask[begin]), bool(anchors[begin]), end - begin, "".join(texts[begin:end]))
        for begin, end in pairwise(edges)
    ]


def marked_text(runs: list[TextRun], *, coloured: bool) -> Text:
    """Return runs as one text, what is supervised marked by colour, or else by brackets."""
    text = Text()
    for run in runs:
        opening, closing, colour = BRACKETS["anchor" if run.anchor else "tail" if run.supervised else ""]
        if coloured:
            text.append(safe(run.text), colour)
        else:
            text.append(f"{opening}{safe(run.text)}{closing}")
    return text


def legend(rule: AnchorRule, *, coloured: bool) -> str:
    """Return what the colours or brackets in a text mean."""
    anchor, tail = ("green", "yellow") if coloured else ("in [[ ]]", "in (( ))")
    few = f"fewer than {rule.tokens - 1} tokens follow"
    if rule.kind != WHOLE:
        few = f"none of the {rule.tokens - 1} tokens after it is supervised"
    return f"supervised is {anchor}; {tail} where {few}, so that no block starts there"


def print_sample(view: SampleView) -> None:
    """Print a sample: where it lies, its text with mask and anchors, its norms."""
    console = open_console()
    coloured = has_colour(console)
    end, share = view.start + view.tokens, view.supervised / view.tokens
    numbers = f"{view.tokens:,}; supervised {view.supervised:,} ({share:.0%}); {view.anchors:,} anchors"
    slots = f"slots {view.start:,} to {end - 1:,}, then {view.next_start - end:,} of padding"
    rows = [
        ("Sample", f"{view.sample}, from {origin(view.source, view.row, view.answer)}"),
        ("Tokens", f"{numbers} for blocks of {view.block_size}"),
        ("Place", f"shard {view.shard}, {slots}"),
        ("Legend", legend(AnchorRule(view.block_size, view.anchor_kind), coloured=coloured)),
    ]
    console.print(facts(rows))
    _rule(console, "document begins")
    console.print(marked_text(view.runs, coloured=coloured), soft_wrap=True)
    _rule(console, "document ends")
    if view.norms is None:
        console.print(f"No norms: {view.no_features}", soft_wrap=True)
    else:
        _print_norms(console, view, view.norms)
    console.print(f"Next: {dflash_line('inspect', view.cache, '--shard', view.shard)}", soft_wrap=True)


def _rule(console: Console, title: str) -> None:
    console.print(f"---- {title} ".ljust(min(console.width, 80), "-"))


def _print_norms(console: Console, view: SampleView, layers: list[list[float]]) -> None:
    """Print a line a layer, each sign the largest norm of some tokens, between the layer's least and most."""
    width = max(min(console.width - 34, view.tokens), 8)
    edges = np.unique(np.linspace(0, view.tokens, width + 1).astype(int))[:-1]
    each = -(-view.tokens // width)
    shown = "a sign a token" if each == 1 else f"a sign for up to {each} tokens, their largest"
    console.print(f"Norms along the tokens (root mean square over channels), {shown}, log scale of each layer")
    mask = np.maximum.reduceat(np.array(view.loss_mask), edges).tolist()
    console.print(f"{'mask':<10} {''.join('=' if supervised else '.' for supervised in mask)}")
    for layer_id, values in zip(view.layer_ids, layers, strict=True):
        norms = np.maximum.reduceat(np.array(values), edges)
        least, most = float(norms.min()), float(norms.max())
        floor = max(least, most * 1e-9, 1e-30)
        levels = np.log(np.maximum(norms, floor) / floor) / max(np.log(max(most, floor) / floor), 1e-9)
        console.print(f"layer {layer_id:<4} {sparkline(levels.tolist())} {min(values):.4g} to {max(values):.4g}")
