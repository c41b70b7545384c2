"""Workers of a cluster as the command sees them: tasks given, taken back and given up; Ray itself is pretended."""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cache_files import content
from pretended_ray import PretendedRay
from running import Settings, arguments, dflash, refused
from tiny_target import save_conversations

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.locks import locked, touch_lock
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages import extract as stage
from dflash_offline.stages.answers.local import LocalAnswerer
from dflash_offline.stages.cluster import answers, shards, tasks, worker
from dflash_offline.stages.cluster import pool as pooling
from dflash_offline.stages.cluster.connection import connected, environment
from dflash_offline.stages.cluster.tasks import AHEAD, Tasks
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.regenerate import regenerate
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.leftovers import lock_path


class Listening(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "share_cores", lambda _sharing: None)  # this process stays what it is
    monkeypatch.setattr(worker, "_TICK_S", 0.01)
    monkeypatch.setattr(pooling, "_LOOK_S", 0.05)
    loading, open_worker = threading.Lock(), stage.open_worker

    def one_by_one(config: ExtractConfig) -> Any:
        with loading:  # transformers loads one model of a process at a time
            return open_worker(config)

    def load(self: LocalAnswerer) -> None:
        with loading:
            load_answerer(self)

    load_answerer = LocalAnswerer.load
    monkeypatch.setattr(stage, "open_worker", one_by_one)
    monkeypatch.setattr(LocalAnswerer, "load", load)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[PretendedRay], None]:
    """Have commands find a pretended cluster."""

    def on(ray: PretendedRay) -> None:
        @contextmanager
        def found(_address: str) -> Iterator[PretendedRay]:
            yield ray

        monkeypatch.setattr(stage, "connected", found)

    return on


On = Callable[[PretendedRay], None]


