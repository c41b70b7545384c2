"""A real Ray cluster of this machine: nodes come and go, the command is killed and started again, nothing is left."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cache_files import content
from processes import children
from running import Settings, arguments

from dflash_offline.pipeline.demo import CONVERSATIONS, TARGET
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.regenerate import regenerate
from dflash_offline.stages.store.cache import Cache

pytestmark = pytest.mark.ray
HELPER = Path(__file__).with_name("local_cluster.py")
WORKER = "ray::Worker"
SECRET = "planted+secret/access-key"


def environment() -> dict[str, str]:
    """Return the environment of what uses Ray: its packages come before the project's own."""
    return os.environ | {
        "PYTHONPATH": os.environ["DFLASH_RAY"],
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # 127.0.0.1 stays what it is
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }


class Nodes:
    """A cluster of nodes of one CPU each."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._log = Path(folder) / "helper.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HELPER), folder],
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.session = self._process.pid
        self.address = ""

    def begin(self) -> None:
        """Wait until the head is there."""
        self.address = self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        assert answer, self._log.read_text()  # Ray gives a node 30 s to start, which a busy machine may exceed
        return answer

    def order(self, *words: object) -> int:
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)
        return int(self._answer())

    def end(self) -> None:
        self._process.communicate(timeout=60)
        if self._process.returncode:  # what did not come up does not end by itself
            for pid in processes(self.session):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """A cluster with two nodes; afterwards no process of it is left."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # sockets in it have short names
        nodes = Nodes(folder)
        try:
            nodes.begin()
            nodes.order("add")
            nodes.order("add")
            yield nodes
        finally:
            nodes.end()
            assert none_left(nodes.session), processes(nodes.session)


def processes(session: int, named: str = "") -> dict[int, str]:
    """Return the command lines of a session's living processes, those that begin with a name, by number."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _parent, _group, own, *_ = (path / "stat").read_text().rpartition(")")[2].split()
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if int(own) == session and state != "Z" and line.startswith(named):
            found[int(path.name)] = line
    return found


def none_left(session: int, named: str = "") -> bool:
    """Return whether all of these processes end within half a minute."""
    deadline = time.monotonic() + 30
    while processes(session, named) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not processes(session, named)


def dflash(*words: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "dflash_offline.pipeline", *map(str, words)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    data = tmp_path_factory.mktemp("data") / "chats.jsonl"
    data.write_text("".join(CONVERSATIONS.read_text().splitlines(keepends=True)[:1500]))
    return {
        "data": (data,),
        "target": str(TARGET),
        "layers": (1, 2),
        "block_size": 8,
        "shard_mib": 1,
        "chunk_tokens": 32,
        "device": "cpu",
    }


def records(out: Path) -> int:
    return len(list(out.glob("commits/*.json")))


def until(out: Path, number: int, command: "subprocess.Popen[str]") -> None:
    """Wait until so many shards are finished."""
    deadline = time.monotonic() + 300
    while records(out) < number:
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nodes_come_and_go_and_the_command_is_killed_and_the_cache_is_that_of_one_process(
    nodes: Nodes, config: Settings, tmp_path: Path
) -> None:
    alone = extract(ExtractConfig(**config, out=tmp_path / "alone"), Silent())
    out = tmp_path / "cache"
    words = [*arguments(config, out), "--ray", nodes.address]
    command = dflash(*words)
    until(out, 3, command)
    nodes.order("remove", 0)
    until(out, records(out) + 3, command)
    command.send_signal(signal.SIGKILL)
    command.communicate()
    assert none_left(nodes.session, WORKER)  # they end with the command
    left = alone.num_shards - records(out)
    assert left > 4, "too little is left to be seen"
    command = dflash(*words)
    nodes.order("add")  # before all is done by the other one
    _, said = command.communicate(timeout=300)
    assert command.returncode == 0, said
    assert content(out) == content(alone.cache)
    rates = [line for line in said.splitlines() if line.startswith("Worker ") and "tokens/s." in line]
    assert len(rates) == 2, said  # the node that joined was used
    for path in Path(nodes.folder).rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in said


def test_ctrl_c_leaves_what_can_be_gone_on_with_and_no_worker(nodes: Nodes, config: Settings, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    command = dflash(*arguments(config, out), "--ray", nodes.address)
    until(out, 2, command)
    assert processes(nodes.session, WORKER)
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=30)
    assert command.returncode == 130 and "repeat the command to go on" in said and "Traceback" not in said, said
    assert none_left(nodes.session, WORKER)


def test_answers_of_a_cluster_are_those_of_one_process_though_a_node_is_removed(
    nodes: Nodes, config: Settings, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "target": str(TARGET),
        "batch_rows": 4,
        "max_new_tokens": 24,
        "limit": 320,
        "device": "cpu",
    }
    assert isinstance(config["data"], tuple)
    given |= {"stop_after_rejected": 0}
    alone, out = tmp_path / "alone.jsonl", tmp_path / "own.jsonl"
    regenerate(RegenerateConfig(data=config["data"], out=alone, **given))
    flags = [str(part) for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    command = dflash("regenerate", *config["data"], "--out", out, *flags, "--ray", nodes.address)
    answers = tmp_path / "own.jsonl.partial" / "answers"
    deadline = time.monotonic() + 300
    while not answers.exists() or answers.read_bytes().count(b"\n") < 40:
        assert command.poll() is None and time.monotonic() < deadline, command.communicate()
        time.sleep(0.02)
    nodes.order("remove", 1)
    _, said = command.communicate(timeout=300)
    assert command.returncode == 0 and "was lost" in said, said
    assert out.read_bytes() == alone.read_bytes()
    assert (tmp_path / "own.jsonl.rejects").read_bytes() == (tmp_path / "alone.jsonl.rejects").read_bytes()


def seconds(pid: int) -> float:
    """Return the processor time of a process, 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def seconds_a_shard(command: "subprocess.Popen[str]", out: Path, session: int | None) -> float:
    """Return the processor seconds of all that takes part, for each shard between the first few and the last."""
    until(out, 10, command)  # by then all workers are at work
    first, began, known = records(out), dict[int, float](), dict[int, float]()
    total = Cache(out).layout.num_shards
    while records(out) < total:
        assert command.poll() is None, command.communicate()
        for pid in {command.pid, *children(command.pid), *(processes(session) if session else ())}:
            known[pid] = max(known.get(pid, 0.0), seconds(pid))
            began.setdefault(pid, known[pid])
        time.sleep(0.05)
    _, said = command.communicate()
    assert command.returncode == 0, said
    return (sum(known.values()) - sum(began.values())) / (total - first)


def test_a_cluster_costs_little_more_processor_time_than_workers(
    nodes: Nodes, config: Settings, tmp_path: Path
) -> None:
    """All processes of the cluster are counted, its own too; runs take turns; starts and ends are left out of both.

    Shards take a tenth of a second here, so that messages between processes weigh much, and other work on the machine
    spreads both sides: it wants a quiet one.
    """
    ratios = []
    for turn in range(2):
        taken = {}
        for way, flags in (("workers", ["--workers", 2]), ("ray", ["--ray", nodes.address])):
            out = tmp_path / f"{way}{turn}"
            command = dflash(*arguments(config | {"shard_mib": 2}, out), *flags)
            taken[way] = seconds_a_shard(command, out, nodes.session if way == "ray" else None)
        ratios.append(taken["ray"] / taken["workers"])
        print(taken)
    print("processor time for a shard, Ray to --workers:", ratios)
    assert min(ratios) <= 1.05, ratios
