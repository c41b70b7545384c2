"""`dflash inspect DATA --target MODEL`: what would become of one row, before anything is extracted."""

from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from dflash_offline.pipeline.inspect.sample import TextRun, legend, marked_text, text_runs
from dflash_offline.pipeline.terminal import facts, has_colour, open_console
from dflash_offline.pipeline.token_text import token_texts
from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations.advice import advice
from dflash_offline.stages.conversations.content import Chat, RowFaultError, read_content
from dflash_offline.stages.conversations.loss_mask import ConversationEncoder
from dflash_offline.stages.conversations.sources import Data
from dflash_offline.stages.conversations.tokenize import RowTokenizer, unparsed
from dflash_offline.stages.target.files import open_target


@dataclass(frozen=True, kw_only=True)
class RowView:
    """What `extract` would make of one row, or of an answer of a row that does not become one sample: its numbers, why
    it would be left out, its text in runs."""

    row: int
    """From 0."""
    answer: int
    """Counts the assistant's turns, from 1, up to the last one that is supervised here; 0 for the whole row."""
    source: str
    line: int
    format: str
    roles: list[str]
    mask_rule: str
    tokens: int
    supervised: int
    anchors: int
    block_size: int
    anchor_kind: str
    truncated_supervised: int | None
    """Supervised tokens beyond the maximum length; None if the row is not longer."""
    left_out: str | None
    detail: str | None
    advice: str | None
    """What would keep it."""
    dropped: list[str]
    """Kinds of its parts that the chat template left out of the text."""
    notes: list[str]
    """What else is said of it, by kind."""
    runs: list[TextRun]


def row_view(config: ExtractConfig, number: int) -> list[RowView]:
    """Return what becomes of row `number` of the data, from 0: a view a sample, and one of each answer that is in none.

    Raises `DflashError` if there is no such row.
    """
    files = open_target(config.target, revision=config.revision, trust_remote_code=config.trust_remote_code)
    most = files.decoder()["max_position_embeddings"]
    config = replace(config, max_length=min(config.max_length, most))
    data, encoder = Data(config), ConversationEncoder(files, config)
    row = next(islice(data.raw_rows(), number, None), None) if number >= 0 else None
    if row is None:
        raise DflashError(f"{', '.join(map(str, config.data))} has no row {number}. Name one that is there, from 0.")
    batch = RowTokenizer(config, encoder, data.format.row_format)(unparsed([row]))
    (made,) = batch.rows
    try:
        content = read_content(row.parsed().value, data.format.row_format)[1]
        roles = [message["role"] for message in content.messages] if isinstance(content, Chat) else []
    except RowFaultError:
        roles = []
    ends = np.cumsum([part.num_tokens for part in made.samples]).tolist()
    views = []
    for part, end in zip(made.samples, ends, strict=True):
        own = slice(end - part.num_tokens, end)
        texts = token_texts(batch.ids[own].tolist(), files.tokenizer.decode)
        view = RowView(
            row=number,
            answer=part.answer,
            source=row.source.name,
            line=row.line,
            format=f"{row.source.container}, {made.row_format}" if made.row_format else row.source.container,
            roles=roles,
            mask_rule=encoder.mask_rule,
            tokens=part.num_tokens,
            supervised=part.num_supervised,
            anchors=part.num_anchors,
            block_size=config.block_size,
            anchor_kind=config.anchors,
            truncated_supervised=part.num_supervised_cut if part.num_supervised_cut >= 0 else None,
            left_out=part.reason or None,
            detail=part.detail or None,
            advice=advice(part.reason) or None,
            dropped=list(part.dropped),
            notes=list(part.notes),
            runs=text_runs(texts, batch.mask[own], config.anchor_rule) if texts else [],
        )
        views.append(view)
    return views


def print_row(views: list[RowView]) -> None:
    """Print what becomes of a row for a person, marked as a cache's sample is."""
    for view in views:
        _print(view)


def _print(view: RowView) -> None:
    console = open_console()
    coloured = has_colour(console)
    rows = [
        ("Row", f"{view.row} ({view.source}:{view.line}), {view.format}"),
        *([("Answer", f"{view.answer}, after its history as served")] if view.answer else []),
        ("Roles", ", ".join(view.roles) or "none"),
        ("Mask", f"{view.mask_rule}; {legend(AnchorRule(view.block_size, view.anchor_kind), coloured=coloured)}"),
        ("Tokens", f"{view.tokens:,}; supervised {view.supervised:,}"),
        ("Anchors", f"{view.anchors:,} for blocks of {view.block_size}"),
    ]
    if view.truncated_supervised is not None:
        rows.append(("", f"cut at the maximum length, by {view.truncated_supervised:,} supervised tokens"))
    if view.left_out:
        rows.append(("LEFT OUT", f"{view.left_out}: {view.detail}"))
        rows += [("", view.advice)] if view.advice else []
    if view.dropped:
        rows.append(("NOT IN TEXT", f"{', '.join(view.dropped)}: the chat template drops them"))
    rows += [("NOTED", note) for note in view.notes]
    console.print(facts(rows))
    if view.runs:
        console.print()
        console.print(marked_text(view.runs, coloured=coloured), soft_wrap=True)
