"""A real vLLM, in the folder that DFLASH_VLLM names: prompts decoded offline, a script run, or its server.

How to hold an exported draft of any kind against it, in a test with the marker `vllm`:

    found = decode_live(tmp_path, draft, prompts, new_runner=True)   # prompts: lists of token ids
    found.tokens, found.accepted, found.equal_prompts(own)           # own: this project's SpeculativeDecodings

`new_runner` takes vLLM's V2 model runner, which alone serves drafts of mixed layers, DFlash 2 and DSpark; Triton's
interpreter runs its kernels, some fifty times slower, so few prompts and short answers. `settings` go to vLLM's
speculative_config (`{"method": "dspark"}`). Outside `make check-vllm`, DFLASH_VLLM and DFLASH_TRITON name the folders
that it makes (`make .clients/vllm/installed .clients/triton/installed`).
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from dflash_offline.pipeline.demo import CONVERSATIONS, TARGET
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.draft.decode import SpeculativeDecoding
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import train

VERSION = "0.32.0"
SCRIPTS = Path(__file__).parent
REPAIRS, INTERPRETER = SCRIPTS / "vllm_repairs", SCRIPTS / "triton_interpreter"
RUNNERS = {False: "vllm.v1.worker.cpu_model_runner", True: "vllm.v1.worker.cpu.model_runner"}
"""Modules of vLLM's two model runners, by whether it is the newer one."""
ON_A_CPU = ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8"]
ON_A_CPU += ["--enforce-eager", "--generation-config", "vllm", "--per-request-spec-decode-metrics", "detailed"]
START_S = 480.0


def embedded_run(folder: Path, *, final: bool = False, **settings: Any) -> Path:
    """Return a run on the embedded target that has learned something, made in a folder; `final` for its cache."""
    folder.mkdir(exist_ok=True)
    data = folder / "chats.jsonl"
    data.write_text("".join(CONVERSATIONS.read_text().splitlines(keepends=True)[:600]))
    made: dict[str, Any] = {"data": (data,), "target": str(TARGET), "block_size": 8, "shard_mib": 64}
    extract(ExtractConfig(**made, out=folder / "cache", **({"final": True} if final else {})), Silent())
    learning = {"steps": 150, "optimizer": "muon", "learning_rate": 6e-3, "num_anchors": 16}
    learning |= {"packing": False, "batch_size": 8, "val_samples": 16}
    train(TrainConfig(caches=(folder / "cache",), out=folder / "run", **learning, **settings), Silent())
    return folder / "run"


def environment(*more: Path, **variables: str) -> dict[str, str]:
    """Return the environment that finds vLLM and its repairs, and `more` folders before them."""
    folder = packages("DFLASH_VLLM")
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CACHE_ROOT": f"{folder}/cache"}
    return {**os.environ, **settings, "PYTHONPATH": ":".join(map(str, (*more, folder, REPAIRS))), **variables}


def interpreted() -> dict[str, str]:
    """Return the environment in which vLLM also finds Triton, whose interpreter runs the kernels of the V2 runner."""
    return environment(packages("DFLASH_TRITON"), INTERPRETER, TRITON_INTERPRET="1")


def packages(variable: str) -> Path:
    """Return the folder of packages that an environment variable names."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.fail(f"{variable} names no folder of packages: run `make check-vllm`, which makes it.")
    return Path(folder)


@dataclass(frozen=True)
class Client:
    """What vLLM decoded, an entry for each prompt."""

    tokens: list[list[int]]
    accepted: list[list[int]]
    """Drafted tokens that each round took, also those behind the answer's last one."""

    def equal_prompts(self, own: list[SpeculativeDecoding]) -> int:
        """Return how many prompts have the same number of rounds, and the same accepted count in every one."""
        return sum(
            len(theirs) == len(one.produced)
            and [min(pair) for pair in zip(theirs, one.produced, strict=True)] == one.kept
            for theirs, one in zip(self.accepted, own, strict=True)
        )


def decode_live(
    folder: Path,
    draft: Path,
    prompts: list[list[int]],
    *,
    target: Path = TARGET,
    max_new_tokens: int = 256,
    num_speculative_tokens: int = 7,
    temperature: float = 0.0,
    dtype: str = "float32",
    new_runner: bool = False,
    is_repaired: bool = True,
    settings: dict[str, Any] | None = None,
) -> Client:
    """Return what vLLM decodes with a draft, offline, in a process of its own; its files go to `folder`.

    The prompt of index i is drawn with seed i where the temperature is above 0. Without `is_repaired` the CPU build
    keeps its faults. `settings` join vLLM's speculative_config.
    """
    job = {"draft": str(draft), "target": str(target), "prompts": prompts, "max_new_tokens": max_new_tokens}
    job |= {"temperature": temperature, "dtype": dtype}
    job |= {"speculative": {"num_speculative_tokens": num_speculative_tokens, **(settings or {})}}
    (folder / "job.json").write_text(json.dumps(job))
    env = interpreted() if new_runner else environment()
    env |= {} if is_repaired else {"VLLM_PLUGINS": ""}
    result = run_script(SCRIPTS / "vllm_generate.py", folder / "job.json", folder / "result.json", env=env)
    assert (result["version"], result["repaired"]) == (VERSION, is_repaired)
    assert result["runner"] == RUNNERS[new_runner]
    return Client(result["tokens"], result["accepted"])


def run_script(script: Path, *arguments: Path, env: dict[str, str]) -> dict[str, Any]:
    """Return the JSON that a script wrote to the last of its arguments."""
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], env=env, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result: dict[str, Any] = json.loads(arguments[-1].read_text())
    return result


def launch_line(draft: Path) -> list[str]:
    """Return the words of the `vllm serve` line in an exported draft's card, with the draft's folder put in."""
    text = (draft / "README.md").read_text()
    found = re.search(r"^    (vllm serve (?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert found, text
    return [word.replace("THIS_FOLDER", str(draft)) for word in shlex.split(found[1].replace("\\\n", ""))]


@contextmanager
def served(line: list[str], log: Path) -> Iterator[str]:
    """Start what a launch line says, on loopback and with what a CPU needs; yields the server's URL once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, *rest = line
    assert program == "vllm"
    command = [sys.executable, str(Path(os.environ["DFLASH_VLLM"], "bin/vllm")), *rest, *ON_A_CPU, "--port", str(port)]
    with log.open("wb") as said:
        # A session of its own, so that the engine and its workers end with it.
        process = subprocess.Popen(command, env=environment(), stdout=said, stderr=said, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_S
        while not _answers(url):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(1)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


def members(session: int) -> list[int]:
    """Return the processes of a session that have not ended."""
    listed = subprocess.run(["ps", "-eo", "pid=,sid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [int(pid) for pid, sid, stat in rows if int(sid) == session and not stat.startswith("Z")]


def shared_files(session: int) -> set[str]:
    """Return the files in shared memory that a session's processes have mapped, without those that are deleted."""
    found = set[str]()
    for pid in members(session):
        with suppress(OSError):  # it has ended meanwhile
            found |= set(re.findall(r"/dev/shm/(\S+)$", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE))
    return found


def left_files(names: set[str]) -> set[str]:
    """Return which of these files in shared memory are still there."""
    return {name for name in names if Path("/dev/shm", name).exists()}


def ended(session: int, within_s: float = 60) -> bool:
    """Return whether all of a session's processes end in time."""
    until = time.monotonic() + within_s
    while members(session) and time.monotonic() < until:
        time.sleep(0.2)
    return not members(session)
