"""The samples of a cache that a draft did not train on, as prompts for decoding or to be walked without the target."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dflash_offline.schemas.draft.lint import trained_with
from dflash_offline.schemas.draft.weights import read_header
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.identity import differences, refuse_differences
from dflash_offline.schemas.results.expected import TEMPERATURES, ExpectedAcceptance
from dflash_offline.schemas.results.rounds import Rounds
from dflash_offline.schemas.run import RUN, RunRecord
from dflash_offline.stages.conversations.prompts import Prompt
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.trainer import DFlashTrainerModule
from dflash_offline.stages.training.checkpoint import choose_checkpoint, read_state, training_record
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.draft_setup import borrowed_parts
from dflash_offline.stages.training.loader import BatchLoader
from dflash_offline.stages.training.simulated_serving import draft_everywhere, expected_of, simulate_turn, turns

BATCH_SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class EvalSamples:
    """The samples of a cache that a draft is evaluated on."""

    corpus: Corpus
    """Of this cache alone."""
    samples: NDArray[np.int64]
    held_out: bool
    """False where the draft was not trained from this cache, or does not say; then these are all its samples."""

    @property
    def cache(self) -> Cache:
        """The cache that holds them, opened."""
        return self.corpus.caches[0]


def draft_folder(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """Return where a draft's config and weights lie, and what is known of its training.

    `path` is a draft's folder or a run's; of a run it is the best checkpoint.
    """
    if (path / RUN).is_file():
        record, checkpoint = RunRecord.read(path), choose_checkpoint(path, "best")
        return checkpoint, training_record(record, read_state(checkpoint).step)
    try:
        _, metadata = read_header(path / "model.safetensors")
    except ValueError:
        return path, None  # one that loading will refuse with its own message
    trained = trained_with(metadata, path / "model.safetensors")
    return path, trained if trained is not None and {"caches", "val_samples"} <= trained.keys() else None


def choose_samples(cache: Path, trained: dict[str, Any] | None, limit: int | None) -> EvalSamples:
    """Return the samples of the first rows that the draft's training held out, or, of another cache, of all rows.

    They are `limit` at most. A cache has its samples in the order of their lengths, so the first of them are alike.
    """
    corpus = Corpus.open((cache,))
    same = trained is not None and corpus.caches[0].manifest.checksum in trained["caches"]
    if trained is None or not same:
        return EvalSamples(corpus=corpus, samples=_first_rows(corpus, corpus.usable, limit), held_out=False)
    if len(trained["caches"]) > 1:
        raise DflashError(
            f"This draft was trained from {len(trained['caches'])} caches together, and what it held out of {cache} "
            f"cannot be told from one of them. Evaluate it with --prompts, or with another cache."
        )
    _, samples = corpus.split(trained["val_samples"])
    if not len(samples):
        raise DflashError(f"{cache} has no held-out sample for this draft: its training used all of them.")
    return EvalSamples(corpus=corpus, samples=_first_rows(corpus, samples, limit), held_out=True)


def _first_rows(corpus: Corpus, samples: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    """Return the samples, ascending, of the rows that come first in the data; those that an older cache has first."""
    if limit is None or limit >= len(samples):
        return samples
    cache = corpus.caches[0]
    if not cache.manifest.by_length:
        return samples[:limit]
    table = cache.samples
    keys = (table.answer[samples], table.row[samples], table.source_index[samples])
    return np.sort(samples[np.lexsort(keys)[:limit]])


def answer_spans(chosen: EvalSamples) -> Iterator[tuple[str, int, int, int]]:
    """Yield the place, the sample, and the first and last position of each assistant turn that a round could follow."""
    table = chosen.cache.samples
    for i in chosen.samples.tolist():
        for first, last in turns(table.loss_mask(i)):
            if 0 < first < last:
                yield f"{table.place(i)}, position {first}", i, first, last


def as_prompts(chosen: EvalSamples) -> list[tuple[Prompt, list[int]]]:
    """Return a prompt and its tokens for each assistant turn that a round could follow."""
    table = chosen.cache.samples
    prompts = [
        (Prompt(place=place, text=""), table.input_ids(i)[:first].tolist())
        for place, i, first, _ in answer_spans(chosen)
    ]
    if not prompts:
        raise DflashError(f"{chosen.cache.path} holds no answer of two tokens or more that follows a prompt.")
    return prompts


def check_cache_fits(chosen: EvalSamples, draft: DraftModel) -> None:
    """Raise `MismatchError` naming each field in which the cache is of another target, or lacks a layer to read."""
    decoder, config = chosen.cache.manifest.decoder, draft.config
    sizes = {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size}
    sizes["num_hidden_layers"] = config.num_target_layers
    rows = differences(sizes, {name: decoder[name] for name in sizes})
    if not set(config.target_layer_ids) <= set(chosen.cache.layer_ids):
        rows.append(("layer_ids", list(config.target_layer_ids), list(chosen.cache.layer_ids)))
    refuse_differences(
        f"{chosen.cache.path} cannot be walked with this draft",
        rows,
        ("draft", "cache"),
        "Name a cache of the draft's target that holds its layers.",
    )


class Walk(NamedTuple):
    """The serving walk of every assistant turn."""

    rounds: list[Rounds]
    expected: tuple[ExpectedAcceptance, ...]
    """What is expected where tokens are drawn; nothing of a cache without final states."""


def walk_samples(chosen: EvalSamples, drafts: Sequence[DraftModel], progress: Progress) -> list[Walk]:
    """Return each draft's walk, on its own device and in its own dtype.

    The drafts read the same layers, each of which is read once; the first has the longest block. The kind of a turn is
    the input file of its sample, if there are several.
    """
    config, cache, device = drafts[0].config, chosen.cache, next(drafts[0].parameters()).device
    head, table = borrowed_parts(cache, device)
    modules = [
        DFlashTrainerModule(
            *(draft, head, table, config.mask_token_id), block_size=draft.config.block_size, attention_backend="sdpa"
        )
        for draft in drafts
    ]
    loader = BatchLoader(
        chosen.corpus,
        layer_ids=config.target_layer_ids,
        anchor_rule=modules[0].anchor_rule,
        num_anchors=1,
        seed=0,
        shape=None,
        device=device,
        with_final=bool(chosen.corpus.finals),
    )
    order = chosen.samples[np.argsort(cache.samples.num_tokens[chosen.samples], kind="stable")]
    parts = [(list(order[i : i + BATCH_SAMPLES, None]), 0) for i in range(0, len(order), BATCH_SAMPLES)]
    walked: list[list[Rounds]] = [[] for _ in drafts]
    expected = np.zeros((len(drafts), len(TEMPERATURES), 2))
    several_files = len({cache.samples.source(i) for i in chosen.samples.tolist()}) > 1
    progress.start("Walking", len(order), "samples")
    try:
        with torch.inference_mode():
            for batch in loader.stream(parts, threads=1):
                masks = batch.loss_mask.cpu().numpy()
                for draft, module, rounds, sums in zip(drafts, modules, walked, expected, strict=True):
                    drafted, most = draft_everywhere(module, batch), draft.config.num_draft_tokens
                    for row, (sample, mask) in enumerate(zip(batch.samples, masks, strict=True)):
                        kind = cache.samples.source(sample) if several_files else None
                        several = [turn for turn in turns(mask) if turn[0] < turn[1]]
                        rounds += [_walked(kind, *turn, drafted.prefix[0, row], most) for turn in several]
                        if drafted.kept is not None:
                            sums += expected_of(several, drafted.kept[:, row])
                progress.advance(len(batch.samples))
    finally:
        progress.finish()
    return [Walk(rounds, _expected(sums)) for rounds, sums in zip(walked, expected, strict=True)]


def _expected(sums: NDArray[np.float64]) -> tuple[ExpectedAcceptance, ...]:
    """Return what tokens and expected rounds, [T, 2], come to."""
    if not sums.any():
        return ()
    return tuple(
        ExpectedAcceptance(temperature=temperature, pooled=tokens / rounds, rounds=rounds)
        for temperature, (tokens, rounds) in zip(TEMPERATURES, sums.tolist(), strict=True)
    )


def _walked(kind: str | None, first: int, last: int, prefix: NDArray[np.int64], num_draft_tokens: int) -> Rounds:
    produced, kept, anchor = simulate_turn(first, last, prefix), [], first
    for tokens in produced:
        kept.append(min(int(prefix[anchor]), tokens))
        anchor += tokens
    return Rounds(kind=kind, produced=produced, proposed=[num_draft_tokens] * len(produced), kept=kept)
