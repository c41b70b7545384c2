"""From rows to samples: what is kept, cut or left out and why, and the place of each sample in the cache."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from dflash_offline.schemas.config import ExtractConfig
from dflash_offline.schemas.errors import BadInputError, DflashError
from dflash_offline.schemas.manifest import REJECTS, SAMPLES
from dflash_offline.schemas.samples import Reject, SampleTable, write_rejects, write_samples
from dflash_offline.stages.anchors import count_anchors
from dflash_offline.stages.conversations import RowFaultError, content_hash, read_content
from dflash_offline.stages.masks import Masker, Tokenized, UnmaskableError
from dflash_offline.stages.rows import Row, refuse_bad_rows
from dflash_offline.stages.sources import Data
from dflash_offline.stages.target import TargetFiles


@dataclass(frozen=True)
class Plan:
    """All samples, where they go, and what did not become a sample."""

    samples: SampleTable
    tally: "Tally"
    num_shards: int
    shard_tokens: int
    used: dict[int, int]
    """Of each token that occurs, the first sample that holds it."""

    @property
    def rejects(self) -> list[Reject]:
        """Rows that were drawn and are no sample."""
        return self.tally.rejects

    def counts(self) -> dict[str, Any]:
        """Return the totals that the manifest keeps."""
        return {
            "formats": dict(sorted(self.tally.formats.items())),
            "not_drawn": self.tally.num_not_drawn,
            "samples": len(self.samples),
            "tokens": int(self.samples.num_tokens.sum()),
            "supervised": int(self.samples.num_supervised.sum()),
            "anchors": int(self.samples.num_anchors.sum()),
            "truncated": self.tally.num_truncated,
            "truncated_supervised": self.tally.num_supervised_cut,
            "rejects": dict(sorted(Counter(reject.reason for reject in self.rejects).items())),
        }


@dataclass
class Tally:
    """What became of the rows so far."""

    kept: list[tuple[str, int, Tokenized, int]] = field(default_factory=list)
    """Source, line, tokens and number of anchors of each sample."""
    rejects: list[Reject] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """Of bad rows, with their places."""
    formats: Counter[str] = field(default_factory=Counter)
    """Rows that could be read, by how they were written."""
    seen: set[bytes] = field(default_factory=set)
    """Content of earlier rows, where duplicates are dropped."""
    num_truncated: int = 0
    num_supervised_cut: int = 0
    num_not_drawn: int = 0

    def reject(self, row: Row, reason: str, detail: str = "") -> None:
        """Count a row that is no sample."""
        self.rejects.append(Reject(source=row.source.name, row=row.line, reason=reason, detail=detail))


def _why_not(sample: Tokenized, block_size: int) -> str:
    if not sample.loss_mask.any():
        return "no supervised token"
    if len(sample.input_ids) < block_size:
        return "shorter than one block"
    return "supervised part too near the end"


def make_plan(
    config: ExtractConfig, data: Data, masker: Masker, slot_bytes: int, folder: Path, progress: Callable[[int], None]
) -> Plan:
    """Return the plan for all rows of the data, its samples and rejects in files of `folder`; a pure function of data
    and settings.

    `slot_bytes` is the size of one token's raw features; `progress` is called with the rows read since the last
    call. Raises `BadInputError` naming unusable rows, unless they are to be skipped, and if nothing remains.
    """
    tally = Tally()
    for row in data.rows():
        progress(1)
        take_row(row, config, data, masker, tally)
    tally.num_not_drawn = data.num_not_drawn
    if not config.skip_bad_rows:
        refuse_bad_rows(tally.faults, "Mend them, or leave them out with --skip-bad-rows.")
    if not tally.kept:
        reasons = Counter(reject.reason for reject in tally.rejects)
        listed = "".join(f"\n  {count} rows: {reason}" for reason, count in reasons.most_common()) or "\n  no rows"
        raise BadInputError(
            f"No row of {', '.join(map(str, config.data))} gives a sample to train on:{listed}\n"
            f"A sample needs a supervised token with {config.block_size - 1} more tokens after it; the mask rule was "
            f"'{masker.rule}'."
        )
    write_rejects(folder / REJECTS, tally.rejects)
    return _place(config, tally, slot_bytes, folder)


def take_row(row: Row, config: ExtractConfig, data: Data, masker: Masker, tally: Tally) -> Tokenized | None:
    """Count a row as a sample or a reject; returns its tokens, cut to the greatest length, if it has any."""
    try:
        sample = _tokenized(row, config, data, masker, tally)
    except RowFaultError as fault:
        tally.faults.append(f"{row.place} {fault}")
        tally.reject(row, "bad row", str(fault))
    except UnmaskableError as unmaskable:
        tally.reject(row, *unmaskable.args)
    else:
        return _keep(row, sample, config, tally)
    return None


def _tokenized(row: Row, config: ExtractConfig, data: Data, masker: Masker, tally: Tally) -> Tokenized:
    """Return a row's tokens and mask; `RowFaultError` or `UnmaskableError` if it has none."""
    if row.fault:
        raise RowFaultError(row.fault)
    try:
        layout, content = read_content(row.value, data.format.layout)
        tally.formats[f"{row.source.container}, {layout}"] += 1
        if config.drop_duplicates:
            digest = content_hash(content)
            if digest in tally.seen:
                raise UnmaskableError("duplicate", "says exactly what an earlier row says")
            tally.seen.add(digest)
        return masker.tokenize(content)
    except RowFaultError:
        raise
    except (TemplateError, ValueError, TypeError, RecursionError) as error:
        raise RowFaultError(f"is refused by the chat template ({str(error)[:200]})") from error


