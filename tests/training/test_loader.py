"""What each micro-batch holds: the schedule's packing and order, the corpus of several caches, the loaded tensors."""

import random
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_target import WITH_TAGS, save_conversations, save_target

from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.schemas.errors import DflashError, MismatchError
from dflash_offline.schemas.run import RunRecord
from dflash_offline.schemas.samples import document_anchors
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store import shard_file
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.train import train
from dflash_offline.stages.training import corpus as corpus_module
from dflash_offline.stages.training import schedule as schedules
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.loader import BatchLoader
from dflash_offline.stages.training.schedule import POOL, Batching, Rows, RowShape, Schedule, pack

CPU = torch.device("cpu")
LENGTHS = np.random.default_rng(0).integers(20, 400, 500)
ANCHORS = np.minimum(LENGTHS // 2, 64)
SHAPE = RowShape(rows=4, tokens=1024, anchors=int(np.ceil(ANCHORS.sum() / LENGTHS.sum() * 1024)))


def schedule(seed: int = 0, shape: RowShape | None = SHAPE, weights: tuple[float, ...] = (1.0,)) -> Schedule:
    batching = Batching(num_tokens=LENGTHS, num_anchors=ANCHORS, shape=shape, batch_size=8)
    members = np.split(np.arange(500), [300])[: len(weights)] if len(weights) > 1 else [np.arange(500)]
    return Schedule(batching, members, list(weights), seed)


def flat(batches: list[Rows]) -> list[int]:
    return [int(sample) for batch in batches for row in batch for sample in row]


@pytest.mark.parametrize("shape", [SHAPE, None])
def test_every_epoch_holds_every_sample_once_in_another_order(shape: RowShape | None) -> None:
    first, again, other = (flat(schedule(seed, shape).epoch(epoch)) for seed, epoch in ((0, 0), (0, 0), (1, 0)))
    second = flat(schedule(0, shape).epoch(1))
    assert sorted(first) == sorted(second) == list(range(500))
    assert first == again and first != second and first != other


def test_no_row_has_more_tokens_or_anchors_than_the_shape_and_rows_are_full() -> None:
    rows = [row for batch in schedule().epoch(0) for row in batch]
    assert max(int(LENGTHS[row].sum()) for row in rows) <= SHAPE.tokens
    assert max(int(ANCHORS[row].sum()) for row in rows) <= SHAPE.anchors
    assert LENGTHS.sum() / (len(rows) * SHAPE.tokens) > 0.9
    assert ANCHORS.sum() / (len(rows) * SHAPE.anchors) > 0.9


def plain_pack(order: list[int]) -> list[list[int]]:
    """Pack one stretch, a document at a time."""
    pool, left, rows = order[:POOL], order[POOL:], []
    while pool:
        row, tokens, anchors = [], 1.0, 1.0
        while True:
            gains = {}
            for sample in pool:
                needs = LENGTHS[sample] / SHAPE.tokens, ANCHORS[sample] / SHAPE.anchors
                if needs[0] <= tokens + 1e-9 and needs[1] <= anchors + 1e-9:
                    gains[sample] = needs[0] * tokens + needs[1] * anchors
            if not gains:
                break
            best = max(gains, key=lambda sample: gains[sample])
            row.append(best)
            tokens, anchors = tokens - LENGTHS[best] / SHAPE.tokens, anchors - ANCHORS[best] / SHAPE.anchors
            place = pool.index(best)
            pool[place : place + 1] = [left.pop(0)] if left else []
        rows.append(row)
    return rows


@pytest.mark.parametrize("stretch", [10_000, 130, 500 // 3])
@pytest.mark.parametrize("num_documents", [0, 1, 63, 64, 65, 500])
def test_packing_equals_a_plain_one_of_each_stretch_of_the_order(
    num_documents: int, stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "STRETCH", stretch)
    order = np.random.default_rng(3).permutation(500)[:num_documents]
    packed = pack(LENGTHS, ANCHORS, order, SHAPE)
    parts = np.array_split(order, max(-(-num_documents // stretch), 1))
    assert [row.tolist() for row in packed] == [row for part in parts for row in plain_pack(part.tolist())]


def test_the_sequence_may_be_entered_anywhere() -> None:
    whole = [(flat([rows]), epoch) for rows, epoch in schedule().between(0, 100)]
    assert len(whole) == 100 and whole[-1][1] > 0
    for first in (0, 1, 26, 27, 28, 99):
        assert [(flat([rows]), epoch) for rows, epoch in schedule().between(first, 100)] == whole[first:]


def test_epochs_are_counted_each_by_itself() -> None:
    one = schedule()
    counts = [len(one.epoch(epoch)) for epoch in range(3)]
    assert one.batches_of(2) == sum(counts[:2])
    assert one.batches_of(2.5) == sum(counts[:2]) + -(-counts[2] // 2)


def test_a_weight_is_the_share_of_a_cache_drawn_anew_every_epoch() -> None:
    mixed = schedule(weights=(0.25, 1.0))
    first, second = (set(flat(mixed.epoch(epoch))) for epoch in (0, 1))
    for epoch in (first, second):
        assert len(epoch & set(range(300))) == 75 and epoch >= set(range(300, 500))
    assert first != second


def test_what_is_drawn_of_the_first_cache_does_not_follow_the_shuffle() -> None:
    overlaps = []
    for epoch in range(40):
        drawn = set(schedule(weights=(0.5, 1.0)).order(epoch).tolist()) & set(range(300))
        by_the_shuffles_stream = np.random.default_rng([0, epoch]).permutation(300)[:150].tolist()
        overlaps.append(len(drawn & set(by_the_shuffles_stream)) / 150)
    assert np.mean(overlaps) == pytest.approx(0.5, abs=0.03)


def test_without_weights_the_order_is_the_one_that_earlier_runs_began_with() -> None:
    for epoch in range(3):
        plain, shares = schedule(seed=5), schedule(seed=5, weights=(1.0, 1.0))
        expected = np.random.default_rng([5, epoch]).permutation(500)
        assert (plain.order(epoch) == expected).all() and (shares.order(epoch) == expected).all()


@pytest.fixture(scope="module")
def second_cache(target: Path, extract_config: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another cache of the same target: other conversations, one more layer before those of the first, compact."""
    folder = tmp_path_factory.mktemp("second")
    data = save_conversations(folder / "chats.jsonl", 30, seed=7)
    settings = {
        **extract_config,
        "data": (data,),
        "layers": (0, 1, 2, 4),
        "features": "scaled",
        "out": folder / "cache",
    }
    extract(ExtractConfig(**settings), Silent())
    return folder / "cache"


def loader(*caches: Path, shape: RowShape | None = None) -> BatchLoader:
    return BatchLoader(
        Corpus.open(caches), layer_ids=(1, 4), anchor_rule=AnchorRule(8), num_anchors=5, seed=3, shape=shape, device=CPU
    )


def rows_of(*rows: list[int]) -> Rows:
    return [np.array(row) for row in rows]


def test_a_packed_batch_holds_the_caches_features_tokens_and_mask(cache: Path, second_cache: Path) -> None:
    shape = RowShape(rows=3, tokens=400, anchors=20)
    both = loader(cache, second_cache, shape=shape)
    batch = both.widen(both.load(rows_of([7, 82], [30]), 0))
    readers = [Cache.open(cache), Cache.open(second_cache)]
    assert batch.input_ids.shape == (3, 400) and batch.anchors.shape == (3, 20)
    assert batch.samples == [7, 82, 30] and [span[0] for span in batch.spans] == [0, 0, 1]
    features = batch.hidden_states.unflatten(2, (2, 32))
    for (row, start, stop), (which, sample, columns), document in zip(
        batch.spans, [(0, 7, [0, 2]), (1, 2, [1, 3]), (0, 30, [0, 2])], (0, 1, 0), strict=True
    ):
        reader, here = readers[which], slice(start, stop)
        expected = torch.from_numpy(reader.values(sample)[:, columns])
        rounding = 0 if which == 0 else 2**-8  # of bfloat16, which lossless features are already
        torch.testing.assert_close(features[row, here].float(), expected, rtol=rounding, atol=rounding)
        assert batch.input_ids[row, here].tolist() == reader.samples.input_ids(sample).tolist()
        assert batch.loss_mask[row, here].tolist() == reader.samples.loss_mask(sample).tolist()
        assert (batch.document_ids[row, here] == document).all()
        mine = batch.keep_mask[row] & (batch.anchors[row] >= start) & (batch.anchors[row] < stop)
        assert mine.sum() == 5 and (batch.anchors[row][mine] + 8 <= stop).all()
    padding = batch.document_ids < 0
    assert int((~padding).sum()) == batch.num_tokens == sum(stop - start for _, start, stop in batch.spans)
    assert not batch.hidden_states[padding].any() and not batch.loss_mask[padding].any()


def test_anchors_depend_on_sample_and_epoch_not_on_the_batch_or_other_caches(cache: Path, second_cache: Path) -> None:
    def drawn(rows: Rows, epoch: int, caches: tuple[Path, ...]) -> list[int]:
        batch = loader(*caches).load(rows, epoch)
        row, start, stop = batch.spans[batch.samples.index(4)]
        anchors = batch.anchors[row][batch.keep_mask[row]]
        return (anchors[(anchors >= start) & (anchors < stop)] - start).tolist()

    alone = drawn(rows_of([4]), 0, (cache,))
    assert alone == drawn(rows_of([9, 4], [1]), 0, (cache, second_cache)) != drawn(rows_of([4]), 1, (cache,))
    one, both = Corpus.open((second_cache,)), Corpus.open((cache, second_cache))
    ids = {both.anchor_id(sample) for sample in range(len(both))}
    assert len(ids) == len(both) == 110 and one.anchor_id(2) not in {both.anchor_id(82)}


@pytest.mark.parametrize("block_size", [8, 5])
def test_anchors_are_counted_as_they_are_drawn_whatever_the_plan_counted(cache: Path, block_size: int) -> None:
    corpus = Corpus.open((cache,))
    assert corpus.caches[0].manifest.plan["block_size"] == 8
    drawn = [len(document_anchors(corpus.tokens(sample)[1], AnchorRule(block_size))) for sample in range(len(corpus))]
    assert corpus.num_anchors(AnchorRule(block_size), 10**6).tolist() == drawn
    assert corpus.num_anchors(AnchorRule(block_size), 3).tolist() == [min(count, 3) for count in drawn]


def test_the_split_follows_content(cache: Path) -> None:
    corpus = Corpus.open((cache,))
    training, held_out = corpus.split(5)
    assert len(held_out) == 5 and sorted([*training, *held_out]) == list(range(len(corpus)))
    assert len(corpus.split(10**6)[1]) == len(corpus) // 10


def test_the_samples_of_one_conversation_are_held_out_together(
    extract_config: dict[str, object], data: Path, tmp_path: Path
) -> None:
    cut = WITH_TAGS.replace(
        "{% generation %}{{ m.content }}", "{% generation %}{{ m.content[: none if loop.last else 9] }}"
    )
    target = save_target(tmp_path / "target", template=cut)
    extract(ExtractConfig(**extract_config | {"target": str(target), "out": tmp_path / "cache"}), Silent())
    corpus = Corpus.open((tmp_path / "cache",))
    table = corpus.caches[0].samples
    assert len(table) > 80 and set(table.answer.tolist()) == {0, 1, 2}
    sides = [{int(table.row[sample]) for sample in side} for side in corpus.split(10)]
    assert not sides[0] & sides[1] and any(np.count_nonzero(table.row == row) == 2 for row in sides[1])


def test_caches_of_another_target_and_a_cache_named_twice_are_refused(
    cache: Path, extract_config: dict[str, object], tmp_path: Path
) -> None:
    other = {**extract_config, "target": str(save_target(tmp_path / "target", seed=5)), "out": tmp_path / "other"}
    extract(ExtractConfig(**other), Silent())
    with pytest.raises(MismatchError, match=r"target\.weights_sha256\.model\.safetensors +first: \w+ +other: \w+"):
        Corpus.open((cache, tmp_path / "other"))
    copy = shutil.copytree(cache, tmp_path / "copy")
    with pytest.raises(DflashError, match="is the same cache"):
        Corpus.open((cache, copy))


def test_a_run_over_several_caches_knows_them_by_content_and_order(
    cache: Path, second_cache: Path, tmp_path: Path
) -> None:
    settings = TrainConfig(
        caches=(cache, second_cache),
        weights=(0.5, 1.0),
        layers=(1, 4),
        out=tmp_path / "run",
        steps=2,
        draft_layers=1,
        num_anchors=4,
        device="cpu",
    )
    done = train(settings, Silent())
    assert done.num_train + done.num_val == 110
    known = [Cache.open(path).manifest.checksum for path in settings.caches]
    assert RunRecord.read(tmp_path / "run").identity["caches"] == known
    copy = shutil.copytree(second_cache, tmp_path / "moved")
    assert train(replace(settings, caches=(cache, copy)), Silent()).state.step == 2
    for others in ((second_cache, cache), (cache,)):
        with pytest.raises(MismatchError, match=r"caches +run: .* now: "):
            train(replace(settings, caches=others, weights=(0.5, 1.0)[: len(others)]), Silent())


def test_weights_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DflashError, match="1 weights are given for 2 caches"):
        TrainConfig(caches=(tmp_path, tmp_path), out=tmp_path, weights=(1.0,))
    with pytest.raises(DflashError, match="more than 0 and at most 1"):
        TrainConfig(caches=(tmp_path,), out=tmp_path, weights=(2.0,))


def test_read_ahead_keeps_the_order(cache: Path) -> None:
    order: list[NDArray[np.int64]] = [np.array([sample]) for sample in (5, 1, 60, 2, 33, 8, 13)]
    streamed = list(loader(cache).stream((([row], 0) for row in order), 3))
    assert [batch.samples[0] for batch in streamed] == [5, 1, 60, 2, 33, 8, 13]
    assert all(batch.wait_s >= 0 for batch in streamed)


def old_held_out(digests: list[bytes], room: int) -> list[bool]:
    """Return which samples are held out, by the rule written out: the least digests first, all copies or none."""
    chosen = set()
    for digest in sorted(set(digests)):
        if (copies := digests.count(digest)) <= room:
            chosen.add(digest)
            room -= copies
    return [digest in chosen for digest in digests]


@pytest.mark.parametrize("kinds", [3, 40, 3000])
@pytest.mark.parametrize("room", [1, 7, 128])
def test_those_held_out_are_those_of_the_least_digests(kinds: int, room: int) -> None:
    chance = random.Random(kinds + room)
    some = [sha256(f"{kind}".encode()).digest() for kind in range(kinds)]
    some[0] = b"\0" * 8 + some[0][8:31] + b"\0"  # numpy drops zeros at an end
    some[-1] = b"\0" * 8 + some[-1][8:]
    digests = [chance.choice(some) for _ in range(4000)]
    found = corpus_module._held_out(np.frombuffer(b"".join(digests), "S32"), room)
    assert found.tolist() == old_held_out(digests, room)


def test_a_plan_too_large_to_be_held_gives_the_same_tokens_and_the_same_split(
    cache: Path, second_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Corpus.open((cache, second_cache))
    monkeypatch.setattr(corpus_module, "LOADED_TOKENS", 100)
    monkeypatch.setattr(shard_file, "_HELD_TOKENS", 1)
    read = Corpus.open((cache, second_cache))
    for sample in range(len(held)):
        for one, other in zip(held.tokens(sample), read.tokens(sample), strict=True):
            np.testing.assert_array_equal(one, other)
    assert read.caches[0].shard_tokens is not None
    for one, other in zip(held.split(9), read.split(9), strict=True):
        np.testing.assert_array_equal(one, other)
