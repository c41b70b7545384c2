"""From conversations to samples: chat template, tokens, loss mask, and the place of each sample in the cache."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from dflash_offline.schemas.config import ExtractConfig
from dflash_offline.schemas.errors import BadInputError, DflashError
from dflash_offline.schemas.samples import Reject, SampleTable
from dflash_offline.stages.anchors import count_anchors
from dflash_offline.stages.conversations import Row, messages_fault, read_rows, refuse_bad_rows
from dflash_offline.stages.target import TargetFiles


class _Unmaskable(Exception):
    """This conversation's supervised tokens cannot be told; the text is (reason, detail)."""


@dataclass(frozen=True)
class Tokenized:
    """One conversation as the target sees it."""

    input_ids: NDArray[np.uint32]
    loss_mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Plan:
    """All samples, where they go, and what did not become a sample."""

    samples: SampleTable
    rejects: list[Reject]
    num_truncated: int
    num_shards: int
    shard_tokens: int

    def counts(self) -> dict[str, Any]:
        """Return the totals that the manifest keeps."""
        return {
            "samples": len(self.samples),
            "tokens": int(self.samples.num_tokens.sum()),
            "supervised": int(self.samples.num_supervised.sum()),
            "anchors": int(self.samples.num_anchors.sum()),
            "truncated": self.num_truncated,
            "rejects": dict(sorted(Counter(reject.reason for reject in self.rejects).items())),
        }


class Masker:
    """Renders conversations with the target's chat template and marks the assistant's tokens.

    Supervised are the assistant's words and the end-of-turn token. Where the template has generation tags they
    decide; otherwise the conversation is rendered turn by turn, which is accepted only if each rendering is a true
    prefix of the next.
    """

    def __init__(self, target: TargetFiles, template_kwargs: dict[str, Any]) -> None:
        self.tokenizer = target.tokenizer
        self.template_kwargs = template_kwargs
        self.rule = (
            "assistant, from generation tags"
            if re.search(r"\{%-?\s*generation\s*-?%\}", target.template)
            else "assistant, from rendering turn by turn"
        )
        self.end_ids = np.array(sorted(target.end_ids()), np.uint32)

    def tokenize(self, messages: list[dict[str, Any]]) -> Tokenized:
        """Return tokens and mask; `_Unmaskable` or jinja2's `TemplateError` if this conversation has none."""
        tagged = "tags" in self.rule
        ids, mask = self._from_tags(messages) if tagged else self._from_prefixes(messages)
        return Tokenized(ids, close_turns(ids, mask, self.end_ids, self._is_blank))

    def _is_blank(self, ids: NDArray[np.uint32]) -> bool:
        return not self.tokenizer.decode(ids.tolist()).strip()

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, **self.template_kwargs
        )
        return text

    def _from_tags(self, messages: list[dict[str, Any]]) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        encoded = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **self.template_kwargs
        )
        return np.array(encoded["input_ids"], np.uint32), np.array(encoded["assistant_masks"], np.bool_)

    def _from_prefixes(self, messages: list[dict[str, Any]]) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        text = self._render(messages)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"], np.uint32)
        begins, ends = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        mask = np.zeros(len(ids), np.bool_)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if turn == 0:
                raise _Unmaskable("begins with an assistant turn", "its first token cannot be told without a prompt")
            before = self._render(messages[:turn], prompt=True)
            through = self._render(messages[: turn + 1])
            if not through.startswith(before) or not text.startswith(through):
                raise _Unmaskable("template rewrites history", f"messages[{turn}] renders otherwise when more follows")
            mask |= (begins >= len(before)) & (ends <= len(through)) & (ends > begins)
        return ids, mask


def close_turns(
    ids: NDArray[np.uint32],
    mask: NDArray[np.bool_],
    end_ids: NDArray[np.uint32],
    is_blank: Callable[[NDArray[np.uint32]], bool],
) -> NDArray[np.bool_]:
    """Return the mask with every supervised run ending at the token at which serving ends an answer.

    A run that holds such a token is cut after the last one; a run that lacks it takes it if it comes next; blanks
    that the template writes at the end of any other run are not supervised.
    """
    closed = mask.copy()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    for begin, end in edges.reshape(-1, 2):
        ends = np.flatnonzero(np.isin(ids[begin:end], end_ids))
        if len(ends):
            closed[begin + ends[-1] + 1 : end] = False
        elif end < len(ids) and ids[end] in end_ids:
            closed[end] = True
        else:
            last = end
            while last > begin and is_blank(ids[last - 1 : last]):
                last -= 1
            closed[last:end] = False
    return closed


def _why_not(sample: Tokenized, block_size: int) -> str:
    if not sample.loss_mask.any():
        return "no supervised token"
    if len(sample.input_ids) < block_size:
        return "shorter than one block"
    return "supervised part too near the end"