def _keep(row: Row, sample: Tokenized, config: ExtractConfig, tally: Tally) -> Tokenized:
    """Count a row as a sample, cut to the greatest length, or as a reject if it has no anchor; returns what is left."""
    if len(sample.input_ids) > config.max_length:
        whole, sample = sample, Tokenized(sample.input_ids[: config.max_length], sample.loss_mask[: config.max_length])
        tally.num_truncated += 1
        tally.num_supervised_cut += int(whole.loss_mask.sum() - sample.loss_mask.sum())
    num_anchors = count_anchors(sample.loss_mask, config.block_size)
    if num_anchors:
        tally.kept.append((row.source.name, row.line, sample, num_anchors))
    else:
        tally.reject(row, _why_not(sample, config.block_size), f"{len(sample.input_ids)} tokens")
    return sample


def _place(config: ExtractConfig, tally: Tally, slot_bytes: int, folder: Path) -> Plan:
    kept, chunk = tally.kept, config.chunk_tokens
    sources, lines, tokenized, anchors = zip(*kept, strict=True)
    num_tokens = np.array([len(sample.input_ids) for sample in tokenized], np.int64)
    slots = -(-num_tokens // chunk) * chunk
    wanted = (config.shard_mib << 20) // slot_bytes // chunk * chunk
    shard_tokens = int(min(max(wanted, slots.max()), slots.sum()))
    shard, start = np.zeros(len(kept), np.int64), np.zeros(len(kept), np.int64)
    current = used = 0
    for index, size in enumerate(slots.tolist()):
        if used + size > shard_tokens:
            current, used = current + 1, 0
        shard[index], start[index] = current, current * shard_tokens + used
        used += size
    names = tuple(dict.fromkeys(sources))
    flat_ids = np.concatenate([sample.input_ids for sample in tokenized])
    flat_mask = np.concatenate([sample.loss_mask for sample in tokenized])
    write_samples(
        folder / SAMPLES,
        sources=names,
        source_index=np.array([names.index(source) for source in sources], np.int32),
        numbers={
            "row": np.array(lines, np.int64),
            "num_tokens": num_tokens,
            "num_supervised": np.array([sample.loss_mask.sum() for sample in tokenized], np.int64),
            "num_anchors": np.array(anchors, np.int64),
            "shard": shard,
            "start": start,
        },
        read=lambda begin, end: (flat_ids[begin:end], flat_mask[begin:end]),
    )
    first_use: dict[int, int] = {}
    for index, sample in enumerate(tokenized):
        for token in np.unique(sample.input_ids).tolist():
            first_use.setdefault(token, index)
    return Plan(SampleTable.read(folder / SAMPLES), tally, current + 1, shard_tokens, first_use)


def refuse_ids_beyond_table(target: TargetFiles, plan: Plan) -> None:
    """Raise `DflashError` if the tokenizer wrote a token that the target has no embedding for."""
    num_rows = int(target.text_config.vocab_size)
    beyond = min(((sample, token) for token, sample in plan.used.items() if token >= num_rows), default=None)
    if beyond is not None:
        sample, token = beyond
        raise DflashError(
            f"{plan.samples.place(sample)} holds token {token}, but the target's embedding table has "
            f"{num_rows} rows. The tokenizer in {target.folder} belongs to another model; put the right one there."
        )


def choose_mask_token(target: TargetFiles, plan: Plan, wanted: int | None) -> int:
    """Return the token that fills the slots to be drafted: the wanted one, or a reserved one that no sample contains.

    Raises `DflashError` if it is no row of the embedding table, if a sample contains it, or if none can be found.
    """
    tokenizer, num_rows = target.tokenizer, int(target.text_config.vocab_size)
    samples = plan.samples
    if wanted is not None:
        if not 0 <= wanted < num_rows:
            raise DflashError(
                f"--mask-token-id {wanted} is no row of the target's embedding table of {num_rows}. Name one that is."
            )
        if wanted in plan.used:
            sample = plan.used[wanted]
            raise DflashError(
                f"--mask-token-id {wanted} ({tokenizer.convert_ids_to_tokens(wanted)!r}) occurs in the data, first in "
                f"{samples.source(sample)}:{samples.row[sample]}. Name a token that no sample contains."
            )
        return wanted
    special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special and i < num_rows}
    taken = plan.used.keys() | target.end_ids() | {tokenizer.bos_token_id}
    free = {i: name for i, name in special.items() if i not in taken}

    def preference(item: tuple[int, str]) -> tuple[int, int]:
        index, name = item
        ordinary = index in (tokenizer.pad_token_id, tokenizer.unk_token_id)
        reserved = re.search(r"mask|reserved|unused|extra", name, re.IGNORECASE)
        return (0 if "mask" in name.lower() else 1 if reserved else 3 if ordinary else 2), index

    if not free:
        raise DflashError(
            f"{target.name} has no reserved token for the slots to be drafted: each of its {len(special)} special "
            f"tokens is used by the data or ends a text. Name an unused row of the embedding table (0 to "
            f"{num_rows - 1}) with --mask-token-id."
        )
    return min(free.items(), key=preference)[0]
