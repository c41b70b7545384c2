"""`dflash inspect DATA --target MODEL`: what would become of one row, before anything is extracted."""

from dataclasses import dataclass, replace
from itertools import islice

from dflash_offline.pipeline.inspect.sample import TextRun, legend, marked_text, text_runs
from dflash_offline.pipeline.terminal import facts, has_colour, open_console
from dflash_offline.pipeline.token_text import token_texts
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
    """What `extract` would make of one row: its numbers, why it would be left out, its text in runs."""

    row: int
    """From 0."""
    source: str
    line: int
    format: str
    roles: list[str]
    mask_rule: str
    tokens: int
    supervised: int
    anchors: int
    block_size: int
    truncated_supervised: int | None
    """Supervised tokens beyond the maximum length; None if the row is not longer."""
    left_out: str | None
    detail: str | None
    advice: str | None
    """What would keep the row."""
    dropped: list[str]
    """Kinds of its parts that the chat template left out of the text."""
    runs: list[TextRun]


def row_view(config: ExtractConfig, number: int) -> RowView:
    """Return row `number` of the data, from 0; `DflashError` if there is no such row."""
    files = open_target(config.target, revision=config.revision, trust_remote_code=config.trust_remote_code)
    most = files.decoder()["max_position_embeddings"]
    config = replace(config, max_length=min(config.max_length, most))
    data, encoder = Data(config), ConversationEncoder(files, config)
    row = next(islice(data.raw_rows(), number, None), None) if number >= 0 else None
    if row is None:
        raise DflashError(f"{', '.join(map(str, config.data))} has no row {number}. Name one that is there, from 0.")
    batch = RowTokenizer(config, encoder, data.format.row_format)(unparsed([row]))
    (made,) = batch.rows
    texts = token_texts(batch.ids.tolist(), files.tokenizer.decode)
    try:
        content = read_content(row.parsed().value, data.format.row_format)[1]
        roles = [message["role"] for message in content.messages] if isinstance(content, Chat) else []
    except RowFaultError:
        roles = []
    return RowView(
        row=number,
        source=row.source.name,
        line=row.line,
        format=f"{row.source.container}, {made.row_format}" if made.row_format else row.source.container,
        roles=roles,
        mask_rule=encoder.mask_rule,
        tokens=made.num_tokens,
        supervised=made.num_supervised,
        anchors=made.num_anchors,
        block_size=config.block_size,
        truncated_supervised=made.num_supervised_cut if made.num_supervised_cut >= 0 else None,
        left_out=made.reason or None,
        detail=made.detail or None,
        advice=advice(made.reason, config) or None,
        dropped=list(made.dropped),
        runs=text_runs(texts, batch.mask, config.block_size) if texts else [],
    )


def print_row(view: RowView) -> None:
    """Print a row for a person, marked as a cache's sample is."""
    console = open_console()
    coloured = has_colour(console)
    rows = [
        ("Row", f"{view.row} ({view.source}:{view.line}), {view.format}"),
        ("Roles", ", ".join(view.roles) or "none"),
        ("Mask", f"{view.mask_rule}; {legend(view.block_size, coloured=coloured)}"),
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
    console.print(facts(rows))
    if view.runs:
        console.print()
        console.print(marked_text(view.runs, coloured=coloured), soft_wrap=True)