def make_plan(config: ExtractConfig, masker: Masker, slot_bytes: int, progress: Callable[[int], None]) -> Plan:
    """Return the plan for all conversations of the data files; a pure function of data and settings.

    `slot_bytes` is the size of one token's raw features; `progress` is called with the rows read since the last
    call. Raises `BadInputError` naming unusable rows, unless they are to be skipped, and if nothing remains.
    """
    kept: list[tuple[Row, Tokenized, int]] = []
    rejects: list[Reject] = []
    faults: list[str] = []
    num_truncated = 0

    def reject(row: Row, reason: str, detail: str = "") -> None:
        rejects.append(Reject(source=row.source.name, row=row.line, reason=reason, detail=detail))

    for path in config.data:
        for row in read_rows(path):
            progress(1)
            fault = row.fault or messages_fault(row.value)
            sample = None
            if not fault:
                try:
                    sample = masker.tokenize(row.value["messages"])
                except (TemplateError, ValueError, TypeError) as error:
                    fault = f"is refused by the chat template ({error})"
                except _Unmaskable as unmaskable:
                    reject(row, *unmaskable.args)
                    continue
            if sample is None:
                faults.append(f"{row.place} {fault}")
                reject(row, "bad row", fault)
                continue
            if len(sample.input_ids) > config.max_length:
                sample = Tokenized(sample.input_ids[: config.max_length], sample.loss_mask[: config.max_length])
                num_truncated += 1
            num_anchors = count_anchors(sample.loss_mask, config.block_size)
            if num_anchors:
                kept.append((row, sample, num_anchors))
            else:
                reject(row, _why_not(sample, config.block_size), f"{len(sample.input_ids)} tokens")
    if not config.skip_bad_rows:
        refuse_bad_rows(faults, "Mend them, or leave them out with --skip-bad-rows.")
    if not kept:
        reasons = Counter(reject.reason for reject in rejects)
        listed = "".join(f"\n  {count} rows: {reason}" for reason, count in reasons.most_common()) or "\n  no rows"
        raise BadInputError(
            f"No conversation of {', '.join(map(str, config.data))} gives a sample to train on:{listed}\n"
            f"A sample needs a supervised token with {config.block_size - 1} more tokens after it; the mask rule was "
            f"'{masker.rule}'."
        )
    return _place(config, kept, rejects, num_truncated, slot_bytes)


def _place(
    config: ExtractConfig,
    kept: list[tuple[Row, Tokenized, int]],
    rejects: list[Reject],
    num_truncated: int,
    slot_bytes: int,
) -> Plan:
    chunk = config.chunk_tokens
    num_tokens = np.array([len(sample.input_ids) for _, sample, _ in kept], np.int64)
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
    samples = SampleTable(
        source=[row.source.name for row, _, _ in kept],
        row=np.array([row.line for row, _, _ in kept], np.int64),
        num_tokens=num_tokens,
        num_supervised=np.array([sample.loss_mask.sum() for _, sample, _ in kept], np.int64),
        num_anchors=np.array([anchors for _, _, anchors in kept], np.int64),
        shard=shard,
        start=start,
        offsets=np.concatenate([[0], np.cumsum(num_tokens)]),
        flat_ids=np.concatenate([sample.input_ids for _, sample, _ in kept]),
        flat_mask=np.concatenate([sample.loss_mask for _, sample, _ in kept]),
    )
    return Plan(samples, rejects, num_truncated, current + 1, shard_tokens)


def refuse_ids_beyond_table(target: TargetFiles, samples: SampleTable) -> None:
    """Raise `DflashError` if the tokenizer wrote a token that the target has no embedding for."""
    num_rows = int(target.text_config.vocab_size)
    beyond = np.flatnonzero(samples.flat_ids >= num_rows)
    if len(beyond):
        sample = int(np.searchsorted(samples.offsets, beyond[0], "right")) - 1
        raise DflashError(
            f"{samples.place(sample)} holds token {samples.flat_ids[beyond[0]]}, but the target's embedding table has "
            f"{num_rows} rows. The tokenizer in {target.folder} belongs to another model; put the right one there."
        )


def choose_mask_token(target: TargetFiles, samples: SampleTable, wanted: int | None) -> int:
    """Return the token that fills the slots to be drafted: the wanted one, or a reserved one that no sample contains.

    Raises `DflashError` if it is no row of the embedding table, if a sample contains it, or if none can be found.
    """
    tokenizer, num_rows = target.tokenizer, int(target.text_config.vocab_size)
    used = set(np.unique(samples.flat_ids).tolist())
    if wanted is not None:
        if not 0 <= wanted < num_rows:
            raise DflashError(
                f"--mask-token-id {wanted} is no row of the target's embedding table of {num_rows}. Name one that is."
            )
        if wanted in used:
            sample = int(np.searchsorted(samples.offsets, np.flatnonzero(samples.flat_ids == wanted)[0], "right")) - 1
            raise DflashError(
                f"--mask-token-id {wanted} ({tokenizer.convert_ids_to_tokens(wanted)!r}) occurs in the data, first in "
                f"{samples.source[sample]}:{samples.row[sample]}. Name a token that no sample contains."
            )
        return wanted
    special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special and i < num_rows}
    taken = used | target.end_ids() | {tokenizer.bos_token_id}
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