def test_workers_of_a_cluster_write_the_same_bytes_and_tell_their_rates(
    on: On, cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    ray, progress = PretendedRay(2), Listening()
    on(ray)
    done = extract(ExtractConfig(**extract_config, out=tmp_path / "cache", ray="auto"), progress)
    assert done.shards_written == done.num_shards and content(done.cache) == content(cache)
    assert len(ray.actors) == 2 and not list((done.cache / "tmp").iterdir())
    rates = [text for text in progress.said if text.startswith("Worker ")]
    assert sum(int(text.split(": ")[1].split()[0]) for text in rates) == done.num_shards


def test_a_lost_workers_shards_are_done_by_another_that_is_started_for_it(
    on: On, cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    calls = [0]

    def dies(actor: int, method: str) -> bool:
        calls[0] += actor == 0 and method == "exchange"
        return actor == 0 and calls[0] == 4

    ray, progress = PretendedRay(1, dies), Listening()
    on(ray)
    done = extract(ExtractConfig(**extract_config, out=tmp_path / "cache", ray="auto"), progress)
    assert len(ray.actors) == 2 and done.shards_left == 0 and content(done.cache) == content(cache)
    assert any("was lost: it is dead because its node has died." in text for text in progress.said), progress.said


def test_what_a_worker_says_is_wrong_is_the_one_message_of_the_command(
    on: On, extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(_config: ExtractConfig) -> Any:
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(stage, "open_worker", refuses)
    ray = PretendedRay(2)
    on(ray)
    config = ExtractConfig(**extract_config, out=tmp_path / "cache", ray="auto")
    with pytest.raises(DflashError) as refusal:
        extract(config, Silent())
    expected = "A worker has too little memory: Unable to allocate 9 GiB. Let it have more, or start fewer: "
    assert str(refusal.value) == expected + "--workers-max."
    assert len(ray.actors) <= 4  # it does not go on starting them
    monkeypatch.undo()
    assert extract(replace(config, ray=None), Silent()).shards_left == 0


def test_a_shard_that_ends_each_of_its_workers_is_given_up_and_all_others_are_done(
    on: On, extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shards.run_free_shards

    def poisoned(work: Any, numbers: Any, *rest: Any) -> None:
        def checked() -> Iterator[int | None]:
            for number in numbers:
                if number == 1:
                    raise DflashError("the target refuses shard 1")
                yield number

        run(work, checked(), *rest)

    monkeypatch.setattr(shards, "run_free_shards", poisoned)
    ray, out = PretendedRay(1), tmp_path / "cache"
    on(ray)
    with pytest.raises(DflashError, match=r"^the target refuses shard 1$"):
        extract(ExtractConfig(**extract_config, out=out, ray="auto"), Silent())
    cache = Cache(out)
    assert sorted(cache.commits) == [shard for shard in range(cache.layout.num_shards) if shard != 1]
    assert len(ray.actors) <= 3


def test_a_shard_that_another_command_holds_is_asked_for_again(
    on: On, cache: Path, extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_PAUSE_S", 0.05)
    config = ExtractConfig(**extract_config, out=tmp_path / "cache", ray="auto")
    seen, put_off = threading.Event(), Tasks.put_off

    def note(self: Tasks, number: int, task: int) -> None:
        put_off(self, number, task)
        seen.set()

    monkeypatch.setattr(Tasks, "put_off", note)
    on(PretendedRay(1))
    stop = threading.Event()

    def hold() -> None:
        while not (config.out / "manifest.json").exists():
            stop.wait(0.001)
        touch_lock(lock := lock_path(config.out, 2))
        with locked(lock, wait=True):
            seen.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    done = extract(config, Silent())
    holder.join()
    assert seen.is_set() and done.shards_left == 0 and content(done.cache) == content(cache)


def test_a_cache_that_a_node_does_not_see_is_refused_there(
    on: On, extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "worked_on", lambda out: out.parent / "not mounted")
    on(PretendedRay(1))
    with pytest.raises(DflashError, match=r"holds no cache on .*every node has it.*s3://bucket/prefix"):
        extract(ExtractConfig(**extract_config, out=tmp_path / "cache", ray="auto"), Silent())


def test_answers_of_a_cluster_are_those_of_one_process_though_a_worker_is_lost(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talker = Path(shutil.copytree(target, tmp_path / "talker"))
    ends = {"eos_token_id": [2, *range(60, 100)]}  # so many that a random target's answers end
    (talker / "generation_config.json").write_text(json.dumps(ends))
    data = save_conversations(tmp_path / "chats.jsonl", 12)
    given: dict[str, Any] = {"data": (data,), "target": str(talker), "batch_rows": 1, "max_new_tokens": 24}
    given |= {"keep_rewritten": True, "stop_after_rejected": 0, "device": "cpu"}
    alone = regenerate(RegenerateConfig(**given, out=tmp_path / "alone.jsonl"))
    calls = [0]

    def dies(actor: int, method: str) -> bool:
        calls[0] += actor == 0 and method == "exchange"
        return actor == 0 and calls[0] == 3

    ray = PretendedRay(1, dies)
    monkeypatch.setattr(answers, "connected", lambda _address: nullcontext(ray))
    done = regenerate(RegenerateConfig(**given, out=tmp_path / "own.jsonl", ray="auto"))
    assert len(ray.actors) == 2 and done.num_answers > 0 and done.num_answers_now == alone.num_answers_now
    assert done.out.read_bytes() == alone.out.read_bytes() and done.left_out == alone.left_out


def test_tasks_wait_at_a_worker_and_come_back_when_it_is_lost() -> None:
    left = Tasks(range(5))
    assert left.give(0) == [0, 1] == list(range(AHEAD)) and left.give(0) == []
    left.begin(0, 0)
    assert left.give(0) == [2] and left.give(1) == [3, 4]
    left.finish(0, 0)
    left.begin(0, 1)
    left.lose(0, said=False)
    left.begin(1, 3)
    assert left.give(1) == [2]  # 1 is suspect: it may have ended its worker, and is given alone
    assert left.give(2) == [1] and left.give(2) == []
    for worker_number, task in ((2, 1), (1, 4), (1, 2)):
        left.begin(worker_number, task)
        left.finish(worker_number, task)
    assert not left.is_over
    left.finish(1, 3)
    assert left.give(2) == [] and left.is_over and not left.given_up


def test_a_task_is_given_up_after_four_deaths_or_two_refusals() -> None:
    for said, losses in ((False, 4), (True, 2)):
        left = Tasks([7])
        for number in range(losses):
            assert left.give(number) == [7] and not left.is_over
            left.begin(number, 7)
            left.lose(number, said=said)
        assert left.given_up == [7] and left.give(9) == [] and left.is_over


def test_workers_that_wait_for_room_are_said_to() -> None:
    progress, ray = Listening(), PretendedRay(0)
    needs = pooling.Needs(cpus=1, gpus=0, least=1, most=1)
    unused: Any = None
    pool = pooling.Pool(ray=ray, do=unused, config=None, needs=needs, tasks=Tasks([0]), job=unused, progress=progress)
    pool._say_what_is_waited_for()
    assert progress.said == [
        "Waiting for a node with 1 CPUs, which each worker takes. The cluster's nodes: 0 CPUs and 0 GPUs."
    ]


def test_without_ray_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DflashError, match=r"--ray needs Ray .*pip install 'dflash-offline\[ray\]'"), connected("auto"):
        pass


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_an_address_where_nothing_answers_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    if by == "environment":
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    address = "auto" if by == "environment" else "127.0.0.1:9"
    said = r"no Ray cluster by --ray 127\.0\.0\.1:9.*ray start --head"
    with pytest.raises(DflashError, match=said), connected(address):
        pass


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workers-max", "4"], "workers_max is a setting of workers on Ray"),
        (["--workers-min", "2", "--workers-max", "1", "--ray"], "workers_max is 1; expected workers_min = 2, or more"),
        (["--ray", "chats.jsonl"], "ray is 'chats.jsonl'; expected auto, local or HOST:PORT"),
        (["--ray", "--workers", "2"], "ray starts workers of its own"),
        (["--ray", "--gpus-per-worker", "1"], "there is no GPU here"),
        (["--device", "cuda:1", "--ray"], "Ray chooses each worker's GPUs"),
    ],
)
def test_settings_that_cannot_be_used_together_are_refused(
    flags: list[str], said: str, extract_config: Settings, tmp_path: Path
) -> None:
    refused(dflash(*arguments(extract_config, tmp_path / "cache"), *flags), said)


def test_the_environment_that_workers_take_is_what_stores_and_the_hub_are_asked_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "HF_HOME", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "planted")
    taken = environment()
    assert {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN"} <= taken.keys() and not {"HF_HOME", "OPENAI_API_KEY"} & taken.keys()
    assert "PATH" in os.environ and "PATH" not in taken
